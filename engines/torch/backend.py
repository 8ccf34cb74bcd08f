"""The reference backend: the very PyTorch modules that are exported, with the external cache and the CUDA kernels.

On a CUDA device for real, with steps as CUDA graphs; without one on the CPU, where the emulator runs the kernels:
right, and slow. Weights are mapped from the bundle, which holds them as the model bundle does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Qwen3VLConfig

from pascalvl.engines.choice import Choice
from pascalvl.engines.device.choices import CHOICES, ChoiceRecords
from pascalvl.engines.device.padding import LENGTHS, StepShape
from pascalvl.engines.engine import SLOTS, Engine, Features, NewTokens, Session
from pascalvl.engines.torch.steps import CapturedStep, PlacedVisuals
from pascalvl.export.checkpoint import HOST_TABLES, meta_model, read_config
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import CHECKPOINT_CONFIG, Manifest, read_json
from pascalvl.plugins.errors import UserError, reading
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kernels.library import CHOICE
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear

log = logging.getLogger(__name__)

NAME = "torch"
_GRAPHS = (bindings.VISION, bindings.DECODER)
_DATA = {graph: f"{graph}.onnx.data" for graph in _GRAPHS}
_WEIGHTS = "weights.json"
"""By graph and name: where in the graph's data a weight starts, its type and shape."""
FILES = (CHECKPOINT_CONFIG, _WEIGHTS, *_DATA.values())
_ALIGNMENT = 256
_COPIES = ("Memcpy", "Memset")
"""What the profiler's names begin with of what is no kernel."""


class TorchEngine(Engine):
    """Both modules, on the device that there is."""

    def __init__(self, directory: Path, manifest: Manifest, marked_layers: bool) -> None:
        super().__init__(directory, manifest)
        self.device = _device()
        self.marked_layers = marked_layers
        self.gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        self.kernels = torch_calls.library(self.device)
        torch.set_float32_matmul_precision("highest")  # no TF32: the reference is exact
        try:
            with evaluation("the model's weights"):
                self._modules = _load(directory, manifest, self.device)
                self.kernels.load()
        except MemoryError as error:
            size = sum(manifest.files[name]["bytes"] for name in _DATA.values())
            raise UserError(
                f"the weights of {directory} take {size / 1e9:.1f} GB, more than is free on {self.device}: free some, "
                "or choose another --backend."
            ) from error
        self._positions: tuple[np.ndarray, torch.Tensor] | None = None
        """The last call's `bindings.POSITION_EMBEDS`, on the host and on the device."""
        layers = range(manifest.model.text.num_hidden_layers)
        self._layouts = manifest.kv_cache.layers(manifest.model.text)
        self._cache_names = [
            [binding.name for binding in bindings.cache_inputs(manifest.model, manifest.kv_cache, layer)]
            for layer in layers
        ]
        self._output_names = {
            bindings.VISION: [binding.name for binding in bindings.vision_outputs(manifest.model)],
            bindings.DECODER: [
                *(binding.name for binding in bindings.decoder_outputs(manifest.model, manifest.kv_cache)),
                *(bindings.hidden_states(layer) for layer in layers if marked_layers),
            ],
        }

    def forward(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`run` on tensors, where they are."""
        given: dict[str, Any] = dict(inputs)
        if graph == bindings.DECODER:
            given["caches"] = [
                {"kv_format": layout.kv_format.value, **{name.rpartition(".")[0]: given.pop(name) for name in names}}
                for layout, names in zip(self._layouts, self._cache_names, strict=True)
            ]
        outputs = self._modules[graph](**given)
        return dict(zip(self._output_names[graph], outputs, strict=False))  # the last, if any, are not asked for

    def tensors(self, feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Inputs on the device."""
        return {name: torch.from_numpy(array).to(self.device) for name, array in feeds.items()}

    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with evaluation(f"the {graph} engine"):
            outputs = self.forward(graph, self.tensors(feeds))
            return {name: output.numpy(force=True) for name, output in outputs.items()}

    def encode(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> Features:
        """As the base class; features stay on the device."""
        with evaluation(f"the {bindings.VISION} engine"):
            outputs = [self.forward(bindings.VISION, self._vision_inputs(feed)) for feed in feeds]
            embeds = torch.cat([output[bindings.IMAGE_EMBEDS] for output in outputs])
            levels = torch.cat([output[bindings.DEEPSTACK_EMBEDS] for output in outputs], 1)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            return Features(embeds, levels)

    def _vision_inputs(self, feeds: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Feeds on the device, where the last call's positions are already: pictures are often of one size, and a
        video's patches in time are."""
        rest = dict(feeds)
        positions = rest.pop(bindings.POSITION_EMBEDS)
        if self._positions is None or positions is not self._positions[0]:
            self._positions = positions, torch.from_numpy(positions).to(self.device)
        return {**self.tensors(rest), bindings.POSITION_EMBEDS: self._positions[1]}

    def on_host(self, features: Features) -> Features:
        return Features(features.embeds.numpy(force=True), features.levels.numpy(force=True))

    def _new_session(self, sequence_pages: int, pages: int) -> Session:
        return TorchSession(self, sequence_pages, pages)


class TorchSession(Session):
    """The pool as a tensor on the engine's device; on CUDA, steps are CUDA graphs.

    A step is padded to the next of a few numbers of sequences and of tokens, each of which is captured when it first
    runs.
    """

    def __init__(self, engine: TorchEngine, sequence_pages: int, pages: int) -> None:
        super().__init__(engine, sequence_pages, pages)
        self._engine = engine
        with evaluation("the KV cache"):
            nbytes = [math.prod(self.shape_of(b)) * b.dtype.itemsize for b in self.stored]
            aligned = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in nbytes]
            self._storage = torch.zeros(sum(aligned), dtype=torch.uint8, device=engine.device)
            self._pool = {
                b.name: part[:size].view(getattr(torch, b.dtype.name)).view(self.shape_of(b))
                for b, part, size in zip(self.stored, self._storage.split(aligned), nbytes, strict=True)
            }
            self._records = ChoiceRecords(self._copy, _Copy.put)
            self._steps: dict[StepShape, CapturedStep] = {}
            self.decode_step = self._new_step(StepShape(1, 1, 0))
            if engine.device.type == "cuda":
                self.decode_step.run()  # records it, before there is anything to store

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    def step(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        with evaluation("the decoder engine"):
            if step := self._run_captured(sequences):
                there = dict.fromkeys(step.outputs, sum(map(len, sequences))) | {bindings.LOGITS: len(sequences)}
                outputs = {name: output[: there[name]] for name, output in step.outputs.items()}
            else:
                outputs = self._run_as_it_is(sequences)
            return {name: output.numpy(force=True) for name, output in outputs.items()}

    def choose(
        self, sequences: Sequence[NewTokens], choices: Sequence[Choice] | None = None
    ) -> list[tuple[int, float]]:
        choices = choices or [Choice()] * sum(len(new.logit_rows) for new in sequences)
        with evaluation("the decoder engine"):
            if step := self._run_captured(sequences, choices):
                self._chosen_from = step.outputs[bindings.LOGITS][: len(sequences)]
                return step.chosen[: len(sequences)]
            logits = self._chosen_from = self._run_as_it_is(sequences)[bindings.LOGITS]
            records = np.zeros(len(logits), CHOICE)
            self._records.fill(records, choices)
            given = torch.from_numpy(records.view(np.int32).reshape(len(logits), -1)).to(logits.device)
            token = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
            logit = torch.empty(len(logits), device=logits.device)
            torch_calls.choose(self._engine.kernels, logits, given, token, logit)
            return list(zip(token.tolist(), logit.tolist(), strict=True))

    def logits(self) -> np.ndarray:
        return self._chosen_from.numpy(force=True)

    def _run_captured(self, sequences: Sequence[NewTokens], choices: Sequence[Choice] = ()) -> CapturedStep | None:
        """Run a step that is captured, or on the CPU one for a single token; None: this is none of them."""
        shape = StepShape.padded(sequences, LENGTHS, self.model.num_deepstack)
        is_one = len(sequences) == 1 and sequences[0].is_decode
        if shape is None or not (self.decode_step.graph or is_one):
            return None
        step = self._steps.get(shape) or self._new_step(shape)
        self.fill(step.host, sequences)
        self._records.fill(step.host[CHOICES.name], choices)
        step.place(self.visuals_of(sequences))
        step.run()
        return step

    def _run_as_it_is(self, sequences: Sequence[NewTokens]) -> dict[str, torch.Tensor]:
        inputs, visuals = self._engine.tensors(self.inputs(sequences)), self.visuals_of(sequences)
        levels = self.model.num_deepstack if visuals else 0
        tokens = len(inputs[bindings.INPUTS_EMBEDS])
        placed = PlacedVisuals(self.model.text, self._engine.device, tokens, levels)
        placed.place(visuals)
        return self._run({**inputs, **placed.inputs(inputs[bindings.INPUTS_EMBEDS])})

    def _new_step(self, shape: StepShape) -> CapturedStep:
        visuals = ", visuals among them" if shape.levels else ""
        step = self._steps[shape] = CapturedStep(
            f"a step of {shape.tokens} tokens of {shape.batch} sequences{visuals}",
            self._run,
            self._engine.kernels,
            self.model.text,
            self._engine.device,
            shape,
            self.sequence_pages,
            self._graph_memory,
        )
        return step

    def _graph_memory(self) -> Any:
        """Memory in which all steps' graphs are made, once there is one."""
        graphs = (step.graph for step in self._steps.values())
        return next((graph.pool() for graph in graphs if graph), None)

    def decode_launches(self) -> int | None:
        if self._engine.device.type != "cuda":
            return None
        self.decode_step.store_nothing()
        with evaluation("the decoder engine"):
            for _ in range(2):  # the first may miss some, while the profiler starts
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
                    self.decode_step.run()
        on_device = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not name.startswith(_COPIES) for name in on_device) or None

    def _read(self, binding: bindings.Binding, pages: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self._pool[binding.name][self._on_device(pages)].numpy(force=True)

    def _write(self, binding: bindings.Binding, pages: np.ndarray, array: np.ndarray) -> None:
        with torch.inference_mode():
            self._pool[binding.name][self._on_device(pages)] = torch.from_numpy(array).to(self._engine.device)

    def copy_page(self, page: int, to: int) -> None:
        with torch.inference_mode():
            for tensor in self._pool.values():
                tensor[to].copy_(tensor[page])

    def _copy(self, array: np.ndarray) -> _Copy:
        return _Copy(torch.from_numpy(array.view(np.int32)).to(self._engine.device, copy=True))

    def _on_device(self, pages: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(pages).to(self._engine.device, torch.int64)

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run the decoder and append; returns its other outputs."""
        inputs = dict(inputs)
        slots = inputs.pop(SLOTS.name)
        outputs = self._engine.forward(bindings.DECODER, {**inputs, **self._pool})
        new, pools = [], []
        for layer, inputs_of_layer in enumerate(self.layer_inputs):
            rows = bindings.new_rows(self.model, self.cache, layer)
            # Of floats, there are no scales.
            key, value, *scale = (outputs.pop(binding.name) for binding in rows)
            new.append((key, value, scale[0] if scale else None))
            key, value, *scale = (self._pool[binding.name] for binding in inputs_of_layer)
            pools.append((key, value, scale[0] if scale else None))
        torch_calls.kv_append(self._engine.kernels, self.layouts, new, pools, slots)
        return outputs


class _Copy:
    """A copy of an array on the device, in words."""

    def __init__(self, words: torch.Tensor) -> None:
        self._words = words
        self.pointer = words.data_ptr()

    def put(self, start: int, array: np.ndarray) -> None:
        """Write an array into it, from a byte on."""
        words = torch.from_numpy(array.view(np.int32))
        self._words[start // 4 : start // 4 + len(words)] = words.to(self._words.device)


def build(model_bundle: Path, directory: Path, manifest: Manifest, cache: CacheConfig) -> dict[str, str]:
    """Copy the weights into ``directory`` and note where they are, load them once; returns the manifest's description.

    The modules take any cache: the manifest's.
    """
    import onnx

    from pascalvl.engines import graphs

    weights = {}
    for graph, data in _DATA.items():
        path = model_bundle / f"{graph}.onnx"
        with graphs.reading(path, manifest.remedy):
            proto = onnx.load(path, load_external_data=False)
            weights[graph] = {
                tensor.doc_string: {
                    "offset": next(int(entry.value) for entry in tensor.external_data if entry.key == "offset"),
                    "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name,
                    "shape": list(tensor.dims),
                }
                for tensor in proto.graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL
            }
        shutil.copyfile(model_bundle / data, directory / data)
    shutil.copyfile(model_bundle / CHECKPOINT_CONFIG, directory / CHECKPOINT_CONFIG)
    with graphs.reading(model_bundle, manifest.remedy):  # names may be no text
        places = json.dumps(weights, indent=1) + "\n"
    (directory / _WEIGHTS).write_text(places, encoding="utf-8")
    _load(directory, manifest, torch.device("cpu"))
    return {"name": NAME, "version": torch.__version__}


def open_engine(directory: Path, manifest: Manifest, marked_layers: bool) -> TorchEngine:
    """See `pascalvl.engines.open_engine`."""
    return TorchEngine(directory, manifest, marked_layers)


@contextlib.contextmanager
def evaluation(what: str) -> Iterator[None]:
    """Inside, modules run without autograd and with the kernels; `MemoryError` says ``what`` found no room."""
    try:
        with torch.inference_mode(), torch_calls.emulated():
            yield
    except RuntimeError as error:
        if "out of memory" in str(error) or "can't allocate memory" in str(error):
            raise MemoryError(what) from error
        raise


def _device() -> torch.device:
    """CUDA's current device if there is one, else the CPU."""
    if not torch.cuda.is_available():
        log.info("device cpu, the kernels in their emulator: PyTorch %s finds no CUDA device", torch.__version__)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # made for other cards, or another program has all of its memory
        raise UserError(
            f"PyTorch {torch.__version__} cannot use {name} ({str(error).splitlines()[0]}): install one made for "
            "it, end what else uses it, or hide it with CUDA_VISIBLE_DEVICES= to use the CPU."
        ) from error
    log.info("device %s: %s", device, name)
    return device


def _load(directory: Path, manifest: Manifest, device: torch.device) -> dict[str, nn.Module]:
    """The modules by graph, their weights mapped from the bundle and, one by one, copied to a GPU."""
    remedy = manifest.remedy
    with reading(directory / CHECKPOINT_CONFIG, remedy):
        config = read_config(read_json(directory / CHECKPOINT_CONFIG, remedy))
        _check(directory, manifest, config)
        model = meta_model(config)
        modules = {
            bindings.VISION: VisionEncoder(model, manifest.weights.vision),
            bindings.DECODER: Decoder(model, manifest.model.text, manifest.weights),
        }
    weights = {}
    with reading(directory / _WEIGHTS, remedy):
        for graph, places in read_json(directory / _WEIGHTS, remedy).items():
            for name, place in places.items():
                # Copy on write: PyTorch knows no tensors that cannot be written. None is.
                array = np.memmap(directory / _DATA[graph], place["dtype"], "c", place["offset"], tuple(place["shape"]))
                if (layer := name.removesuffix(".zero")) != name:
                    cast(QuantLinear, model.get_submodule(layer)).add_zero()
                weights[name] = torch.from_numpy(array.reshape(model.get_parameter(name).shape)).to(device)
    model.load_state_dict(weights, strict=False, assign=True)
    if missing := [n for n, p in model.named_parameters() if p.is_meta and n not in HOST_TABLES]:
        raise UserError(f"{directory} lacks the weight {missing[0]}: {remedy}.")
    return {graph: module.eval() for graph, module in modules.items()}


def _check(directory: Path, manifest: Manifest, config: Qwen3VLConfig) -> None:
    """Compare the config with the manifest's model, so that mixed-up files fail here and not in a run."""
    for found, expected in (
        (config.text_config, manifest.model.text),
        (config.vision_config, manifest.model.vision),
    ):
        for field in dataclasses.fields(expected):
            value = getattr(found, field.name, getattr(expected, field.name))  # what is derived is not in the config
            value = tuple(value) if isinstance(value, list) else value
            if value != getattr(expected, field.name):
                raise UserError(
                    f"{directory / CHECKPOINT_CONFIG} is for another model: expected {field.name} "
                    f"{getattr(expected, field.name)}, found {value}; {manifest.remedy}."
                )
