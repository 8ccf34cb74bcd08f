"""What a model is asked: token ids with their placeholders expanded, the patches of pictures and videos, positions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

Grid = tuple[int, int, int]
"""Size of a visual in patches: temporal patches, rows, columns."""


@dataclasses.dataclass(eq=False)
class Patches:
    """A picture or video as the vision encoder takes it."""

    make: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    """Computes `pixel_values`; forgotten then, with the picture that it holds."""
    grid: Grid
    """Temporal patches, rows and columns."""
    merge_size: int
    digest: bytes
    """Identity of the content: equal digests mean equal features."""
    timestamps: tuple[float, ...] = ()
    """Video: the middle of each temporal patch, in seconds; a picture has none."""

    @classmethod
    def of(cls, pixel_values: np.ndarray, grid: Grid, merge_size: int, timestamps: tuple[float, ...] = ()) -> Patches:
        """Patches that are computed already."""
        digest = hashlib.sha256(repr(grid).encode())
        digest.update(pixel_values.data)
        return cls(lambda: pixel_values, grid, merge_size, digest.digest(), timestamps)

    @functools.cached_property
    def pixel_values(self) -> np.ndarray:
        """float32 ``[t * h * w, patch_dim]``, merge block by merge block; computed when somebody asks, which nobody
        does of a picture that was looked at before."""
        pixel_values = self.make()
        del self.make
        return pixel_values

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
    """Tokens that a model is given, and the visuals among them; an answer may be the last of the tokens."""

    token_ids: np.ndarray
    """int64 ``[n]``, with a placeholder for each token of a visual."""
    visuals: Sequence[Visual] = ()
    """In order."""

    @classmethod
    def of(cls, token_ids: np.ndarray, visuals: Sequence[Patches], placeholders: tuple[int, ...]) -> Prompt:
        """A prompt whose visuals, in order, have their tokens where its ``placeholders`` are.

        Raises:
            ValueError: the visuals have more tokens, or less, than there are placeholders.
        """
        indices, placed = np.flatnonzero(np.isin(token_ids, placeholders)), []
        used = 0
        for patches in visuals:
            count = patches.grid[0] * patches.tokens_per_frame
            placed.append(Visual(patches, indices[used : used + count]))
            used += count
        if used != len(indices):
            raise ValueError(f"expected placeholders for {used} tokens of visuals, found {len(indices)}")
        return cls(token_ids, placed)

    @functools.cached_property
    def position_ids(self) -> np.ndarray:
        """M-RoPE positions in time, height and width, int64 ``[3, n]``."""
        parts, start, end = [], 0, 0
        for visual in self.visuals:
            t, *grid = visual.patches.grid
            rows, columns = (size // visual.patches.merge_size for size in grid)
            places = np.indices((1, rows, columns)).reshape(3, -1)
            for frame in visual.token_indices.reshape(t, -1):
                first = int(frame[0])
                parts += [_text_positions(start, first - end), places + (start + first - end)]
                start += first - end + max(rows, columns)
                end = first + len(frame)
        parts.append(_text_positions(start, len(self.token_ids) - end))
        return np.concatenate(parts, axis=1)

    @property
    def next_position(self) -> int:
        """Position, in all three dimensions, of the token that follows."""
        return int(self.position_ids.max()) + 1


def _text_positions(start: int, count: int) -> np.ndarray:
    """Of tokens of text, ``[3, count]``."""
    return np.tile(np.arange(start, start + count), (3, 1))
