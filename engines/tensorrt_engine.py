"""Runs engines of TensorRT's: their buffers, the external cache beside them, and the decode step as one CUDA graph.

Of TensorRT it uses the engine's and the execution context's methods that 8.6, 9.x and 10.x share (named tensors,
`execute_async_v3`), on whatever has them: TensorRT's own, or `pascalvl.engines.plugin_host`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pascalvl.engines import profiles
from pascalvl.engines.backend import Engine
from pascalvl.engines.device import ALIGNMENT, Buffer, Device
from pascalvl.engines.session import ALWAYS_VISIBLE, SLOTS, Placement, Session, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, Rows

_CHOICE = [
    bindings.Binding("token", np.dtype(np.int32), (1,)),
    bindings.Binding("logit", np.dtype(np.float32), (1,)),
]


class Plan(Protocol):
    """What is used of TensorRT's ``ICudaEngine``."""

    @property
    def device_memory_size(self) -> int: ...

    def create_execution_context_without_device_memory(self) -> Any: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]: ...


class TensorRTEngine(Engine):
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
        super().__init__(directory, manifest)
        self.plans = plans
        self.device = device
        self.gpu = device.gpu.name if device.gpu else None
        model = manifest.model
        self.inputs = {
            bindings.VISION: bindings.vision_inputs(model),
            bindings.DECODER: bindings.decoder_inputs(model, manifest.kv_cache),
        }
        self.outputs = {
            bindings.VISION: bindings.vision_outputs(model),
            bindings.DECODER: bindings.decoder_outputs(model, manifest.kv_cache),
        }
        if marked_layers:
            self.outputs[bindings.DECODER] += bindings.decoder_hidden_states(model)
        self.max_prefill = self._largest(bindings.DECODER, bindings.INPUTS_EMBEDS)[1]
        self._max_patches = self._largest(bindings.VISION, bindings.PIXEL_VALUES)[0]
        self.max_pixels = self._max_patches * model.vision.patch_size**2
        self._max_context = self._largest(bindings.DECODER, bindings.past_key(0))[2]
        # Prompts, single tokens and pictures never run at once: all contexts compute in one block, which never moves.
        self.device_memory = device.allocate(max(plan.device_memory_size for plan in plans.values()))
        self._contexts: dict[str, Context] = {}
        self._buffers = Buffers(device)

    def _largest(self, graph: str, name: str) -> tuple[int, ...]:
        return tuple(self.plans[graph].get_tensor_profile_shape(name, profiles.PREFILL)[2])

    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes = self._sizes(graph, feeds)
        if graph not in self._contexts:
            self._contexts[graph] = Context(self, graph, profiles.PREFILL)
        context = self._contexts[graph]
        for binding in self.inputs[graph]:
            array = np.ascontiguousarray(feeds[binding.name], binding.dtype)
            pointer = self._buffers.get(binding.name, array.nbytes)
            context.bind_input(binding.name, pointer, array.shape)
            self.device.upload(pointer, array)
        outputs = {}
        for binding in self.outputs[graph]:
            array = np.empty(shape_of(binding, sizes), binding.dtype)
            pointer = self._buffers.get(f"new {binding.name}", array.nbytes)  # deepstack_embeds go in and come out
            context.bind_output(binding.name, pointer)
            outputs[binding.name] = array, pointer
        context.execute()
        for array, pointer in outputs.values():
            self.device.download(array, pointer)
        self.device.synchronize()
        return {name: array for name, (array, _) in outputs.items()}

    def _sizes(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, int]:
        """The dimensions that vary, by name; raises `UserError` for a picture that the engine was not built for."""
        sizes = {
            name: size
            for binding in self.inputs[graph]
            for name, size in zip(binding.shape, feeds[binding.name].shape, strict=True)
            if isinstance(name, str)
        }
        if graph == bindings.VISION:
            sizes["tokens"] = sizes["patches"] // self.manifest.model.vision.spatial_merge_size**2
            if sizes["patches"] > self._max_patches:
                raise UserError(
                    f"a picture has {sizes['patches']} patches; this engine was built for up to {self._max_patches}: "
                    f"give --max-pixels {self.max_pixels}, or build it with a larger --max-pixels."
                )
        return sizes

    def _new_session(self, capacity: int) -> Session:
        if capacity > self._max_context:
            raise UserError(
                f"a context of {capacity} tokens is more than this engine was built for, {self._max_context}: give a "
                "smaller --context, or build it with a larger --max-context."
            )
        return TensorRTSession(self, capacity)


class TensorRTSession(Session):
    """The cache in the device's memory, with the decoder's contexts for prompts and for one token.

    All memory is allocated here, once. The decoder writes the new rows of all layers beside the cache, and one launch
    copies them into it. What varies between decode steps is written to one array in host memory, which the step copies
    to the device, places in the cache with it: the host's word counts, also after an interrupt.
    """

    def __init__(self, engine: TensorRTEngine, capacity: int) -> None:
        super().__init__(engine, capacity)
        self._engine, self._device = engine, engine.device
        text = self.model.text
        chunk = min(engine.max_prefill, self.capacity)
        sizes = {**self.sizes, "seq": chunk, "visible_slots": self.capacity, "rows": 1}
        self._cache = Tensors(self._device, [b for inputs in self.layer_inputs for b in inputs], sizes)

        decoder = engine.inputs[bindings.DECODER]
        self._outputs = Tensors(self._device, engine.outputs[bindings.DECODER], sizes)
        self._new_rows = [bindings.new_rows(self.model, self.cache, layer) for layer in range(len(self.layouts))]
        self._layers = [self._layer(number) for number in range(len(self.layouts))]

        own = [binding for binding in decoder if binding.name not in self._cache.pointers]
        self._inputs = Tensors(self._device, [*own, SLOTS], sizes)
        self._prefill_context = self._context(profiles.PREFILL, self._inputs)

        one = {**sizes, "seq": 1, "visible_slots": 1}
        no_deepstack = StagedTensors(self._device, [b for b in own if b.name == bindings.DEEPSTACK_EMBEDS], one)
        no_deepstack.upload()
        staged = [binding for binding in own if binding.name != bindings.DEEPSTACK_EMBEDS]
        self._step_inputs = StagedTensors(self._device, [*staged, SLOTS], one)
        self._step_inputs.arrays[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
        self._step_inputs.arrays[SLOTS.name][:] = -1
        self._decode_context = self._context(profiles.DECODE, self._step_inputs, no_deepstack)
        self._set_tokens(self._decode_context, 1)
        self._kept = no_deepstack
        self._choice = StagedTensors(self._device, _CHOICE, {})
        self._logits = self._device.host_array(4 * text.vocab_size).view(np.float32)[None]
        self._step()  # what is set up on first use cannot be recorded
        self._device.synchronize()
        self._replay = self._device.capture(self._step)

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    @property
    def is_graph(self) -> bool:
        """Whether the decode step is one CUDA graph."""
        return self._replay is not None

    def prefill(
        self, feeds: Mapping[str, np.ndarray], placement: Placement, visuals: Sequence[VisualRows] = ()
    ) -> dict[str, np.ndarray]:
        seq = feeds[bindings.INPUTS_EMBEDS].shape[1]
        self._set_tokens(self._prefill_context, seq)
        visible = self.visible(placement)
        self._prefill_context.set_shape(bindings.PAST_VISIBLE, visible.shape)
        given = {bindings.PAST_VISIBLE: visible, bindings.LOGIT_ROWS: placement.last}
        for name, array in {**self.with_visuals(feeds, visuals), **placement.arrays, **given}.items():
            self._device.upload(self._inputs.pointers[name], np.ascontiguousarray(array))
        self._prefill_context.execute()
        self._append(seq, self._inputs)
        stay = {binding.name for rows in self._new_rows for binding in rows}
        outputs = {
            binding.name: np.empty(shape_of(binding, {"batch": 1, "seq": seq, "rows": 1}), binding.dtype)
            for binding in self._engine.outputs[bindings.DECODER]
            if binding.name not in stay
        }
        for name, array in outputs.items():
            self._device.download(array, self._outputs.pointers[name])
        self._device.synchronize()
        return outputs

    def decode(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> np.ndarray:
        self._decode(feeds, placement)
        self._device.download(self._logits, self._outputs.pointers[bindings.LOGITS])
        self._device.synchronize()
        return self._logits.copy()

    def decode_greedy(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> tuple[int, float]:
        self._decode(feeds, placement)
        return int(self._choice.arrays["token"][0]), float(self._choice.arrays["logit"][0])

    def _decode(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> None:
        for name, array in {**feeds, **placement.arrays}.items():
            self._step_inputs.arrays[name][:] = array
        (self._replay or self._step)()
        self._device.synchronize()

    def _fetch(self, binding: bindings.Binding) -> np.ndarray:
        array = np.empty(self.shape_of(binding), binding.dtype)
        self._device.download(array, self._cache.pointers[binding.name])
        self._device.synchronize()
        return array

    def _put(self, binding: bindings.Binding, array: np.ndarray) -> None:
        self._device.upload(self._cache.pointers[binding.name], array)
        self._device.synchronize()

    def _step(self) -> None:
        """One token, from the staged inputs to the likeliest next one on the host, without waiting for the device."""
        self._step_inputs.upload()
        self._decode_context.execute()
        self._append(1, self._step_inputs)
        self._device.kernels.greedy(
            self._outputs.pointers[bindings.LOGITS],
            1,
            self.model.text.vocab_size,
            self._choice.pointers["token"],
            self._choice.pointers["logit"],
            self._device.stream,
        )
        self._choice.download()

    def _context(self, profile: int, *inputs: Tensors) -> Context:
        """A context of the decoder that reads these inputs and this cache."""
        context = Context(self._engine, bindings.DECODER, profile)
        known = {binding.name for binding in self._engine.inputs[bindings.DECODER]}
        for tensors in (*inputs, self._cache):
            for name in known & tensors.pointers.keys():
                context.bind_input(name, tensors.pointers[name], tensors.shapes[name])
        for name, pointer in self._outputs.pointers.items():
            context.bind_output(name, pointer)
        return context

    def _set_tokens(self, context: Context, seq: int) -> None:
        """Give a context the shapes of ``seq`` tokens."""
        for binding in self._engine.inputs[bindings.DECODER]:
            if "seq" in binding.shape:
                context.set_shape(binding.name, shape_of(binding, {"batch": 1, "seq": seq}))

    def _append(self, seq: int, inputs: Tensors) -> None:
        """Copy the new rows of all layers into their caches."""
        args = AppendArgs.of(
            self._layers,
            slots=inputs.pointers[SLOTS.name],
            batch=1,
            num_kv_heads=self.model.text.num_key_value_heads,
            seq=seq,
            capacity=self.capacity,
        )
        self._device.kernels.kv_append(args, self._device.stream)

    def _layer(self, number: int) -> AppendLayer:
        """Where a layer's new rows are and where they go."""
        new, cache = (
            Rows(**dict(zip(("key", "value", "scale"), (tensors.pointers[b.name] for b in names), strict=False)))
            for tensors, names in ((self._outputs, self._new_rows[number]), (self._cache, self.layer_inputs[number]))
        )
        key_row, value_row = self.layouts[number].row_bytes
        return AppendLayer(new_rows=new, cache=cache, key_row=key_row, value_row=value_row)


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


class Tensors:
    """Tensors side by side in one piece of the device's memory.

    Attributes:
        shapes: of each.
        pointers: their addresses.
    """

    def __init__(self, device: Device, tensors: list[bindings.Binding], sizes: Mapping[str, int]) -> None:
        self._device = device
        self.shapes = {tensor.name: shape_of(tensor, sizes) for tensor in tensors}
        self._starts, nbytes = {}, 0
        for tensor in tensors:
            self._starts[tensor.name] = nbytes
            nbytes += _aligned(int(np.prod(self.shapes[tensor.name])) * tensor.dtype.itemsize)
        self._buffer = device.allocate(nbytes)
        self.pointers = {name: self._buffer.pointer + start for name, start in self._starts.items()}

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes


class StagedTensors(Tensors):
    """The same with a copy on the host, so that one transfer moves all of them.

    Attributes:
        arrays: them on the host, of zeros at first.
    """

    def __init__(self, device: Device, tensors: list[bindings.Binding], sizes: Mapping[str, int]) -> None:
        super().__init__(device, tensors, sizes)
        self._host = device.host_array(self._buffer.nbytes)
        self.arrays = {
            tensor.name: np.ndarray(self.shapes[tensor.name], tensor.dtype, self._host.data, self._starts[tensor.name])
            for tensor in tensors
        }

    def upload(self) -> None:
        self._device.upload(self._buffer.pointer, self._host)

    def download(self) -> None:
        self._device.download(self._host, self._buffer.pointer)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def shape_of(binding: bindings.Binding, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape where the dimensions that vary have these sizes."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in binding.shape)
