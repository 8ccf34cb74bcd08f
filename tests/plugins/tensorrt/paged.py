"""Calls of the causal op over pools of pages, drawn at random, and what must come out, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np

from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, LayerLayout
from pascalvl.plugins.kv_rows import compress, expand, hadamard

F32, I32 = np.float32, np.int32
SOFTMAX_SCALE = 0.1
EPSILON = 0.1
"""Large enough to count."""
LEAST, MOST = np.iinfo(I32).min, np.iinfo(I32).max


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a call: of each sequence the new tokens and the slots of its past."""

    layout: LayerLayout
    num_heads: int
    lengths: tuple[int, ...]
    past: tuple[int, ...]
    padding: int = 0
    """Tokens behind those of the sequences."""
    masked: bool = False
    """Whether ``past_visible`` has a number for each slot."""
    sequence_pages: int = 3

    @property
    def tokens(self) -> int:
        return sum(self.lengths) + self.padding

    @property
    def bounds(self) -> np.ndarray:
        """``cu_seqlens``."""
        return np.cumsum([0, *self.lengths]).astype(I32)

    @property
    def attributes(self) -> dict[str, int | float | str]:
        return attributes_of(self.layout, self.num_heads)


def attributes_of(layout: LayerLayout, num_heads: int) -> dict[str, int | float | str]:
    """A causal node's."""
    return {
        **{"causal": 1, "softmax_scale": SOFTMAX_SCALE, "epsilon": EPSILON, "kv_format": layout.kv_format.value},
        **{"num_heads": num_heads, "num_kv_heads": layout.num_kv_heads},
        **{"head_dim": layout.head_dim, "value_dim": layout.value_dim},
    }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of a causal node, in its order."""

    qkv: np.ndarray
    q_norm: np.ndarray
    k_norm: np.ndarray
    rope_cos: np.ndarray
    rope_sin: np.ndarray
    cu_seqlens: np.ndarray
    past_length: np.ndarray
    page_table: np.ndarray
    past_visible: np.ndarray
    pool: tuple[np.ndarray, ...]
    """Keys, values and, where they are quantised, scales."""

    @property
    def arrays(self) -> list[np.ndarray]:
        *arrays, _ = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [*arrays, *self.pool]


def tables(rng: np.random.Generator, tokens: int, dim: int) -> list[np.ndarray]:
    """Cosines and sines ``[tokens, dim]``."""
    angle = np.tile(rng.uniform(0, 2 * np.pi, (tokens, dim // 2)), 2)
    return [f(angle).astype(F32) for f in (np.cos, np.sin)]


def draw(rng: np.random.Generator, case: Case) -> Inputs:
    """Inputs of a call.

    Pages of a sequence lie anywhere in the pool, in any order; all sequences share the first, as they do a prompt's
    prefix. Whatever no sequence's past reaches is what nobody may read: page numbers and bounds of visibility are any
    int32 there, and rows of the pool are no numbers, or codes with such scales.
    """
    layout, batch = case.layout, len(case.lengths)
    width = case.num_heads * layout.head_dim + layout.num_kv_heads * sum(layout.dims)
    num_pages = 1 + batch * case.sequence_pages
    table = rng.permutation(num_pages - 1)[: batch * case.sequence_pages].reshape(batch, -1) + 1
    table[:, 0] = rng.integers(num_pages)
    slots = np.arange(case.sequence_pages * PAGE_SLOTS)
    has_slot = slots < np.array(case.past)[:, None]
    reached = np.zeros((num_pages, PAGE_SLOTS), bool)
    for b in range(batch):
        reached[table[b, slots // PAGE_SLOTS], slots % PAGE_SLOTS] |= has_slot[b]
    anything = rng.integers(LEAST, MOST, (2, batch, len(slots)), I32, endpoint=True)
    page_table = np.where(has_slot[:, ::PAGE_SLOTS], table, anything[0][:, ::PAGE_SLOTS]).astype(I32)
    most = max(case.lengths)
    visible = np.full((batch, 1), most, I32)
    if case.masked:
        visible = np.where(has_slot, rng.integers(-1, most + 2, has_slot.shape), anything[1]).astype(I32)
    return Inputs(
        rng.standard_normal((case.tokens, width)).astype(F32),
        *(rng.standard_normal(layout.head_dim).astype(F32) for _ in range(2)),
        *tables(rng, case.tokens, layout.head_dim),
        case.bounds,
        np.array(case.past, I32),
        page_table,
        visible,
        _pool(rng, layout, reached),
    )


def _pool(rng: np.random.Generator, layout: LayerLayout, reached: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows of a pool of pages, no numbers in slots that are not ``reached`` (``[pages, PAGE_SLOTS]``)."""
    arrays, halves = [], []
    lead = (len(reached), layout.num_kv_heads, PAGE_SLOTS)
    unread = np.broadcast_to(~reached[:, None], lead)
    for which, (row_format, dim) in enumerate(zip(layout.kv_format.rows, layout.dims, strict=True)):
        x = rng.standard_normal((*lead, dim)).astype(F32)
        rows, scale = compress(x, row_format, layout.is_rotated and which == 0)
        if scale is None:
            rows[unread] = np.array(-1, I32).view(rows.dtype)
        else:
            halves.append(np.where(unread, np.float16(np.nan), scale))
        arrays.append(rows)
    if halves:
        arrays.append(np.stack(halves, -1).view(I32)[..., 0])
    return tuple(arrays)


def contents(layout: LayerLayout, arrays: tuple[np.ndarray, ...], which: int) -> np.ndarray:
    """Keys (0, still rotated) or values (1) of rows in the cache's format, float64 ``[..., dim]``."""
    row_format, scale = layout.kv_format.rows[which], None
    if layout.kv_format.is_quantised:
        scale = arrays[2][..., None].view(np.float16)[..., which].astype(np.float64)
    return expand(arrays[which], scale, row_format, layout.dims[which]).astype(np.float64)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Heads ``[tokens, heads, dim]`` rotated by their positions, float64."""
    x = x.astype(np.float64)
    first, second = np.split(x, 2, -1)
    return x * cos[:, None] + np.concatenate([-second, first], -1) * sin[:, None]


def split_heads(qkv: np.ndarray, num_heads: int, layout: LayerLayout) -> list[np.ndarray]:
    """Queries, keys and values ``[tokens, heads, dim]``."""
    heads = (num_heads, layout.num_kv_heads, layout.num_kv_heads)
    dims = (layout.head_dim, *layout.dims)
    ends = np.cumsum([count * dim for count, dim in zip(heads, dims, strict=True)])[:-1]
    parts = zip(np.split(qkv, ends, -1), heads, dims, strict=True)
    return [part.reshape(len(qkv), count, dim) for part, count, dim in parts]


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, sees: np.ndarray, softmax_scale: float) -> np.ndarray:
    """Float64 attention of q ``[rows, heads, dim]`` over k, v ``[keys, kv_heads, dim]``; sees ``[rows, keys]``."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x.astype(np.float64), group, 1) for x in (k, v))
    scores = np.einsum("rhd,khd->hrk", q.astype(np.float64), k) * softmax_scale
    scores = np.where(sees, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hrk,khd->rhd", weights / weights.sum(-1, keepdims=True), v)


def _quantised_queries(q: np.ndarray, is_rotated: bool) -> np.ndarray:
    """Queries as they meet codes: int8, one scale a row. The sums that decide on a code are float32's."""
    turned = hadamard(q.astype(F32)) if is_rotated else q.astype(F32)
    most = np.abs(turned).max(-1, keepdims=True)
    return np.rint(turned * (np.float32(127) / most)).astype(np.float64) * (most / np.float32(127))


def errors(case: Case, inputs: Inputs, out: np.ndarray, *new: np.ndarray) -> tuple[float, float, float]:
    """Relative errors of what came out: of the worst sequence's result, and of the new keys and of the new values.

    The result is compared with attention over the very rows of the pool and of what came out.
    """
    layout = case.layout
    q, k, v = split_heads(inputs.qkv, case.num_heads, layout)
    q, k = (
        rope(
            x / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + EPSILON) * norm,
            inputs.rope_cos.astype(np.float64),
            inputs.rope_sin.astype(np.float64),
        )
        for x, norm in ((q, inputs.q_norm), (k, inputs.k_norm))
    )
    met = _quantised_queries(q, layout.is_rotated) if layout.kv_format.is_quantised else q
    worst = 0.0
    bounds = inputs.cu_seqlens
    added = [contents(layout, new, which).swapaxes(0, 1) for which in range(2)]
    pool = [contents(layout, inputs.pool, which) for which in range(2)]
    for b, past in enumerate(case.past):
        own = slice(bounds[b], bounds[b + 1])
        number = np.arange(case.lengths[b])[:, None]
        visible = inputs.past_visible[b, :past] if case.masked else np.full(past, case.lengths[b])
        sees = np.concatenate([number < visible, number >= number.T], 1)
        slots = np.arange(past)
        pages = inputs.page_table[b, slots // PAGE_SLOTS]
        keys, values = (
            np.concatenate([x[pages, :, slots % PAGE_SLOTS], now[own]]) for x, now in zip(pool, added, strict=True)
        )
        if case.lengths[b]:
            expected = attention(met[own], keys, values, sees, SOFTMAX_SCALE)
            worst = max(worst, relative_error(out[own].reshape(expected.shape), expected))
    k = hadamard(k) if layout.is_rotated else k
    return worst, *(relative_error(found, x) for found, x in zip(added, (k, v), strict=True))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Not a number if any found is none."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def shapes(
    layout: LayerLayout, num_heads: int, tokens: int, batch: int, sequence_pages: int, pages: int, slots: int
) -> list[tuple[type, tuple[int, ...]]]:
    """Types and shapes of a node's inputs, a value for each of ``slots`` in past_visible."""
    table = F32, (tokens, layout.head_dim)
    found = [(F32, (tokens, num_heads * layout.head_dim + layout.num_kv_heads * sum(layout.dims)))]
    found += [(F32, (layout.head_dim,))] * 2 + [table, table, (I32, (batch + 1,)), (I32, (batch,))]
    found += [(I32, (batch, sequence_pages)), (I32, (batch, slots))]
    lead = pages, layout.num_kv_heads, PAGE_SLOTS
    for row, elements in zip(layout.kv_format.rows, layout.row_elements, strict=True):
        found.append((row.dtype, (*lead, elements)))
    return [*found, (I32, lead)] if layout.kv_format.is_quantised else found


def cases() -> dict[str, Case]:
    """By name, which begins with the cache's format."""
    step = {"lengths": (1, 1, 1), "past": (300, 0, 128)}
    mixed = {"lengths": (1, 7, 0, 20, 1), "past": (200, 130, 50, 0, 0), "padding": 3}
    found = {}
    for kv_format in KVFormat:
        layout = LayerLayout(kv_format, 2, 128, 128)
        found[f"{kv_format.value} decode step"] = Case(layout, 4, **step)
        found[f"{kv_format.value} sequences of any length"] = Case(layout, 4, **mixed)
    f16, k8v4, k4v4 = (LayerLayout(f, 2, 128, 128) for f in (KVFormat.F16, KVFormat.K8V4, KVFormat.K4V4))
    rank = LayerLayout(KVFormat.K4V4, 2, 128, 96)
    short = LayerLayout(KVFormat.F32, 1, 64, 64)
    masked = {"lengths": (9, 1, 0, 3), "past": (140, 300, 20, 0), "masked": True, "padding": 2}
    return found | {
        "k4v4 rank": Case(rank, 4, **mixed),
        "k4v4 rank, decode step": Case(rank, 4, **step),
        "k8v4 mask": Case(k8v4, 4, **masked),
        "f32 mask": Case(short, 2, **masked),
        "f16 mask for one token each": Case(f16, 4, **step, masked=True),
        "f16 mask, splits": Case(f16, 4, (9,), (600,), 1, masked=True, sequence_pages=5),
        "f16 one sequence": Case(f16, 4, (1,), (257,)),
        "k8v4 one chunk": Case(k8v4, 4, (37,), (130,)),
        "f32 splits of a chunk": Case(short, 2, (11,), (900,), sequence_pages=8),
        "k4v4 splits of a chunk": Case(k4v4, 4, (11,), (600,), 2, sequence_pages=5),
        "f32 splits beside decode": Case(short, 2, (1, 12, 1), (900, 700, 0), 1, sequence_pages=8),
        "f16 step with a sequence of none": Case(f16, 4, (1, 0, 1, 0), (256, 100, 5, 0)),
        "k8v4 step with padding": Case(k8v4, 4, (0, 1, 0, 1), (9, 129, 0, 30), 2),
        "f16 group without a decode kernel": Case(f16, 6, **step),
        "f16 no group": Case(f16, 2, **mixed),
        "f32 tiles of sequences": Case(short, 4, (70, 1, 40), (0, 70, 260)),
    }
