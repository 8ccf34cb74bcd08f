"""What would be allocated on a device, without anything that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from pascalvl.engines.device.memory import ALIGNMENT, Buffer, Device, Graph, SynchronousDevice
from pascalvl.plugins.kernels.library import KernelLibrary


class DryRun(SynchronousDevice):
    """Counts what is allocated; nothing is copied or computed.

    Args:
        device: the one that it stands for: its kernels say what workspace they need on it.

    Attributes:
        nbytes: of what is allocated now.
        peak: the most that was.
    """

    def __init__(self, device: Device) -> None:
        self.gpu = device.gpu
        self.kernels = cast(KernelLibrary, _WithoutLaunches(device))
        self.nbytes = self.peak = 0

    def allocate(self, nbytes: int) -> Buffer:
        return _Counted(self, nbytes)

    def upload(self, pointer: int, array: np.ndarray) -> None:
        pass

    def download(self, array: np.ndarray, pointer: int) -> None:
        pass

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        pass

    def fill_zeros(self, pointer: int, nbytes: int) -> None:
        pass

    def capture(self, step: Callable[[], None]) -> Graph | None:
        return Graph(lambda: None, 0)


class _Counted(Buffer):
    pointer = ALIGNMENT

    def __init__(self, device: DryRun, nbytes: int) -> None:
        self.nbytes, self._device = nbytes, device
        device.nbytes += nbytes
        device.peak = max(device.peak, device.nbytes)

    def __del__(self) -> None:
        self._device.nbytes -= self.nbytes


class _WithoutLaunches:
    """The calls of `KernelLibrary`, of which only those that tell sizes do anything."""

    def __init__(self, device: Device) -> None:
        self.linear_workspace, self.attention_workspace = (
            device.kernels.linear_workspace,
            device.kernels.attention_workspace,
        )

    def linear(self, *_: object) -> None:
        pass

    attention = gather_rows = add_to = kv_append = choose = linear
