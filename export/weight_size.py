"""The bytes of a model's weights, by their format, and the format that there is room for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.export.checkpoint import HOST_TABLES, Checkpoint, meta_model, model_config
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.weight_format import WeightConfig

_EVERY_FORMAT = ("f32", "f16", "w8", "w4")
"""The most exact first."""


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory that weights and cache are to fit into.

    Attributes:
        name: whose it is, for a person.
        nbytes: all of it.
        besides: what is needed of it for other things.
        copies: how many times weights are there at once.
        formats: of weights, the most exact first.
    """

    name: str
    nbytes: int
    besides: int
    copies: int = 1
    formats: tuple[str, ...] = _EVERY_FORMAT


def room_of_card(name: str, nbytes: int) -> Room:
    """A card needs some 0.3 GB for CUDA and TensorRT's libraries, and up to 0.5 GB for intermediate results."""
    return Room(name, nbytes, besides=800_000_000)


def room_of_machine(nbytes: int) -> Room:
    """ONNX Runtime computes 16 bits in 32, and packs weights for its kernels beside those that it read."""
    return Room("this machine", nbytes, besides=2_000_000_000, copies=2, formats=("f32", "w8", "w4"))


@dataclasses.dataclass(frozen=True)
class Fitting:
    """What `fitting_weights` chose.

    Attributes:
        weights: None where the checkpoint is in codes, which stay.
        reason: why, for a person.
    """

    weights: WeightConfig | None
    reason: str


def fitting_weights(directory: Path, room: Room, cache: CacheConfig, context: int) -> Fitting:
    """The most exact weights of the checkpoint in ``directory`` for which there is room, beside the cache of a
    conversation of ``context`` tokens.

    Raises:
        UserError: there is no room for any; or the checkpoint cannot be read.
    """
    with Checkpoint(directory) as checkpoint:
        if checkpoint.codes is not None:
            return Fitting(None, "the checkpoint's own codes of 4 bits")
        return _fitting(checkpoint.meta_model, checkpoint.model_config(), room, cache, context)


def fitting_weights_of_config(config: Qwen3VLConfig, room: Room, cache: CacheConfig, context: int) -> Fitting:
    """The same, before there are any weights."""
    return _fitting(lambda: meta_model(config), model_config(config), room, cache, context)


def _fitting(
    new_model: Callable[[], Qwen3VLForConditionalGeneration],
    config: ModelConfig,
    room: Room,
    cache: CacheConfig,
    context: int,
) -> Fitting:
    text = config.text
    besides = cache.nbytes(text, min(context, text.max_position_embeddings)) + room.besides
    size = 0
    for name in room.formats:
        weights = WeightConfig.parse(name)
        size = _nbytes(new_model(), config, weights) * room.copies
        if size + besides <= room.nbytes:
            told = f"{size / 1e9:.1f} GB of weights and {besides / 1e9:.1f} GB besides"
            return Fitting(
                weights, f"{name}, the most exact format for {room.name} ({room.nbytes / 1e9:.1f} GB): {told}"
            )
    raise UserError(
        f"{room.name} has {room.nbytes / 1e9:.1f} GB of memory, and even in 4 bits this model takes "
        f"{size / 1e9:.1f} GB of weights, and {besides / 1e9:.1f} GB besides: use one with more, or a smaller model."
    )


def weight_bytes(checkpoint: Checkpoint, weights: WeightConfig) -> int:
    """Bytes of both graphs' weights in these formats."""
    return _nbytes(checkpoint.meta_model(), checkpoint.model_config(), weights)


def weight_bytes_of_config(config: Qwen3VLConfig, weights: WeightConfig) -> int:
    """The same, before there are any weights."""
    return _nbytes(meta_model(config), model_config(config), weights)


def _nbytes(model: Qwen3VLForConditionalGeneration, config: ModelConfig, weights: WeightConfig) -> int:
    """Bytes of the parameters of both graphs; takes the model to pieces."""
    modules = VisionEncoder(model, weights.vision), Decoder(model, config.text, weights)
    named = {name: p for module in modules for name, p in module.named_parameters()}
    on_host = [name.removeprefix("model.") for name in HOST_TABLES]
    return sum(parameter.nbytes for name, parameter in named.items() if name not in on_host)
