"""Runs plans: weights on the device, memory for intermediate results, and the launches of a graph."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pascalvl.engines.cuda.plan import Plan
from pascalvl.engines.cuda.program import BoundPlan
from pascalvl.engines.device.engine import DeviceEngine
from pascalvl.engines.device.memory import ALIGNMENT, Buffer, Device
from pascalvl.engines.device.padding import BATCHES, LENGTHS
from pascalvl.engines.device.session import DeviceSession
from pascalvl.engines.engine import Session
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import PIECE_BYTES, Manifest

_MOST_READERS = 8
"""Threads that read and hash weights, each with a piece of pinned memory."""


class CudaEngine(DeviceEngine):
    """Both graphs' plans on a device.

    Args:
        plans: by graph.
        weights: by graph, on the device.
        device: where they and the cache are.
        marked_layers: whether the decoder returns `bindings.hidden_states` of every layer as well.
    """

    max_prefill = LENGTHS[-1]

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        plans: Mapping[str, Plan],
        weights: Mapping[str, Buffer],
        device: Device,
        marked_layers: bool = False,
    ) -> None:
        super().__init__(directory, manifest, device, marked_layers)
        self.plans = plans
        self.lengths = LENGTHS if device.gpu else ()  # padding costs the emulator more than it saves
        self._weights = weights
        self._memory: list[Buffer] = []
        """For intermediate results, each larger than the one before: recorded steps work in any of them."""
        self._large: Buffer | None = None
        """For those of the last call that is not recorded, where they need more."""

    def program(
        self, graph: str, sizes: Mapping[str, int], pointers: Mapping[str, int], kept: bool
    ) -> Callable[[], None]:
        bound = self.bound(graph, sizes, pointers)
        launches = bound.launches(self._working_memory(bound.nbytes, kept))

        def start() -> None:
            for launch in launches:
                launch()

        return start

    def bound(self, graph: str, sizes: Mapping[str, int], pointers: Mapping[str, int]) -> BoundPlan:
        """A graph's launches for these sizes and addresses, see `BoundPlan`."""
        return BoundPlan(self.plans[graph], self.device, self._weights[graph].pointer, sizes, pointers)

    def _working_memory(self, nbytes: int, kept: bool) -> int:
        """Address of memory for intermediate results; steps and pictures never run at once, and share it."""
        self._large = None
        if not self._memory or self._memory[-1].nbytes < nbytes:
            buffer = self.device.allocate(nbytes)
            if not kept:  # a large picture's: given back at the next call
                self._large = buffer
                return buffer.pointer
            self._memory.append(buffer)
        return self._memory[-1].pointer

    def _new_session(self, sequence_pages: int, pages: int) -> Session:
        return DeviceSession(self, sequence_pages, pages)

    def prepare(self, sizes_of: Callable[[int, int], Mapping[str, int]]) -> None:
        """As the base class: allocates at once what the largest of the steps works in."""
        names = [*self.inputs[bindings.DECODER], *self.outputs[bindings.DECODER]]
        pointers = dict.fromkeys((binding.name for binding in names), ALIGNMENT)  # nothing is launched
        shapes = [(tokens, BATCHES[-1]) for tokens in (*self.lengths[-1:], BATCHES[-1])]
        bound = (self.bound(bindings.DECODER, sizes_of(*shape), pointers) for shape in shapes)
        self._working_memory(max(plan.nbytes for plan in bound), kept=True)


def upload_files(
    device: Device,
    paths: Mapping[str, Path],
    check: Callable[[Path, int, memoryview], None],
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Buffer]:
    """Copy files to a device's memory: pieces are read, hashed and sent at the same time.

    Args:
        device: to which.
        paths: of the files, by name; what they are copied to is returned by it.
        check: raises an error if this is not what a file's piece of so and so many is to be; called from several
            threads.
        progress: called with numbers of bytes, from several threads.

    Raises:
        MemoryError: there is no room for them.
    """
    sizes = {name: path.stat().st_size for name, path in paths.items()}
    buffers = {name: device.allocate(size) for name, size in sizes.items()}
    readers = min(_MOST_READERS, len(os.sched_getaffinity(0)))
    free: queue.SimpleQueue[np.ndarray] = queue.SimpleQueue()
    for _ in range(readers):
        free.put(device.host_array(min(PIECE_BYTES, max(sizes.values()))))

    def send(place: tuple[str, int]) -> None:
        name, number = place
        memory, start = free.get(), number * PIECE_BYTES
        try:
            piece = memory[: min(PIECE_BYTES, sizes[name] - start)]
            _read_into(files[name].fileno(), piece, start, paths[name])
            check(paths[name], number, piece.data)
            device.upload(buffers[name].pointer + start, piece)
            device.synchronize()
        finally:
            free.put(memory)
        progress(len(piece))

    pieces = [(name, number) for name, size in sizes.items() for number in range(-(-size // PIECE_BYTES))]
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(path.open("rb", buffering=0)) for name, path in paths.items()}
        for _ in stack.enter_context(concurrent.futures.ThreadPoolExecutor(readers)).map(send, pieces):
            pass
    return buffers


def _read_into(descriptor: int, piece: np.ndarray, start: int, path: Path) -> None:
    view = piece.data
    while view:
        count = os.preadv(descriptor, [view], start)
        if not count:
            raise OSError(f"{path} ended early")
        view, start = view[count:], start + count
