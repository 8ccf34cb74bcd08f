"""The ranges of sizes that the engines are built for: optimisation profiles."""

from __future__ import annotations

import dataclasses

from pascalvl.plugins import bindings
from pascalvl.plugins.model_config import ModelConfig

PREFILL, DECODE = 0, 1
"""Profiles of the decoder: a chunk of a prompt, and exactly one token."""

Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Shapes of an input: the smallest, the one to be fastest, the largest."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What an engine takes at most."""

    prefill_chunk: int
    """Tokens of a prompt at a time."""
    max_patches: int
    """Patches of a picture."""


def profiles(graph: str, inputs: list[bindings.Binding], model: ModelConfig, limits: Limits) -> list[dict[str, Range]]:
    """By input, for each of a graph's profiles. The runtime runs one sequence, and one picture at a time."""
    longest = model.text.max_position_embeddings
    merged = model.vision.spatial_merge_size**2
    varying = {
        "batch": (1, 1, 1),
        "capacity": (1, min(4096, longest), longest),
        "patches": (merged, max(limits.max_patches // 4 // merged, 1) * merged, limits.max_patches),
        "segments_plus_1": (2, 2, 2),
    }
    chunk = limits.prefill_chunk
    found = []
    for seq in ((1, chunk, chunk), (1, 1, 1))[: 2 if graph == bindings.DECODER else 1]:
        sizes = {**varying, "seq": seq}
        found.append(
            {
                binding.name: tuple(
                    tuple(sizes[size][i] if isinstance(size, str) else size for size in binding.shape) for i in range(3)
                )
                for binding in inputs
            }
        )
    return found
