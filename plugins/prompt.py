"""What a model is asked: token ids with their placeholders expanded, the patches of pictures and videos, positions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

Grid = tuple[int, int, int]
"""Size of a visual in patches: temporal patches, rows, columns."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patches:
    """A picture or video as the vision encoder takes it."""

    make: Callable[[], np.ndarray]
    """Computes `pixel_values`."""
    grid: Grid
    """Temporal patches, rows and columns."""
    merge_size: int
    digest: bytes
    """Identity of the content: equal digests mean equal features."""
    timestamps: tuple[float, ...] = ()
    """Video: the middle of each temporal patch, in seconds; a picture has none."""

    @functools.cached_property
    def pixel_values(self) -> np.ndarray:
        """float32 ``[t * h * w, patch_dim]``, merge block by merge block; computed when somebody asks, which nobody
        does of a picture that was looked at before."""
        return self.make()

    @property
    def is_video(self) -> bool:
        return bool(self.timestamps)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one temporal patch."""
        return self.grid[1] * self.grid[2] // self.merge_size**2


@dataclasses.dataclass(frozen=True, eq=False)
class Visual:
    """A picture or video in a prompt, and where its tokens are."""

    patches: Patches
    token_indices: np.ndarray
    """``[t * tokens_per_frame]``, in the order of the vision encoder's output."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt ready to run."""

    token_ids: np.ndarray
    """int64 ``[n]``."""
    position_ids: np.ndarray
    """M-RoPE positions, int64 ``[3, n]``."""
    visuals: tuple[Visual, ...]

    @property
    def next_position(self) -> int:
        """Position, in all three dimensions, of the token that follows."""
        return int(self.position_ids.max()) + 1


def mrope_position_ids(spans: Sequence[int | Grid], merge_size: int) -> np.ndarray:
    """Positions of a prompt's tokens in time, height and width: ``[3, n]``.

    Args:
        spans: the prompt in order: an int is that many text tokens, a grid one picture (or one temporal patch of a
            video) of ``rows * columns / merge_size**2`` tokens.
        merge_size: side of the block of patches that is one token.
    """
    parts, start = [], 0
    for span in spans:
        if isinstance(span, int):
            parts.append(np.tile(np.arange(start, start + span), (3, 1)))
            start += span
        else:
            _, rows, columns = (size // merge_size for size in span)
            place = np.indices((1, rows, columns)).reshape(3, -1)
            parts.append(place + start)
            start += max(rows, columns)
    return np.concatenate(parts, axis=1)
