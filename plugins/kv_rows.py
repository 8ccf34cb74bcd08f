"""Rows of the KV cache in NumPy, to the bit as the kernels write them: compressing, and reading back."""

from __future__ import annotations

import numpy as np

from pascalvl.plugins.kv_format import RowFormat

_NIBBLES = 4 * np.array([0, 2, 4, 6, 1, 3, 5, 7], np.uint32)
"""By how many bits a word of eight 4-bit codes is shifted to bring each to its end."""


def hadamard(x: np.ndarray) -> np.ndarray:
    """Rows ``[..., 2^n]`` times the orthonormal Hadamard matrix (Sylvester's), by butterflies.

    In float32 bit for bit what the kernels compute of rows of 128.
    """
    dim = x.shape[-1]
    for step in 2 ** np.arange(dim.bit_length() - 1):
        pairs = x.reshape(*x.shape[:-1], -1, 2, step)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).reshape(x.shape)
    return x * x.dtype.type(dim**-0.5)


def quantise(x: np.ndarray, row_format: RowFormat) -> tuple[np.ndarray, np.ndarray]:
    """Codes (int8, ``[..., dim]``) and scales (float16, ``[...]``) of float32 rows.

    One scale a row, which the element of largest magnitude sets: in 8 bits it has code 127 or -127, in 4 bits -8. Codes
    are rounded to the nearest, and to even, with the scale as stored. That of a row too large for float16 is infinity,
    and the row reads as no number.
    """
    with np.errstate(over="ignore"):  # a row too large for the format is stored as infinity
        if row_format is RowFormat.INT8:
            lowest, highest = -127, 127
            scale = np.abs(x).max(-1) / np.float32(127)
        else:
            lowest, highest = -8, 7
            most, least = x.max(-1), x.min(-1)
            scale = np.where(most >= -least, most, least) / np.float32(-8)
        scale = scale.astype(np.float16) + np.float16(0)  # a scale of zero has no sign
    stored = scale.astype(np.float32)
    inverse = np.where(stored != 0, np.float32(1) / np.where(stored != 0, stored, 1), 0).astype(np.float32)
    with np.errstate(invalid="ignore"):  # infinity times zero is no number, and its code 0
        codes = np.nan_to_num(np.clip(np.rint(x * inverse[..., None]), lowest, highest), nan=0)
    return codes.astype(np.int8), scale


def compress(x: np.ndarray, row_format: RowFormat, rotated: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Cache rows of float32 ``[..., dim]``.

    Args:
        rotated: by the Hadamard matrix, before.

    Returns:
        Rows ``[..., row_bytes / itemsize]`` of the format's type, and the float16 scales ``[...]`` of quantised ones.
    """
    if row_format is RowFormat.FLOAT32:
        return x, None
    if row_format is RowFormat.FLOAT16:
        with np.errstate(over="ignore"):  # a value too large for the format is stored as infinity
            return x.astype(np.float16, order="C").view(row_format.dtype), None
    codes, scale = quantise(hadamard(x) if rotated else x, row_format)
    rows = np.zeros((*x.shape[:-1], row_format.row_bytes(x.shape[-1])), np.uint8)
    if row_format is RowFormat.INT8:
        rows[..., : x.shape[-1]] = codes.view(np.uint8)
    else:
        nibbles = (codes + 8).astype(np.uint8).reshape(*codes.shape[:-1], -1, 2, 4)
        rows[..., : x.shape[-1] // 2] = (nibbles[..., 0, :] | nibbles[..., 1, :] << 4).reshape(*codes.shape[:-1], -1)
    return rows.view(row_format.dtype), scale


def expand(rows: np.ndarray, scale: np.ndarray | None, row_format: RowFormat, dim: int) -> np.ndarray:
    """The elements ``[..., dim]`` of cache rows, float32 (of scales in float64, as those); rotated ones stay so."""
    if row_format is RowFormat.FLOAT32:
        return rows
    if row_format is RowFormat.FLOAT16:
        return rows.view(np.float16).astype(np.float32)
    if scale is None:
        raise ValueError(f"rows in {row_format} need their scales")
    if row_format is RowFormat.INT8:
        codes = rows.view(np.int8)[..., :dim]
    else:
        nibbles = rows.view(np.uint32)[..., None] >> _NIBBLES & 15
        codes = nibbles.reshape(*rows.shape[:-1], -1)[..., :dim].astype(np.int8) - np.int8(8)
    with np.errstate(invalid="ignore"):  # of a row that was too large
        return codes * scale.astype(np.promote_types(scale.dtype, np.float32))[..., None]
