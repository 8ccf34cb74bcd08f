"""Memory and streams of what computes: a GPU, or the CPU where the kernels are emulated."""

from __future__ import annotations

import abc
import ctypes
import dataclasses
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pascalvl.engines.device.gpu import Gpu, check, find_gpu
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


class _CudaContext:
    """The primary context, from when it is first used until it is reset: all that there is in it ends with it."""

    def __init__(self) -> None:
        self._is_open = True

    def free(self, release: Callable[[int], object], handle: int) -> None:
        """Release what is in it, if it was not reset."""
        if self._is_open:
            release(handle)

    def close(self) -> None:
        """What there is in it is no more."""
        self._is_open = False


class _CudaBuffer(Buffer):
    def __init__(self, context: _CudaContext, nbytes: int) -> None:
        from cuda.bindings import runtime

        self.nbytes = nbytes
        self._context, self._free = context, runtime.cudaFree
        _, self.pointer = check(runtime.cudaMalloc(max(nbytes, 1)))

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._context.free(self._free, self.pointer)


class CudaDevice(Device):
    """CUDA's current device. Closing one resets the device for all of the process.

    Args:
        library: the kernels for CUDA.

    Raises:
        UserError: there is no GPU that can be used, or the kernels do not run on it.
    """

    _context = _CudaContext()

    def __init__(self, library: Path) -> None:
        from cuda.bindings import runtime

        self.gpu = find_gpu()
        self._cuda = runtime
        check(runtime.cudaFree(0))  # makes the context in which the kernels are loaded
        self.kernels = KernelLibrary(library)
        self.kernels.load()
        _, stream = check(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))
        self.stream = int(stream)

    def allocate(self, nbytes: int) -> Buffer:
        return _CudaBuffer(self._context, nbytes)

    def host_array(self, nbytes: int) -> np.ndarray:
        _, pointer = check(self._cuda.cudaMallocHost(nbytes))
        block = (ctypes.c_uint8 * nbytes).from_address(pointer)
        weakref.finalize(block, self._context.free, self._cuda.cudaFreeHost, pointer)  # arrays hold on to it
        array = np.frombuffer(block, np.uint8)
        array[:] = 0
        return array

    def upload(self, pointer: int, array: np.ndarray) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(self._cuda.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self.stream))

    def download(self, array: np.ndarray, pointer: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(self._cuda.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self.stream))

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        check(self._cuda.cudaMemcpyAsync(to, pointer, nbytes, kind, self.stream))

    def fill_zeros(self, pointer: int, nbytes: int) -> None:
        check(self._cuda.cudaMemsetAsync(pointer, 0, nbytes, self.stream))

    def synchronize(self) -> None:
        check(self._cuda.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        self.synchronize()
        self.kernels.unload()
        self._context.close()
        CudaDevice._context = _CudaContext()
        check(self._cuda.cudaDeviceReset())

    def is_capturing(self) -> bool:
        _, status = check(self._cuda.cudaStreamIsCapturing(self.stream))
        return status != self._cuda.cudaStreamCaptureStatus.cudaStreamCaptureStatusNone

    def capture(self, step: Callable[[], None]) -> Graph | None:
        cuda = self._cuda
        self.synchronize()
        try:
            check(cuda.cudaStreamBeginCapture(self.stream, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed))
            try:
                step()
            finally:
                error, graph = cuda.cudaStreamEndCapture(self.stream)
            check((error,))
            _, executable = check(cuda.cudaGraphInstantiate(graph, 0))
            _, _, count = check(cuda.cudaGraphGetNodes(graph))
            _, nodes, count = check(cuda.cudaGraphGetNodes(graph, count))
            kinds = [check(cuda.cudaGraphNodeGetType(node))[1] for node in nodes[:count]]
            check(cuda.cudaGraphDestroy(graph))
        except (RuntimeError, UserError) as error:
            cuda.cudaGetLastError()  # a capture that failed is no error of what comes next
            log.warning("a step is no CUDA graph, and slower: it cannot be captured (%s)", error)
            return None
        kernels = kinds.count(cuda.cudaGraphNodeType.cudaGraphNodeTypeKernel)
        graph = Graph(lambda: check(cuda.cudaGraphLaunch(executable, self.stream)) and None, kernels)
        weakref.finalize(graph, self._context.free, cuda.cudaGraphExecDestroy, executable)
        return graph


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
