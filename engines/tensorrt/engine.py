"""Runs engines of TensorRT's: their buffers, the external cache beside them, and decode steps as CUDA graphs.

Of TensorRT it uses the engine's and the execution context's methods that 8.6, 9.x and 10.x share (named tensors,
`execute_async_v3`), on whatever has them: TensorRT's own, or `pascalvl.engines.reference.backend`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pascalvl.engines.device import batches
from pascalvl.engines.device.memory import Device
from pascalvl.engines.device.tensors import Buffers, StagedTensors, Tensors, shape_of
from pascalvl.engines.engine import ALWAYS_VISIBLE, SLOTS, Engine, NewTokens, Session
from pascalvl.engines.tensorrt import profiles
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, Rows
from pascalvl.plugins.kv_format import PAGE_SLOTS, pages_of

_CHOICE = [
    bindings.Binding("token", np.dtype(np.int32), ("batch",)),
    bindings.Binding("logit", np.dtype(np.float32), ("batch",)),
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
        self.max_prefill = self._largest(bindings.DECODER, bindings.INPUTS_EMBEDS)[0]
        self._max_patches = self._largest(bindings.VISION, bindings.PIXEL_VALUES)[0]
        self.max_pixels = self._max_patches * model.vision.patch_size**2
        self._max_pages = self._largest(bindings.DECODER, bindings.PAGE_TABLE)[1]
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

    def open_session(self, capacity: int, pages: int | None = None) -> Session:
        if pages_of(capacity) > self._max_pages:
            raise UserError(
                f"a context of {capacity} tokens is more than this engine was built for, "
                f"{self._max_pages * PAGE_SLOTS}: give a smaller --context, or build it with a larger --max-context."
            )
        return super().open_session(capacity, pages)

    def _new_session(self, sequence_pages: int, pages: int) -> Session:
        return TensorRTSession(self, sequence_pages, pages)


class TensorRTSession(Session):
    """The pool in the device's memory, with the decoder's contexts for prompts and for decode steps.

    The decoder writes the new rows of all layers beside the pool, and one launch copies them into it. A decode step is
    padded to the next of `batches.BATCHES` sequences; each of these has a context, made and recorded when it first
    runs, the first one at once.
    """

    def __init__(self, engine: TensorRTEngine, sequence_pages: int, pages: int) -> None:
        super().__init__(engine, sequence_pages, pages)
        self.engine, self.device = engine, engine.device
        most = batches.BATCHES[-1]
        # As many tokens as the engine takes, however few a sequence has: a step runs those of several.
        tokens = engine.max_prefill
        sizes = {**self.sizes, **_sizes_of(tokens, most), "visible_slots": sequence_pages * PAGE_SLOTS}
        self.pool = Tensors(self.device, self.stored, sizes)
        of_any = {**sizes, "tokens": max(tokens, most)}  # also of decode steps, which may have more
        self.outputs = Tensors(self.device, engine.outputs[bindings.DECODER], of_any)
        self._new_rows = [bindings.new_rows(self.model, self.cache, layer) for layer in range(len(self.layouts))]
        self._layers = [self._layer(number) for number in range(len(self.layouts))]

        inputs = [binding for binding in engine.inputs[bindings.DECODER] if binding.name not in self.pool.pointers]
        self._inputs = Tensors(self.device, [*inputs, SLOTS], sizes)
        self._prefill = self.context(profiles.PREFILL, self._inputs)
        self._decode_steps: dict[int, _DecodeStep] = {}
        self.decode_step(1)

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    def step(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        if self._decoded(sequences):
            return self.download(len(sequences), len(sequences))
        given = self.inputs_with_visuals(sequences)
        for name, array in given.items():
            if name != SLOTS.name:
                self._prefill.set_shape(name, array.shape)
            self.device.upload(self._inputs.pointers[name], np.ascontiguousarray(array))
        self._prefill.execute()
        tokens = len(given[bindings.INPUTS_EMBEDS])
        self.append(tokens, self._inputs)
        return self.download(tokens, len(given[bindings.LOGIT_ROWS]))

    def greedy(self, sequences: Sequence[NewTokens]) -> list[tuple[int, float]]:
        if decode_step := self._decoded(sequences):
            return decode_step.likeliest[: len(sequences)]
        return super().greedy(sequences)

    def _decoded(self, sequences: Sequence[NewTokens]) -> _DecodeStep | None:
        """Run a step of one token of text each; None: this is none."""
        batch = batches.padded_batch(len(sequences))
        if batch is None or not all(new.is_decode for new in sequences):
            return None
        decode_step = self.decode_step(batch)
        decode_step.run(sequences)
        return decode_step

    def download(self, tokens: int, rows: int) -> dict[str, np.ndarray]:
        """What a step of so many tokens gave, but the new rows, which stay."""
        stay = {binding.name for of_layer in self._new_rows for binding in of_layer}
        sizes = {"tokens": tokens, "rows": rows}
        outputs = {
            binding.name: np.empty(shape_of(binding, sizes), binding.dtype)
            for binding in self.engine.outputs[bindings.DECODER]
            if binding.name not in stay
        }
        for name, array in outputs.items():
            self.device.download(array, self.outputs.pointers[name])
        self.device.synchronize()
        return outputs

    def decode_step(self, batch: int) -> _DecodeStep:
        """That of one of `batches.BATCHES`."""
        if batch not in self._decode_steps:
            self._decode_steps[batch] = _DecodeStep(self, batch)
        return self._decode_steps[batch]

    def _read(self, binding: bindings.Binding, pages: np.ndarray) -> np.ndarray:
        array = np.empty((len(pages), *self.shape_of(binding)[1:]), binding.dtype)
        for part, pointer in self._runs(binding, pages, array):
            self.device.download(part, pointer)
        self.device.synchronize()
        return array

    def _write(self, binding: bindings.Binding, pages: np.ndarray, array: np.ndarray) -> None:
        for part, pointer in self._runs(binding, pages, np.ascontiguousarray(array)):
            self.device.upload(pointer, part)
        self.device.synchronize()

    def _runs(
        self, binding: bindings.Binding, pages: np.ndarray, array: np.ndarray
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Parts of an array of pages that follow each other in the pool, too, and where they are there."""
        bounds = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1), len(pages)]
        for start, stop in itertools.pairwise(bounds):
            if stop > start:
                yield array[start:stop], self.pool.pointers[binding.name] + int(pages[start]) * array[0].nbytes

    def context(self, profile: int, *inputs: Tensors) -> Context:
        """A context of the decoder that reads these inputs and the pool."""
        context = Context(self.engine, bindings.DECODER, profile)
        known = {binding.name for binding in self.engine.inputs[bindings.DECODER]}
        for tensors in (*inputs, self.pool):
            for name in known & tensors.pointers.keys():
                context.bind_input(name, tensors.pointers[name], tensors.shapes[name])
        for name, pointer in self.outputs.pointers.items():
            context.bind_output(name, pointer)
        return context

    def append(self, tokens: int, inputs: Tensors) -> None:
        """Copy the new rows of all layers into their pools."""
        args = AppendArgs.of(
            self._layers,
            slots=inputs.pointers[SLOTS.name],
            num_kv_heads=self.model.text.num_key_value_heads,
            tokens=tokens,
            num_pages=self.pages,
        )
        self.device.kernels.kv_append(args, self.device.stream)

    def _layer(self, number: int) -> AppendLayer:
        """Where a layer's new rows are and where they go."""
        new, pool = (
            Rows(**dict(zip(("key", "value", "scale"), (tensors.pointers[b.name] for b in names), strict=False)))
            for tensors, names in ((self.outputs, self._new_rows[number]), (self.pool, self.layer_inputs[number]))
        )
        key_row, value_row = self.layouts[number].row_bytes
        return AppendLayer(new_rows=new, pool=pool, key_row=key_row, value_row=value_row)


class _DecodeStep:
    """A step of one token of text of each of up to ``batch`` sequences, which see all of their past.

    What varies is written to one array in host memory, which the step copies to the device, places in the cache with
    it: the host's word counts, also after an interrupt.
    """

    def __init__(self, session: TensorRTSession, batch: int) -> None:
        self._session, self._device, self._batch = session, session.device, batch
        sizes = {**session.sizes, **_sizes_of(batch, batch), "visible_slots": 1}
        own = [b for b in session.engine.inputs[bindings.DECODER] if b.name not in session.pool.pointers]
        self._no_deepstack = StagedTensors(
            self._device, [binding for binding in own if binding.name == bindings.DEEPSTACK_EMBEDS], sizes
        )
        self._no_deepstack.upload()
        staged = [binding for binding in own if binding.name != bindings.DEEPSTACK_EMBEDS]
        self._inputs = StagedTensors(self._device, [*staged, SLOTS], sizes)
        self._inputs.arrays[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
        self._inputs.arrays[SLOTS.name][:] = -1
        self._decode = session.context(profiles.DECODE, self._inputs, self._no_deepstack)
        self._choice = StagedTensors(self._device, _CHOICE, sizes)
        self._start()  # what is set up on first use cannot be recorded
        self._device.synchronize()
        self._replay = self._device.capture(self._start)

    @property
    def is_graph(self) -> bool:
        """Whether it is one CUDA graph."""
        return self._replay is not None

    def run(self, sequences: Sequence[NewTokens]) -> None:
        """Run up to as many sequences, and wait."""
        self._session.fill(self._inputs.arrays, sequences)
        (self._replay or self._start)()
        self._device.synchronize()

    @property
    def likeliest(self) -> list[tuple[int, float]]:
        """Of each sequence the likeliest token, and its logit."""
        tokens, logits = (self._choice.arrays[name].tolist() for name in ("token", "logit"))
        return list(zip(tokens, logits, strict=True))

    def _start(self) -> None:
        """From the staged inputs to the likeliest next tokens on the host, without waiting for the device."""
        session = self._session
        self._inputs.upload()
        self._decode.execute()
        session.append(self._batch, self._inputs)
        self._device.kernels.greedy(
            session.outputs.pointers[bindings.LOGITS],
            self._batch,
            session.model.text.vocab_size,
            self._choice.pointers["token"],
            self._choice.pointers["logit"],
            self._device.stream,
        )
        self._choice.download()


def _sizes_of(tokens: int, batch: int) -> dict[str, int]:
    """Dimensions of a step of so many tokens of so many sequences."""
    return {"tokens": tokens, "batch": batch, "batch_plus_1": batch + 1, "rows": batch}


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
