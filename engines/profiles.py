"""The ranges of sizes that the engines are built for: optimisation profiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig

PREFILL, DECODE = 0, 1
"""Profiles of the decoder: a chunk of a prompt, and exactly one token."""

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
    """Tokens of the cache."""


def profiles(graph: str, model: ModelConfig, cache: CacheConfig, limits: Limits) -> list[Shapes]:
    """A graph's profiles. The runtime runs one sequence, and one picture at a time."""
    merged = model.vision.spatial_merge_size**2
    one = 1, 1, 1
    sizes = {
        "batch": one,
        bindings.CAPACITY: (1, min(_USUAL_CONTEXT, limits.max_context), limits.max_context),
        "patches": (merged, max(limits.max_patches // 4 // merged * merged, merged), limits.max_patches),
        "segments_plus_1": (2, 2, 2),
        "rows": one,
    }
    if graph == bindings.VISION:
        return [_shapes(bindings.vision_inputs(model), sizes)]
    inputs, chunk = bindings.decoder_inputs(model, cache), limits.prefill_chunk
    prefill = {**sizes, "seq": (1, chunk, chunk), "visible_slots": (1, 1, limits.max_context)}
    return [_shapes(inputs, prefill), _shapes(inputs, {**sizes, "seq": one, "visible_slots": one})]


def _shapes(inputs: list[bindings.Binding], sizes: Mapping[str, tuple[int, int, int]]) -> Shapes:
    def shape(binding: bindings.Binding, which: int) -> tuple[int, ...]:
        return tuple(sizes[size][which] if isinstance(size, str) else size for size in binding.shape)

    return {binding.name: (shape(binding, 0), shape(binding, 1), shape(binding, 2)) for binding in inputs}
