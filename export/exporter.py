"""Checkpoint directory to model bundle."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from transformers import Qwen3VLForConditionalGeneration

from pascalvl.export import conformance
from pascalvl.export.calibration import calibrate
from pascalvl.export.checkpoint import POSITION_EMBEDDINGS, TOKEN_EMBEDDINGS, Checkpoint
from pascalvl.export.fitting import Fit, fit
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.export.quantised_weights import (
    QuantisedWeights,
    add_stored_zeros,
    check_stored,
    quant_layers,
    stored_codes,
    stored_config,
    stored_values,
)
from pascalvl.export.trace import TracedGraph, Weight, example_inputs, trace
from pascalvl.export.transforms import WeightSource, check_rank, plan_transforms
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import EMBEDDINGS, POSITIONS, Manifest, atomic_directory
from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.ops.onnx_text import OPSET
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.terminal import progress_bars
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

log = logging.getLogger(__name__)

_ALIGNMENT = 4096
"""Weights start on page boundaries, so that a runtime can map them instead of reading them."""
_CACHE = CacheConfig(KVFormat.F32)
"""Of the decoder that is traced; builds change it."""
_LAYER_WEIGHT = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
_AddZeros = Callable[[Mapping[str, QuantLinear]], None]


def export_checkpoint(
    checkpoint_directory: Path,
    output: Path,
    check_host_files: Callable[[Path, ModelConfig], None] = lambda *_: None,
    cache: CacheConfig = _CACHE,
    calibration: Callable[[Path, ModelConfig], Sequence[Prompt]] | None = None,
    weights: WeightConfig | None = None,
    source_name: str | None = None,
) -> Manifest:
    """Export a Qwen3-VL checkpoint to the model bundle ``output``; returns its manifest.

    The weights come out as `pascalvl.export.transforms` leaves them: the same function, keys and values that quantise
    better, shorter values if ``cache`` says so; quantised if ``weights`` says so, or the checkpoint is, else widened to
    float32. They are written one at a time: beside the graphs and the transforms, memory holds one tensor, or, while
    it calibrates, the model in float32.

    Args:
        checkpoint_directory: folder of the Hugging Face model.
        output: folder to write.
        check_host_files: called with a folder that holds the tokenizer's and processors' files, before the long work.
        cache: its `value_rank` is what the weights get; the rest is for builds and runs.
        calibration: called like ``check_host_files``, and after it: the prompts to take statistics from. None: the
            weights' own.
        weights: formats of linear layers' weights; None: as the checkpoint has them in codes, else float32. Codes of
            the checkpoint are kept wherever their format is asked for.
        source_name: what the manifest calls the checkpoint; None: as its folder is called.

    Raises:
        UserError: a checkpoint that cannot be used, a rank that it cannot have, prompts that are too few for a
            calibration, a graph that TensorRT 8.6 could not parse, or a full disk.
    """
    with Checkpoint(checkpoint_directory) as checkpoint, progress_bars() as progress:
        config = checkpoint.model_config()
        weights = weights or stored_config(checkpoint, config.text)
        check_stored(checkpoint, weights, config.text)
        kept_values = stored_values(checkpoint, weights, config.text)
        check_rank(cache, config.text, kept_values)
        model = checkpoint.meta_model()
        with atomic_directory(output, "model") as directory:
            checkpoint.copy_host_files(directory)
            with checkpoint.host_files.errors_name_sources(directory):
                check_host_files(directory, config)
            prompts = calibration(directory, config) if calibration else None
            done = progress.add_task("calibrating", total=config.text.num_hidden_layers, visible=prompts is not None)
            fitted = _fit(checkpoint, config, prompts, cache, weights, kept_values, lambda: progress.advance(done))
            progress.update(done, visible=False)
            source, transforms = fitted.weights(checkpoint), fitted.transforms
            text = dataclasses.replace(config.text, value_dims=tuple(t.value_dim for t in transforms))
            config = dataclasses.replace(config, text=text)
            log.info("lengths of values %s", text.value_dims)
            graphs = {}
            for name, trace_graph in ((bindings.VISION, trace_vision), (bindings.DECODER, trace_decoder)):
                task = progress.add_task(f"tracing {name}", total=None)
                graph = trace_graph(model, config, weights, functools.partial(add_stored_zeros, checkpoint))
                conformance.check(graph.proto, name)
                progress.update(task, total=len(graph.weights), description=f"writing {name}")
                layers = quant_layers(model)
                codes = stored_codes(checkpoint, layers) if checkpoint.codes else fitted.codes
                quantised = QuantisedWeights(source, layers, codes)
                for _ in write_graph(graph, quantised, directory / f"{name}.onnx"):
                    progress.advance(task)
                graphs[name] = describe(graph.proto)
                log.info("%s: %d nodes", name, len(graph.proto.graph.node))
            embeddings = _write_table(checkpoint, TOKEN_EMBEDDINGS, directory / EMBEDDINGS)
            positions = _write_table(checkpoint, POSITION_EMBEDDINGS, directory / POSITIONS)
            progress.add_task("hashing", total=None)
            manifest = Manifest(
                kind="model",
                source={"name": source_name or checkpoint_directory.resolve().name, "sha256": checkpoint.digest()},
                model=config,
                embeddings=embeddings,
                position_embeddings=positions,
                graphs=graphs,
                kv_cache=dataclasses.replace(_CACHE, value_rank=cache.value_rank),
                weights=weights,
            ).write(directory)
        fitted.discard()
        return manifest


def _fit(
    checkpoint: Checkpoint,
    config: ModelConfig,
    prompts: Sequence[Prompt] | None,
    cache: CacheConfig,
    weights: WeightConfig,
    kept_values: Collection[int],
    progress: Callable[[], None],
) -> Fit:
    """Transforms, and codes of weights in 4 bits, by what there is to go by."""
    has_codes = any(form.bits == 4 for form in weights.layers(config.text.num_hidden_layers))
    if prompts is not None and has_codes and checkpoint.codes is None:
        return fit(checkpoint, config, prompts, cache, weights, progress=progress)
    statistics = None if prompts is None else calibrate(checkpoint.directory, prompts, progress)
    return Fit(plan_transforms(checkpoint, config.text, cache, statistics, kept_values))


def trace_vision(
    model: Qwen3VLForConditionalGeneration,
    config: ModelConfig,
    weights: WeightConfig = FLOAT_WEIGHTS,
    add_zeros: _AddZeros = lambda _: None,
) -> TracedGraph:
    """Trace the vision encoder of a model on the meta device, with weights in the formats asked for.

    The model's linear layers are replaced, see `VisionEncoder`; ``add_zeros`` is called with what takes their place, to
    give zeros to those whose codes have some.
    """
    inputs = bindings.vision_inputs(config)
    per_token = config.vision.spatial_merge_size**2
    dims = {
        "patches": per_token * torch.export.Dim("tokens"),
        "segments_plus_1": torch.export.Dim("segments_plus_1"),
    }
    encoder = VisionEncoder(model, weights.vision)
    add_zeros(quant_layers(model))
    return trace(
        encoder,
        dict(
            zip(_names(inputs), example_inputs(inputs, {"patches": 6 * per_token, "segments_plus_1": 3}), strict=True)
        ),
        dict(zip(_names(inputs), _dynamic_shapes(inputs, dims), strict=True)),
        inputs,
        bindings.vision_outputs(config),
        [],
        _sources(model, {"visual": "model.visual"}),
    )


def trace_decoder(
    model: Qwen3VLForConditionalGeneration,
    config: ModelConfig,
    weights: WeightConfig = FLOAT_WEIGHTS,
    add_zeros: _AddZeros = lambda _: None,
) -> TracedGraph:
    """Trace the decoder of a model on the meta device, with the lengths of keys and values that ``config`` says, and
    weights in the formats asked for.

    The model's layers are replaced, see `Decoder`; ``add_zeros`` as for `trace_vision`.
    """
    inputs = bindings.decoder_inputs(config, _CACHE)
    sizes = {"tokens": 6, "batch": 2, "batch_plus_1": 3, "visible_slots": 7, "rows": 4}
    sizes |= {bindings.PAGES: 8, bindings.SEQUENCE_PAGES: 5}
    dims = {name: torch.export.Dim(name) for name in sizes}
    cache_start = len(inputs) - 2 * config.text.num_hidden_layers

    def arguments(values: Sequence[Any]) -> dict[str, Any]:
        pairs = zip(values[cache_start::2], values[cache_start + 1 :: 2], strict=True)
        caches = [{"past_key": key, "past_value": value} for key, value in pairs]
        return {**dict(zip(_names(inputs[:cache_start]), values, strict=False)), "caches": caches}

    decoder = Decoder(model, config.text, weights)
    add_zeros(quant_layers(model))
    return trace(
        decoder,
        arguments(example_inputs(inputs, sizes)),
        arguments(_dynamic_shapes(inputs, dims)),
        inputs,
        bindings.decoder_outputs(config, _CACHE),
        [bindings.hidden_states(layer) for layer in range(config.text.num_hidden_layers)],
        _sources(model, {"language_model": "model.language_model", "lm_head": "lm_head"}),
    )


def _names(inputs: list[bindings.Binding]) -> list[str]:
    return [binding.name for binding in inputs]


def _dynamic_shapes(inputs: list[bindings.Binding], dims: Mapping[str, object]) -> list[dict[int, object]]:
    return [{axis: dims[d] for axis, d in enumerate(b.shape) if isinstance(d, str)} for b in inputs]


def _sources(model: Qwen3VLForConditionalGeneration, prefixes: dict[str, str]) -> dict[str, str]:
    """Checkpoint tensors of the parameters of an exported module, whose submodules ``prefixes`` rename."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{inner}.{name}": name_of[id(parameter)]
        for inner, outer in prefixes.items()
        for name, parameter in model.get_submodule(outer).named_parameters()
    }


def write_graph(graph: TracedGraph, weights: WeightSource, path: Path) -> Iterator[str]:
    """Write a graph and, to ``path.data`` beside it, its weights; yields after each weight."""
    places = write_without_weights(graph, path)
    with _data_path(path).open("wb") as data:
        for (name, weight), offset in zip(graph.weights.items(), places, strict=True):
            data.write(bytes(offset - data.tell()))
            data.write(_weight_array(weights, weight).data)  # tofile would hide a full disk
            yield name
    onnx.checker.check_model(str(path))


def write_without_weights(graph: TracedGraph, path: Path) -> list[int]:
    """Write a graph whose weights are to be in ``path.data`` beside it; returns where there each begins."""
    proto, places, end = graph.proto, [], 0
    others = [value for value in proto.graph.input if value.name not in graph.weights]
    del proto.graph.input[:]
    proto.graph.input.extend(others)
    for name, weight in graph.weights.items():
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        nbytes = math.prod(weight.shape) * weight.dtype.itemsize
        external = onnx.TensorProto(
            name=name,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(weight.dtype),
            dims=weight.shape,
            data_location=onnx.TensorProto.EXTERNAL,
            doc_string=weight.source,
        )
        for key, value in (("location", _data_path(path).name), ("offset", offset), ("length", nbytes)):
            external.external_data.add(key=key, value=str(value))
        proto.graph.initializer.append(external)
        places.append(offset)
        end = offset + nbytes
    path.write_bytes(proto.SerializeToString())
    return places


def _data_path(graph: Path) -> Path:
    """Of a graph's weights."""
    return graph.with_name(f"{graph.name}.data")


def _weight_array(weights: WeightSource, weight: Weight) -> np.ndarray:
    tensor = weights.tensor(weight.source)
    if weight.dtype == np.float32:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


def _write_table(checkpoint: Checkpoint, name: str, path: Path) -> dict[str, object]:
    """Write a tensor as it is in the checkpoint, rows on end; returns its type and shape."""
    table = checkpoint.tensor(name).contiguous()
    path.write_bytes(table.view(torch.uint8).numpy().data)
    return {"dtype": str(table.dtype).removeprefix("torch."), "shape": list(table.shape)}


def describe(proto: onnx.ModelProto) -> dict[str, object]:
    """What a manifest says of a graph."""
    return {
        "opset": OPSET,
        "ir_version": proto.ir_version,
        "plugin": f"{OP_NAME} {OP_VERSION}",
        "ops": dict(sorted(Counter(node.op_type for node in proto.graph.node).items())),
        "layer_ops": dict(sorted(_layer_ops(proto).items())),
    }


def _layer_ops(proto: onnx.ModelProto) -> Counter[str]:
    """How many nodes of each operator all layers have; a layer is what follows its first weight."""
    weights = {value.name for values in (proto.graph.input, proto.graph.initializer) for value in values}
    layers: dict[str | None, Counter[str]] = {}
    current = None
    for node in proto.graph.node:
        if read := [name for name in node.input if name in weights and "." in name]:
            layer = _LAYER_WEIGHT.search(read[0])
            current = layer and layer[1]
        layers.setdefault(current, Counter())[node.op_type] += 1
    layers.pop(None, None)
    return functools.reduce(operator.and_, layers.values())
