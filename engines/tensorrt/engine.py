"""Runs engines of TensorRT's: their contexts, profiles and memory.

Of TensorRT it uses the engine's and the execution context's methods that 8.6, 9.x and 10.x share (named tensors,
`execute_async_v3`), on whatever has them: TensorRT's own, or `pascalvl.engines.reference.backend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pascalvl.engines.device.engine import DeviceEngine
from pascalvl.engines.device.memory import Buffer, Device
from pascalvl.engines.device.session import DeviceSession
from pascalvl.engines.device.tensors import shape_of
from pascalvl.engines.engine import Session
from pascalvl.engines.tensorrt import profiles
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, pages_of


class Plan(Protocol):
    """What is used of TensorRT's ``ICudaEngine``."""

    @property
    def device_memory_size(self) -> int: ...

    def create_execution_context_without_device_memory(self) -> Any: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]: ...


class TensorRTEngine(DeviceEngine):
    """Both graphs' engines on a device.

    Args:
        plans: the engines by graph.
        device: where they and the cache are.
        marked_layers: whether the decoder returns `bindings.hidden_states` of every layer as well.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        plans: Mapping[str, Plan],
        device: Device,
        marked_layers: bool = False,
    ) -> None:
        super().__init__(directory, manifest, device, marked_layers)
        self.plans = plans
        self.max_prefill = self._largest(bindings.DECODER, bindings.INPUTS_EMBEDS)[0]
        self._max_patches = self._largest(bindings.VISION, bindings.PIXEL_VALUES)[0]
        self.max_pixels = self._max_patches * manifest.model.vision.patch_size**2
        self._max_pages = self._largest(bindings.DECODER, bindings.PAGE_TABLE)[1]
        # Prompts, single tokens and pictures never run at once: all contexts compute in one block, which never moves.
        self.device_memory = device.allocate(max(plan.device_memory_size for plan in plans.values()))
        self._contexts: dict[str, Context] = {}
        self._zeros: list[Buffer] = []
        """Each larger than the one before; contexts may read any."""

    def _largest(self, graph: str, name: str) -> tuple[int, ...]:
        return tuple(self.plans[graph].get_tensor_profile_shape(name, profiles.PREFILL)[2])

    def program(
        self, graph: str, sizes: Mapping[str, int], pointers: Mapping[str, int], kept: bool
    ) -> Callable[[], None]:
        if graph == bindings.VISION and sizes["patches"] > self._max_patches:
            raise UserError(
                f"a picture has {sizes['patches']} patches; this engine was built for up to {self._max_patches}: "
                f"give --max-pixels {self.max_pixels}, or build it with a larger --max-pixels."
            )
        if kept:
            context = Context(self, graph, profiles.DECODE)
        else:
            if graph not in self._contexts:
                self._contexts[graph] = Context(self, graph, profiles.PREFILL)
            context = self._contexts[graph]
        for binding in self.inputs[graph]:
            shape = shape_of(binding, sizes)
            pointer = pointers.get(binding.name) or self._of_zeros(binding, shape)
            context.bind_input(binding.name, pointer, shape)
        for binding in self.outputs[graph]:
            context.bind_output(binding.name, pointers[binding.name])
        return context.execute

    def _of_zeros(self, binding: bindings.Binding, shape: tuple[int, ...]) -> int:
        """Address of zeros in the place of DeepStack's embeddings."""
        nbytes = math.prod(shape) * binding.dtype.itemsize
        if not self._zeros or self._zeros[-1].nbytes < nbytes:
            buffer = self.device.allocate(nbytes)
            self.device.fill_zeros(buffer.pointer, nbytes)
            self._zeros.append(buffer)
        return self._zeros[-1].pointer

    def close(self) -> None:
        """As the base class; TensorRT's objects end before the CUDA context that they are in."""
        self._contexts, self.plans = {}, {}
        super().close()

    def open_session(self, capacity: int, pages: int | None = None) -> Session:
        if pages_of(capacity) > self._max_pages:
            raise UserError(
                f"a context of {capacity} tokens is more than this engine was built for, "
                f"{self._max_pages * PAGE_SLOTS}: give a smaller --context, or build it with a larger --max-context."
            )
        return super().open_session(capacity, pages)

    def _new_session(self, sequence_pages: int, pages: int) -> Session:
        return DeviceSession(self, sequence_pages, pages)


class Context:
    """An execution context of one graph, in one profile, on the device's stream."""

    def __init__(self, engine: TensorRTEngine, graph: str, profile: int) -> None:
        self._graph = graph
        self._stream = engine.device.stream
        self._context = engine.plans[graph].create_execution_context_without_device_memory()
        if self._context is None:  # TensorRT has told its logger why: as a rule, memory
            raise MemoryError(f"the {graph} engine")
        self._context.device_memory = engine.device_memory.pointer
        try:  # TensorRT's bindings raise where it returns False
            taken = self._context.set_optimization_profile_async(profile, self._stream)
        except RuntimeError:
            taken = False
        if not taken:
            raise UserError(
                f"the {graph} engine does not take its profile {profile}, which another session may have: build it "
                "again, on TensorRT 8.6 with the preview feature PROFILE_SHARING_0806."
            )
        engine.device.synchronize()

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._done(self._context.set_input_shape(name, shape), f"take {name} of shape {list(shape)}")

    def bind_input(self, name: str, pointer: int, shape: tuple[int, ...]) -> None:
        self.set_shape(name, shape)
        self._done(self._context.set_tensor_address(name, pointer), f"take the address of {name}")

    def bind_output(self, name: str, pointer: int) -> None:
        self._done(self._context.set_tensor_address(name, pointer), f"take the address of {name}")

    def execute(self) -> None:
        """Start the graph."""
        if not self._context.execute_async_v3(self._stream):
            raise UserError(
                f"the {self._graph} engine could not be started; with --verbose TensorRT says why: give a smaller "
                "--context, end what else uses the card, or build the engine again."
            )

    def _done(self, succeeded: bool, doing: str) -> None:
        if not succeeded:
            raise UserError(f"the {self._graph} engine does not {doing}: it was built for other sizes; build it again.")
