"""FlashAttention2 by its definition, in float64, and random inputs for it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from pascalvl.plugins.kv_format import PAGE_SLOTS, LayerLayout, pages_of
from pascalvl.plugins.kv_rows import compress, expand, hadamard

Arrays = Mapping[str, np.ndarray]
EPSILON = 1e-6
SCALE = 0.09
NOT_READ = 100.0
"""What lies in slots that are no sequence's: it would show if it were read."""


@dataclasses.dataclass(frozen=True)
class CausalCase:
    """Inputs of the op where causal, by name, and its attributes."""

    layout: LayerLayout
    num_heads: int
    arrays: Arrays

    @property
    def attributes(self) -> dict[str, object]:
        sizes = {"head_dim": self.layout.head_dim, "value_dim": self.layout.value_dim}
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.layout.num_kv_heads}
        options = {"causal": 1, "softmax_scale": SCALE, "epsilon": EPSILON}
        return {**options, **heads, **sizes, "kv_format": self.layout.kv_format.value}

    @property
    def sequences(self) -> list[slice]:
        """The tokens of each."""
        return [slice(*bounds) for bounds in itertools.pairwise(self.arrays["cu_seqlens"].tolist())]

    @property
    def tokens(self) -> int:
        """Those that are no padding."""
        return int(self.arrays["cu_seqlens"][-1])


def causal_case(
    layout: LayerLayout,
    new: list[int],
    past_length: list[int],
    num_heads: int = 8,
    visible: str = "all",
    padding: int = 0,
    shared: bool = False,
    seed: int = 0,
) -> CausalCase:
    """Random inputs, in the op's order; pages lie in random order in a pool that has others, too.

    Args:
        new: tokens of each sequence.
        past_length: slots of each sequence that are filled; all have as many pages as the longest needs, and one more.
        visible: of the past, "all" (one entry for all slots), or "some", other slots for each token.
        padding: tokens that are of no sequence.
        shared: the first page is the same one for all sequences.
    """
    rng = np.random.default_rng(seed)
    batch, tokens, heads = len(past_length), sum(new) + padding, layout.num_kv_heads
    head_dim, value_dim = layout.dims

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    sequence_pages = pages_of(max(past_length)) + 1
    page_table = rng.permutation(batch * sequence_pages + 2)[: batch * sequence_pages].reshape(batch, -1)
    if shared:
        page_table[:, 0] = page_table[0, 0]
    filled = np.zeros((batch * sequence_pages + 2, PAGE_SLOTS), bool)
    for pages, length in zip(page_table, past_length, strict=True):
        filled[pages] |= np.arange(sequence_pages * PAGE_SLOTS).reshape(-1, PAGE_SLOTS) < length
    past = [draw(len(filled), heads, PAGE_SLOTS, dim) for dim in layout.dims]
    past = [np.where(filled[:, None, :, None], rows, np.float32(NOT_READ)) for rows in past]
    rows, scales = zip(*map(compress, past, layout.kv_format.rows, (layout.is_rotated, False)), strict=True)
    angles = rng.uniform(0, 6, (tokens, head_dim // 2)).astype(np.float32)
    angles = np.concatenate([angles, angles], -1)
    arrays = {
        "qkv": draw(tokens, num_heads * head_dim + heads * (head_dim + value_dim)),
        "q_norm": 1 + draw(head_dim) / 4,
        "k_norm": 1 + draw(head_dim) / 4,
        "rope_cos": np.cos(angles),
        "rope_sin": np.sin(angles),
        "cu_seqlens": np.cumsum([0, *new]).astype(np.int32),
        "past_length": np.array(past_length, np.int32),
        "page_table": page_table.astype(np.int32),
        "past_visible": np.full((batch, 1), np.iinfo(np.int32).max, np.int32),
        "past_key": rows[0],
        "past_value": rows[1],
    }
    if visible == "some":
        slots = batch, sequence_pages * PAGE_SLOTS
        arrays["past_visible"] = rng.integers(0, max(new) + 1, slots).astype(np.int32)
    if layout.kv_format.is_quantised:
        arrays["past_scale"] = scale_words(*scales)
    return CausalCase(layout, num_heads, arrays)


def scale_words(key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Halves ``[...]`` of keys and values in words ``[...]``."""
    return np.stack([key, value], -1).view(np.int32)[..., 0]


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Of ``[..., heads, head_dim]``, by tables ``[..., head_dim]``."""
    half = x.shape[-1] // 2
    turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
    return x * cos[..., None, :] + turned * sin[..., None, :]


def prologue(case: CausalCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values in float64, ``[heads, tokens, dim]``, after norms and RoPE, before any rotation."""
    a, layout = {name: x.astype(np.float64) for name, x in case.arrays.items()}, case.layout
    heads = np.array([case.num_heads, layout.num_kv_heads, layout.num_kv_heads])
    ends = np.cumsum(heads * [layout.head_dim, layout.head_dim, layout.value_dim])
    parts = [
        part.reshape(len(part), n, -1) for part, n in zip(np.split(a["qkv"], ends[:2], axis=-1), heads, strict=True)
    ]
    for which, weight in enumerate((a["q_norm"], a["k_norm"])):
        x = parts[which]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * weight
        parts[which] = rope(x, a["rope_cos"], a["rope_sin"])
    q, k, v = (part.swapaxes(0, 1) for part in parts)
    return q, k, v


def new_rows(case: CausalCase, k: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    """The op's further outputs by name, of keys and values ``[num_kv_heads, tokens, dim]``."""
    key_row, value_row = case.layout.kv_format.rows
    key, key_scale = compress(k.astype(np.float32), key_row, case.layout.is_rotated)
    value, value_scale = compress(v.astype(np.float32), value_row)
    rows = {"new_key": key, "new_value": value}
    if case.layout.kv_format.is_quantised:
        rows["new_scale"] = scale_words(key_scale, value_scale)
    return rows


def read_rows(layout: LayerLayout, rows: Arrays, age: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in float64 of rows as the cache has them, ``age`` "past" or "new"; rotated ones stay so."""
    scales = (None, None)
    if layout.kv_format.is_quantised:
        halves = rows[f"{age}_scale"][..., None].view(np.float16)
        scales = halves[..., 0], halves[..., 1]
    key, value = (
        expand(rows[f"{age}_{name}"], scale, row, dim).astype(np.float64)
        for name, scale, row, dim in zip(("key", "value"), scales, layout.kv_format.rows, layout.dims, strict=True)
    )
    return key, value


def met_queries(case: CausalCase, q: np.ndarray) -> np.ndarray:
    """Queries as they meet keys: rotated, and rounded to int8. The rounding is the op's, to the bit, in float32."""
    if not case.layout.kv_format.is_quantised:
        return q
    turned = q.astype(np.float32)
    turned = hadamard(turned) if case.layout.is_rotated else turned
    largest = np.abs(turned).max(-1, keepdims=True)
    codes = np.rint(turned * (np.float32(127) / largest))
    return codes.astype(np.float64) * (largest / np.float32(127))


def causal_output(case: CausalCase, q: np.ndarray, rows: Arrays) -> np.ndarray:
    """``output`` in float64, token by token, of queries as `met_queries` gives them and rows as `new_rows` does.

    That of padding is 0.
    """
    past = read_rows(case.layout, case.arrays, "past")
    new_k, new_v = read_rows(case.layout, rows, "new")
    lengths, visible, table = (case.arrays[name] for name in ("past_length", "past_visible", "page_table"))
    out = np.zeros((q.shape[1], case.num_heads, case.layout.value_dim))
    for b, tokens in enumerate(case.sequences):
        # [pages, heads, slots, dim] of the sequence to [heads, slots, dim]
        past_k, past_v = (np.concatenate(list(pool[table[b]]), axis=1) for pool in past)
        seen_by = np.broadcast_to(visible[b], past_k.shape[1])
        for t, h in itertools.product(range(tokens.start, tokens.stop), range(case.num_heads)):
            kv = h // (case.num_heads // case.layout.num_kv_heads)
            slots = np.flatnonzero(t - tokens.start < seen_by[: lengths[b]])
            keys = np.concatenate([past_k[kv, slots], new_k[kv, tokens.start : t + 1]])
            values = np.concatenate([past_v[kv, slots], new_v[kv, tokens.start : t + 1]])
            scores = SCALE * (keys @ q[h, t])
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ values
    return out.reshape(len(out), -1)


def causal(case: CausalCase) -> dict[str, np.ndarray]:
    """All outputs by name, the first in float64.

    Where keys are quantised, a code of a float that lies next to the middle of two is one or the other: compare with
    those of an implementation's own floats, or allow for it.
    """
    q, k, v = prologue(case)
    rows = new_rows(case, k, v)
    return {"output": causal_output(case, met_queries(case, q), rows), **rows}


@dataclasses.dataclass(frozen=True)
class PackedCase:
    """Inputs of the op where not causal, by name, and its attributes."""

    num_heads: int
    arrays: Arrays

    @property
    def head_dim(self) -> int:
        return self.arrays["rope_cos"].shape[1]

    @property
    def attributes(self) -> dict[str, object]:
        sizes = {"head_dim": self.head_dim, "value_dim": self.head_dim}
        heads = {"num_heads": self.num_heads, "num_kv_heads": self.num_heads}
        return {"causal": 0, "softmax_scale": SCALE, "epsilon": 0.0, **heads, **sizes}


def packed_case(cu_seqlens: list[int], head_dim: int, num_heads: int = 3) -> PackedCase:
    rng = np.random.default_rng(head_dim)
    tokens = cu_seqlens[-1]
    angles = np.tile(rng.uniform(0, 6, (tokens, head_dim // 2)), 2)
    arrays = {
        "qkv": rng.standard_normal((tokens, 3 * num_heads * head_dim)).astype(np.float32),
        "rope_cos": np.cos(angles).astype(np.float32),
        "rope_sin": np.sin(angles).astype(np.float32),
        "cu_seqlens": np.array(cu_seqlens, np.int32),
    }
    return PackedCase(num_heads, arrays)


def packed(case: PackedCase) -> np.ndarray:
    """``output`` in float64."""
    qkv, cos, sin = (case.arrays[name].astype(np.float64) for name in ("qkv", "rope_cos", "rope_sin"))
    q, k, v = qkv.reshape(len(qkv), 3, case.num_heads, -1).swapaxes(0, 1)
    q, k = rope(q, cos, sin), rope(k, cos, sin)
    segment = np.searchsorted(case.arrays["cu_seqlens"], np.arange(len(qkv)), side="right")
    scores = np.where(segment[:, None] == segment, SCALE * np.einsum("ihd,jhd->hij", q, k), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(len(qkv), -1)
