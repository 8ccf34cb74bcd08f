"""Memory and streams of what computes: a GPU, or the CPU where the kernels are emulated."""

from __future__ import annotations

import abc
import contextlib
import ctypes
import dataclasses
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pascalvl.engines.device import driver
from pascalvl.engines.device.driver import Context, context
from pascalvl.engines.device.gpu import Gpu, find_gpu
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import KernelLibrary

log = logging.getLogger(__name__)

ALIGNMENT = 256
"""Of all memory, as TensorRT expects of tensors."""


class Buffer(abc.ABC):
    """Memory of a device; freed with the object."""

    pointer: int
    nbytes: int


class Device(abc.ABC):
    """A device and one stream of work on it: calls start work there in order, and return.

    Attributes:
        kernels: the kernels' library for it.
        stream: the stream's handle.
        gpu: what it is; None: emulated.
    """

    gpu: Gpu | None = None
    kernels: KernelLibrary
    stream: int

    @abc.abstractmethod
    def allocate(self, nbytes: int) -> Buffer:
        """Memory that nothing was written to yet; raises `MemoryError` if there is not enough."""

    @abc.abstractmethod
    def host_array(self, nbytes: int) -> np.ndarray:
        """Bytes of the host's memory, of zeros, from where copies do not wait."""

    @abc.abstractmethod
    def upload(self, pointer: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device; it may change as soon as `synchronize` was called."""

    @abc.abstractmethod
    def download(self, array: np.ndarray, pointer: int) -> None:
        """Copy from the device to a contiguous array, which is filled when `synchronize` returns."""

    @abc.abstractmethod
    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        """Copy on the device."""

    @abc.abstractmethod
    def fill_zeros(self, pointer: int, nbytes: int) -> None:
        """Write zeros to the device."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait for the stream's work."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give back all that was ever allocated, and what made it possible; nothing of it may be used any more."""

    @abc.abstractmethod
    def is_capturing(self) -> bool:
        """Whether the stream records a graph, where nothing may wait for it."""

    @abc.abstractmethod
    def capture(self, step: Callable[[], None]) -> Graph | None:
        """Record what ``step`` starts; returns None, with a warning, if it cannot be recorded.

        Run ``step`` once before: what is set up on first use cannot be recorded.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """What was recorded: a call starts it again."""

    start: Callable[[], None]
    kernels: int
    """That it launches."""

    def __call__(self) -> None:
        self.start()


class _CudaBuffer(Buffer):
    def __init__(self, context: Context, nbytes: int) -> None:
        self.nbytes = nbytes
        self._context = context
        self.pointer = context.get("cuMemAlloc_v2", ctypes.c_uint64, max(nbytes, 1))

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._context.release("cuMemFree_v2", self.pointer)


class CudaDevice(Device):
    """CUDA's current device. Closing one resets the device for all of the process.

    Args:
        library: the kernels for CUDA.

    Raises:
        UserError: there is no GPU that can be used, or the kernels do not run on it.
    """

    def __init__(self, library: Path) -> None:
        self.gpu = find_gpu()
        self._context = context()
        self.stream = self._context.get("cuStreamCreate", ctypes.c_void_p, driver.NON_BLOCKING_STREAM)
        self.kernels = KernelLibrary(library)
        self.kernels.load()

    def allocate(self, nbytes: int) -> Buffer:
        return _CudaBuffer(self._context, nbytes)

    def host_array(self, nbytes: int) -> np.ndarray:
        pointer = self._context.get("cuMemHostAlloc", ctypes.c_void_p, max(nbytes, 1), 0)
        block = (ctypes.c_uint8 * nbytes).from_address(pointer)
        weakref.finalize(block, self._context.release, "cuMemFreeHost", pointer)  # arrays hold on to it
        array = np.frombuffer(memoryview(block), np.uint8)
        array[:] = 0
        return array

    def upload(self, pointer: int, array: np.ndarray) -> None:
        self._context.call("cuMemcpyHtoDAsync_v2", pointer, array.ctypes.data, array.nbytes, self.stream)

    def download(self, array: np.ndarray, pointer: int) -> None:
        self._context.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, pointer, array.nbytes, self.stream)

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        self._context.call("cuMemcpyDtoDAsync_v2", to, pointer, nbytes, self.stream)

    def fill_zeros(self, pointer: int, nbytes: int) -> None:
        self._context.call("cuMemsetD8Async", pointer, 0, nbytes, self.stream)

    def synchronize(self) -> None:
        self._context.call("cuStreamSynchronize", self.stream)

    def close(self) -> None:
        self.synchronize()
        self.kernels.unload()
        self._context.close()

    def is_capturing(self) -> bool:
        status = ctypes.c_int()
        self._context.call("cuStreamIsCapturing", self.stream, ctypes.byref(status))
        return status.value != driver.CAPTURE_NONE

    def capture(self, step: Callable[[], None]) -> Graph | None:
        cuda = self._context
        self.synchronize()
        try:
            cuda.call("cuStreamBeginCapture_v2", self.stream, driver.CAPTURE_RELAXED)
            recorded = ctypes.c_void_p()
            end = "cuStreamEndCapture", self.stream, ctypes.byref(recorded)
            try:
                step()
            except BaseException:
                with contextlib.suppress(UserError):
                    cuda.call(*end)
                raise
            cuda.call(*end)
            executable = cuda.get("cuGraphInstantiateWithFlags", ctypes.c_void_p, recorded, 0)
            kernels = self._count_kernels(recorded)
            cuda.call("cuGraphDestroy", recorded)
        except (RuntimeError, UserError) as error:
            log.warning("a step is no CUDA graph, and slower: it cannot be captured (%s)", error)
            return None
        graph = Graph(lambda: cuda.call("cuGraphLaunch", executable, self.stream), kernels)
        weakref.finalize(graph, cuda.release, "cuGraphExecDestroy", executable)
        return graph

    def _count_kernels(self, graph: ctypes.c_void_p) -> int:
        count = ctypes.c_size_t()
        self._context.call("cuGraphGetNodes", graph, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self._context.call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
        kernels, kind = 0, ctypes.c_int()
        for node in nodes:
            self._context.call("cuGraphNodeGetType", node, ctypes.byref(kind))
            kernels += kind.value == driver.KERNEL_NODE
        return kernels


class _HostBuffer(Buffer):
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.array = np.empty(nbytes + ALIGNMENT, np.uint8)
        self.pointer = -(-self.array.ctypes.data // ALIGNMENT) * ALIGNMENT


class SynchronousDevice(Device):
    """Every call has done its work when it returns."""

    stream = 0

    def host_array(self, nbytes: int) -> np.ndarray:
        return np.zeros(nbytes, np.uint8)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass

    def is_capturing(self) -> bool:
        return False


class EmulatedDevice(SynchronousDevice):
    """The CPU and its memory, with the emulator's kernels."""

    def __init__(self, library: Path) -> None:
        self.kernels = KernelLibrary(library)

    def allocate(self, nbytes: int) -> Buffer:
        return _HostBuffer(nbytes)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, pointer: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        ctypes.memmove(to, pointer, nbytes)

    def fill_zeros(self, pointer: int, nbytes: int) -> None:
        ctypes.memset(pointer, 0, nbytes)

    def capture(self, step: Callable[[], None]) -> Graph | None:
        return None


def available_target() -> Target:
    """What can run the kernels here: a GPU if there is one, else the emulator."""
    try:
        gpu = find_gpu()
    except UserError as error:
        log.info("device cpu, the kernels in their emulator: %s", error)
        return Target.EMULATOR
    log.info("device %s", gpu.name)
    return Target.CUDA


def open_device(target: Target, library: Path) -> Device:
    """The device that runs ``library``, the kernels for ``target``."""
    return CudaDevice(library) if target is Target.CUDA else EmulatedDevice(library)
