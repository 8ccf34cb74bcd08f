"""The ranges of sizes that the engines are built for: optimisation profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pascalvl.engines.device.padding import BATCHES
from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.model_config import ModelConfig

PREFILL, DECODE = 0, 1
"""Profiles of the decoder: chunks of prompts, and a token of each sequence."""

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Of each input the smallest, the usual and the largest shape of a profile."""
_USUAL_CONTEXT = 4096


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine takes at most."""

    prefill_chunk: int
    """Tokens of a prompt at a time."""
    max_patches: int
    """Patches of a picture."""
    max_context: int
    """Tokens of a sequence."""


def profiles(graph: str, model: ModelConfig, cache: CacheConfig, limits: Limits) -> list[Shapes]:
    """A graph's profiles. The runtime runs up to `BATCHES`' last sequences, and one picture at a time."""
    if graph == bindings.VISION:
        merged = model.vision.spatial_merge_size**2
        patches = merged, max(limits.max_patches // 4 // merged * merged, merged), limits.max_patches
        return [_shapes(bindings.vision_inputs(model), {"patches": patches, "segments_plus_1": (2, 2, 2)})]
    most, chunk, pages = BATCHES[-1], limits.prefill_chunk, pages_of(limits.max_context)
    usual = pages_of(min(_USUAL_CONTEXT, limits.max_context))
    decode = {
        "tokens": (1, 1, most),
        "batch": (1, 1, most),
        "batch_plus_1": (2, 2, most + 1),
        "rows": (1, 1, most),
        "visible_slots": (1, 1, 1),
        bindings.SEQUENCE_PAGES: (1, usual, pages),
        bindings.PAGES: (1, usual, most * pages),
    }
    prefill = {**decode, "tokens": (1, chunk, chunk), "visible_slots": (1, 1, pages * PAGE_SLOTS)}
    inputs = bindings.decoder_inputs(model, cache)
    return [_shapes(inputs, prefill), _shapes(inputs, decode)]


def _shapes(inputs: list[bindings.Binding], sizes: Mapping[str, tuple[int, int, int]]) -> Shapes:
    def shape(binding: bindings.Binding, which: int) -> tuple[int, ...]:
        return tuple(sizes[size][which] if isinstance(size, str) else size for size in binding.shape)

    return {binding.name: (shape(binding, 0), shape(binding, 1), shape(binding, 2)) for binding in inputs}
