"""Where tokens and patches are: rotary tables and the vision encoder's learned positions.

All on the host in NumPy, equal to Hugging Face's Qwen3-VL: angles are float32 products, as there.
"""

from __future__ import annotations

import functools

import numpy as np

from pascalvl.plugins.model_config import TextConfig, VisionConfig
from pascalvl.plugins.prompt import Grid
from pascalvl.runtime.embeddings import EmbeddingTable


def rope_tables(position_ids: np.ndarray, config: TextConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[n, head_dim]`` for positions ``[3, n]``, interleaved as the M-RoPE sections say."""
    axis = np.zeros(len(config.rope_inv_freq), dtype=np.intp)
    for dim in (1, 2):
        axis[dim : 3 * config.mrope_section[dim] : 3] = dim
    inv_freq = np.asarray(config.rope_inv_freq, np.float32)
    angles = position_ids.astype(np.float32)[axis].T * inv_freq
    angles = np.concatenate([angles, angles], axis=-1)
    scaling = np.float32(config.rope_attention_scaling)
    return np.cos(angles) * scaling, np.sin(angles) * scaling


class TextRope:
    """Rotary tables of single tokens of text, which are at one position in time, height and width.

    A sequence's next tokens follow each other: tables are made, and kept, for blocks of them.
    """

    _BLOCK, _KEPT = 64, 64

    def __init__(self, config: TextConfig) -> None:
        self._block = functools.lru_cache(self._KEPT)(
            lambda start: rope_tables(np.tile(np.arange(start, start + self._BLOCK), (3, 1)), config)
        )

    def at(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines ``[1, head_dim]``."""
        row = position % self._BLOCK
        cos, sin = self._block(position - row)
        return cos[row : row + 1], sin[row : row + 1]


def _patch_rows_and_columns(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column of each patch, ``[2, t * h * w]``, in the order of patches: merge block by merge block."""
    t, h, w = grid
    place = np.indices((h, w)).reshape(2, h // merge_size, merge_size, w // merge_size, merge_size)
    return np.tile(place.transpose(0, 1, 3, 2, 4).reshape(2, h * w), t)


def vision_rope_tables(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[patches, head_dim]`` of the vision encoder's rows and columns."""
    rows, columns = _patch_rows_and_columns(grid, config.spatial_merge_size)
    angles = np.arange(max(grid[1:]), dtype=np.float32)[:, None] * np.asarray(config.rope_inv_freq, np.float32)
    cos, sin = (np.concatenate([of[rows], of[columns]] * 2, axis=-1) for of in (np.cos(angles), np.sin(angles)))
    return cos, sin


class VisionPositions:
    """The vision encoder's learned positions, interpolated to pictures of any size (bilinear, corners aligned).

    Those of the latest sizes are kept: a conversation's pictures, and a video's, are often of one.

    Args:
        table: the learned grid, ``[num_position_embeddings, hidden_size]``, row by row of the grid.
        config: its sizes.
        kept_bytes: what results that are kept take at most.
    """

    def __init__(self, table: EmbeddingTable, config: VisionConfig, kept_bytes: int = 64 << 20) -> None:
        self._table = table
        self._config = config
        self._kept_bytes = kept_bytes
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        """By rows and columns, the latest used last."""

    def __call__(self, grid: Grid) -> np.ndarray:
        """Of a visual's patches, in their order: float32 ``[t * h * w, hidden_size]``, which nobody may write to."""
        t, h, w = grid
        embeds = self._kept.pop((h, w), None)
        if embeds is None:
            embeds = self._interpolated(h, w)
        self._kept[h, w] = embeds
        while sum(kept.nbytes for kept in self._kept.values()) > self._kept_bytes:
            del self._kept[next(iter(self._kept))]
        return embeds if t == 1 else np.tile(embeds, (t, 1))

    def _interpolated(self, h: int, w: int) -> np.ndarray:
        side, m, hidden = self._config.num_grid_per_side, self._config.spatial_merge_size, self._config.hidden_size
        (top, bottom), (of_top, of_bottom) = _neighbours(h, side)
        (left, right), (of_left, of_right) = _neighbours(w, side)
        embeds = np.empty((h // m, w // m, m, m, hidden), np.float32)
        rows = embeds.transpose(0, 2, 1, 3, 4)
        for i in range(h):  # a row of patches at a time: what is between is small
            line = of_top[i] * self._line(top[i])
            line += of_bottom[i] * self._line(bottom[i])
            row = of_left[:, None] * line[left]
            row += of_right[:, None] * line[right]
            rows[i // m, i % m] = row.reshape(w // m, m, hidden)
        return embeds.reshape(h * w, hidden)

    def _line(self, row: int) -> np.ndarray:
        """A row of the learned grid, ``[side, hidden_size]``."""
        side = self._config.num_grid_per_side
        return self._table[row * side : (row + 1) * side]


def _neighbours(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of ``size`` rows (or columns) the two of the learned grid that it is between, and their weights.

    Returns:
        Numbers below ``side``, and float32, ``[2, size]`` each.
    """
    source = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    neighbours = np.floor(source) + np.array([[0], [1]], np.float32)
    weights = np.maximum(1 - np.abs(source - neighbours), 0)
    return np.minimum(neighbours.astype(np.intp), side - 1), weights


def vision_cu_seqlens(grid: Grid) -> np.ndarray:
    """Bounds of the vision encoder's sequences, int32: each temporal patch attends to itself alone."""
    t, h, w = grid
    return np.arange(t + 1, dtype=np.int32) * np.int32(h * w)
