"""Model bundles of the published sizes with random weights, for timings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
from transformers import Qwen3VLConfig

from pascalvl.export import conformance, published_sizes, random_weights
from pascalvl.export.checkpoint import TOKEN_IDS, Checkpoint, meta_model, model_config
from pascalvl.export.exporter import describe, trace_decoder, trace_vision, write_without_weights
from pascalvl.export.transforms import check_rank
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import (
    CHECKPOINT_CONFIG,
    EMBEDDINGS,
    GENERATION_CONFIG,
    IMAGE_PROCESSOR,
    POSITIONS,
    Manifest,
    atomic_directory,
    read_json,
    table_shapes,
)
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig, KVFormat
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.terminal import progress_bars
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

_CACHE = CacheConfig(KVFormat.F32)
"""Of the decoder that is traced; builds change it."""


def export_random(
    size: str,
    host_files: Path,
    output: Path,
    check_host_files: Callable[[Path, ModelConfig], None] = lambda *_: None,
    cache: CacheConfig = _CACHE,
    weights: WeightConfig = FLOAT_WEIGHTS,
    layers: int | None = None,
) -> Manifest:
    """Write a model bundle of a published size to ``output``, its weights random; returns its manifest.

    Graphs are those of `export_checkpoint`; weights are drawn as `pascalvl.export.random_weights` says, block by block.
    Tokens are chosen, and pictures resized, as the Instruct models' authors set.

    Args:
        size: one of `published_sizes.SIZES`.
        host_files: checkpoint whose tokenizer and processors the bundle gets.
        output, check_host_files, weights: as of `export_checkpoint`.
        cache: its `value_rank` is what values get; it must be a number.
        layers: of the decoder; None: as published.

    Raises:
        UserError: an unknown size, no such number of layers, a rank that the weights would have to tell, a checkpoint
            that cannot be used, or a full disk.
    """
    hf_config = _hf_config(size, layers)
    with Checkpoint(host_files) as checkpoint, progress_bars() as progress:
        for name in TOKEN_IDS:
            setattr(hf_config, name, getattr(checkpoint.hf_config, name))
        config = _with_rank(model_config(hf_config), cache)
        model = meta_model(hf_config)
        with atomic_directory(output, "model") as directory:
            checkpoint.copy_host_files(directory)
            (directory / CHECKPOINT_CONFIG).write_text(hf_config.to_json_string(), encoding="utf-8")
            _set(directory / GENERATION_CONFIG, published_sizes.SAMPLING)
            _set(directory / IMAGE_PROCESSOR, published_sizes.PICTURES)
            with checkpoint.host_files.errors_name_sources(directory):
                check_host_files(directory, config)
            graphs = {}
            for name, trace_graph in ((bindings.VISION, trace_vision), (bindings.DECODER, trace_decoder)):
                task = progress.add_task(f"tracing {name}", total=None)
                graph = trace_graph(model, config, weights)
                conformance.check(graph.proto, name)
                write_without_weights(graph, directory / f"{name}.onnx")
                graphs[name] = describe(graph.proto)
                progress.update(task, visible=False)
            progress.add_task("drawing and hashing weights", total=None)
            random_weights.write_weights(directory, config)
            for name in graphs:
                onnx.checker.check_model(str(directory / f"{name}.onnx"))
            tables = {name: {"dtype": "bfloat16", "shape": shape} for name, shape in table_shapes(config).items()}
            return Manifest(
                kind="model",
                source={
                    "name": f"Qwen3-VL-{size}, {random_weights.SOURCE}",
                    "sha256": hashlib.sha256((directory / CHECKPOINT_CONFIG).read_bytes()).hexdigest(),
                },
                model=config,
                embeddings=tables[EMBEDDINGS],
                position_embeddings=tables[POSITIONS],
                graphs=graphs,
                kv_cache=dataclasses.replace(_CACHE, value_rank=cache.value_rank),
                weights=weights,
            ).write(directory)


def _hf_config(size: str, layers: int | None) -> Qwen3VLConfig:
    if size not in published_sizes.SIZES:
        raise UserError(f"unknown size {size!r}: expected one of {', '.join(published_sizes.SIZES)}.")
    published = published_sizes.SIZES[size][0]["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= published:
        raise UserError(f"{layers} layers are out of range: expected 1 to {published} for Qwen3-VL-{size}.")
    return published_sizes.config(size, {"num_hidden_layers": published if layers is None else layers})


def _with_rank(config: ModelConfig, cache: CacheConfig) -> ModelConfig:
    """The model with values as long as the cache's rank."""
    check_rank(cache, config.text)
    rank = cache.value_rank
    if rank is None:
        return config
    if isinstance(rank, float):
        raise UserError(f"random weights tell no rank for an error of {rank}: give rv as a number.")
    value_dims = (rank,) * config.text.num_hidden_layers
    return dataclasses.replace(config, text=dataclasses.replace(config.text, value_dims=value_dims))


def _set(path: Path, fields: Mapping[str, object]) -> None:
    data = {**read_json(path, "choose another checkpoint"), **fields}
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
