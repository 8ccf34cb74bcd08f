"""The bytes of a model's weights on a card, by their format, and the format that a card has room for."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pascalvl.export.checkpoint import HOST_TABLES, Checkpoint
from pascalvl.export.modules import Decoder, VisionEncoder
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig

_CANDIDATES = ("f32", "f16", "w8", "w4")
"""The most exact first."""
_WORKING_MEMORY = 800_000_000
"""Bytes that a card needs besides: CUDA and TensorRT's libraries some 0.3 GB, intermediate results up to 0.5 GB."""


@dataclasses.dataclass(frozen=True)
class Fitting:
    """What `fitting_weights` chose.

    Attributes:
        weights: None where the checkpoint is in codes, which stay.
        reason: why, for a person.
    """

    weights: WeightConfig | None
    reason: str


def fitting_weights(directory: Path, card: str, memory: int, cache: CacheConfig, context: int) -> Fitting:
    """The most exact weights of the checkpoint in ``directory`` for which a card has room, beside the cache of a
    conversation of ``context`` tokens.

    Args:
        card: its name, for a person.
        memory: its bytes.

    Raises:
        UserError: there is no room for any; or the checkpoint cannot be read.
    """
    with Checkpoint(directory) as checkpoint:
        if checkpoint.codes is not None:
            return Fitting(None, "the checkpoint's own codes of 4 bits")
        text = checkpoint.model_config().text
        besides = cache.nbytes(text, min(context, text.max_position_embeddings)) + _WORKING_MEMORY
        sizes = {}
        for name in _CANDIDATES:
            weights = WeightConfig.parse(name)
            sizes[name] = weight_bytes(checkpoint, weights)
            if sizes[name] + besides <= memory:
                size = f"{sizes[name] / 1e9:.1f} GB of weights and {besides / 1e9:.1f} GB besides"
                return Fitting(weights, f"{name}, the most exact format for {card} ({memory / 1e9:.1f} GB): {size}")
    raise UserError(
        f"{card} has {memory / 1e9:.1f} GB of memory, and even in 4 bits this model takes {sizes['w4'] / 1e9:.1f} GB "
        f"of weights, and {besides / 1e9:.1f} GB besides: use a card with more, or a smaller model."
    )


def weight_bytes(checkpoint: Checkpoint, weights: WeightConfig) -> int:
    """Bytes of both graphs' weights in these formats."""
    model, text = checkpoint.meta_model(), checkpoint.model_config().text
    modules = VisionEncoder(model, weights.vision), Decoder(model, text, weights)
    named = {name: p for module in modules for name, p in module.named_parameters()}
    on_host = [name.removeprefix("model.") for name in HOST_TABLES]
    return sum(parameter.nbytes for name, parameter in named.items() if name not in on_host)
