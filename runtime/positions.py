"""Where tokens and patches are: M-RoPE positions, rotary tables and the vision encoder's position grid.

All on the host in NumPy, equal to Hugging Face's Qwen3-VL: angles are float32 products, as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pascalvl.plugins.model_config import TextConfig, VisionConfig

Grid = tuple[int, int, int]
"""Size of a visual in patches: temporal patches, rows, columns."""


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


def _patch_rows_and_columns(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column of each patch, ``[2, t * h * w]``, in the order of patches: merge block by merge block."""
    t, h, w = grid
    place = np.indices((h, w)).reshape(2, h // merge_size, merge_size, w // merge_size, merge_size)
    return np.tile(place.transpose(0, 1, 3, 2, 4).reshape(2, h * w), t)


def vision_rope_tables(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[patches, head_dim]`` of the vision encoder's rows and columns."""
    place = _patch_rows_and_columns(grid, config.spatial_merge_size).astype(np.float32)
    by_axis = place[:, :, None] * np.asarray(config.rope_inv_freq, np.float32)
    angles = np.concatenate([by_axis[0], by_axis[1]] * 2, axis=-1)
    return np.cos(angles), np.sin(angles)


def position_grid_taps(grid: Grid, config: VisionConfig) -> tuple[np.ndarray, np.ndarray]:
    """Entries of the learned position grid that each patch mixes, and their weights: ``[patches, 4]`` each.

    Bilinear interpolation with aligned corners; int32 indices into the flattened grid, float32 weights.
    """
    side = config.num_grid_per_side
    place = _patch_rows_and_columns(grid, config.spatial_merge_size)
    taps, weights = [], []
    for index, size in zip(place, grid[1:], strict=True):
        source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        neighbours = np.floor(source)[:, None] + np.array([0, 1], np.float32)
        taps.append(np.minimum(neighbours.astype(np.int32), side - 1))
        weights.append(np.maximum(1 - np.abs(source[:, None] - neighbours), 0))
    indices = taps[0][:, :, None] * side + taps[1][:, None, :]
    mixed = weights[0][:, :, None] * weights[1][:, None, :]
    return indices.reshape(-1, 4), mixed.reshape(-1, 4)


def vision_cu_seqlens(grid: Grid) -> np.ndarray:
    """Bounds of the vision encoder's sequences, int32: each temporal patch attends to itself alone."""
    t, h, w = grid
    return np.arange(t + 1, dtype=np.int32) * np.int32(h * w)
