"""Tensors in a device's memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from pascalvl.engines.device.memory import ALIGNMENT, Buffer, Device
from pascalvl.plugins import bindings


class Buffers:
    """Device memory by name, allocated anew only where more is needed than ever before."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffers: dict[str, Buffer] = {}

    def get(self, name: str, nbytes: int) -> int:
        """Address of at least ``nbytes`` bytes."""
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            self._buffers.pop(name, None)
            self._buffers[name] = self._device.allocate(nbytes)
        return self._buffers[name].pointer


class DeviceArray:
    """An array of float32 in the device's memory, of which nothing was written yet."""

    def __init__(self, device: Device, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._device = device
        self._buffer = device.allocate(self.nbytes_of(shape))

    @staticmethod
    def nbytes_of(shape: Sequence[int]) -> int:
        """Bytes of such an array."""
        return 4 * math.prod(shape)

    def at(self, *index: int) -> int:
        """Address of a row: an index by all but the last of the dimensions; those that are not given are 0."""
        filled = (*index, *[0] * (len(self.shape) - len(index)))
        return self._buffer.pointer + 4 * int(np.ravel_multi_index(filled, self.shape))

    def numpy(self) -> np.ndarray:
        """A copy on the host."""
        array = np.empty(self.shape, np.float32)
        self._device.download(array, self._buffer.pointer)
        self._device.synchronize()
        return array


class Tensors:
    """Tensors side by side in one piece of the device's memory.

    Args:
        device: whose memory.
        tensors: which.
        sizes: of the dimensions that vary.
        memory: address of a piece, of `nbytes_of` them at least, that outlives them; None: one of their own.

    Attributes:
        shapes: of each.
        pointers: their addresses.
        nbytes: of the piece.
    """

    def __init__(
        self,
        device: Device,
        tensors: Sequence[bindings.Binding],
        sizes: Mapping[str, int],
        memory: int | None = None,
    ) -> None:
        self._device = device
        self.shapes = {tensor.name: shape_of(tensor, sizes) for tensor in tensors}
        self._starts, self.nbytes = _laid_out(tensors, sizes)
        self._buffer = device.allocate(self.nbytes) if memory is None else None
        self._memory = cast(int, memory) if self._buffer is None else self._buffer.pointer
        self.pointers = {name: self._memory + start for name, start in self._starts.items()}

    @staticmethod
    def nbytes_of(tensors: Sequence[bindings.Binding], sizes: Mapping[str, int]) -> int:
        """Bytes that they take."""
        return _laid_out(tensors, sizes)[1]


class StagedTensors(Tensors):
    """The same with a copy on the host, so that one transfer moves all of them.

    Attributes:
        arrays: them on the host, of zeros at first.
    """

    def __init__(
        self, device: Device, tensors: Sequence[bindings.Binding], sizes: Mapping[str, int], memory: int
    ) -> None:
        super().__init__(device, tensors, sizes, memory)
        self._host = device.host_array(self.nbytes)
        self.arrays = arrays_in(self._host, tensors, sizes)

    def upload(self) -> None:
        self._device.upload(self._memory, self._host)

    def download(self) -> None:
        self._device.download(self._host, self._memory)


def arrays_in(
    memory: np.ndarray, tensors: Sequence[bindings.Binding], sizes: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Arrays for tensors, laid out as `Tensors` are, in bytes of the host's memory."""
    starts, _ = _laid_out(tensors, sizes)
    return {
        tensor.name: np.ndarray(shape_of(tensor, sizes), tensor.dtype, memory.data, starts[tensor.name])
        for tensor in tensors
    }


def _laid_out(tensors: Sequence[bindings.Binding], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each starts, and the bytes of all."""
    starts, nbytes = {}, 0
    for tensor in tensors:
        starts[tensor.name] = nbytes
        nbytes += _aligned(math.prod(shape_of(tensor, sizes)) * tensor.dtype.itemsize)
    return starts, nbytes


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def shape_of(binding: bindings.Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape where the dimensions that vary have these sizes."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
