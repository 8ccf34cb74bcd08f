"""Cases of attention over the tokens of several sequences, and pages."""

from __future__ import annotations

import dataclasses

import numpy as np

from pascalvl.plugins.kernels.library import KernelLibrary
from pascalvl.plugins.kv_format import PAGE_SLOTS
from tests.plugins.kernels.reference import HostRows, Pool, Shape, attend, expected_packed

SCALE = 0.1


@dataclasses.dataclass
class Case:
    """Sequences with ``new`` tokens each behind a ``past``, and some padding."""

    cache: HostRows
    pool: Pool
    qkv: tuple[np.ndarray, np.ndarray, np.ndarray]
    new: np.ndarray
    past: np.ndarray
    visible: np.ndarray | None = None

    @property
    def cu_seqlens(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.new)])

    def run(self, library: KernelLibrary) -> tuple[np.ndarray, HostRows]:
        operands = self.cu_seqlens, self.past, SCALE, self.visible
        return attend(library, self.cache, self.qkv, *operands, pool=self.pool)

    def expected(self, new: HostRows) -> np.ndarray:
        return expected_packed(self.cache, new, self.qkv[0], self.cu_seqlens, self.past, SCALE, self.visible)

    def alone(self, number: int) -> Case:
        """One of its sequences, as a call of its own over the same pool."""
        begin = self.cu_seqlens[number]
        tokens = np.s_[:, begin : begin + self.new[number]]
        one = np.s_[number : number + 1]
        own = self.pool.of_sequence(number), tuple(x[tokens] for x in self.qkv)
        visible = None if self.visible is None else self.visible[one]
        return Case(self.cache, *own, self.new[one], self.past[one], visible)


def make_case(
    library: KernelLibrary,
    formats: tuple,
    new: list[int],
    past: list[int],
    padding: int = 0,
    shared_pages: int = 0,
    masked: bool = False,
    seed: int = 0,
    **sizes: int,
) -> Case:
    """Random tokens and rows; ``shared_pages`` are the first pages of all sequences."""
    rng = np.random.default_rng(seed)
    capacity = max(*past, 1, shared_pages * PAGE_SLOTS)
    shape = Shape(**{"batch": len(new), "num_heads": 4, "num_kv_heads": 2, **sizes, "capacity": capacity})
    cache = HostRows(library, shape, formats, formats[0].is_quantised and shape.head_dim == 128)
    lead = 1, shape.batch, shape.num_kv_heads, capacity
    old = [rng.standard_normal((*lead, dim)).astype(np.float32) for dim in cache.dims]
    for rows in old:
        rows[:, :, :, : shared_pages * PAGE_SLOTS] = rows[:, :1, :, : shared_pages * PAGE_SLOTS]
    cache.fill(*old)
    for b, length in enumerate(past):  # what lies beyond a past must not be seen
        beyond = np.s_[:, b, :, max(length, shared_pages * PAGE_SLOTS) :]
        for rows, scales in zip(cache.rows, cache.scales, strict=True):
            rows[beyond] = 0x7F
            scales[beyond] = np.nan
    pool = Pool(cache)
    pool.table[:, :shared_pages] = pool.table[:1, :shared_pages]
    tokens = sum(new) + padding
    heads = shape.num_heads, shape.num_kv_heads, shape.num_kv_heads
    dims = shape.head_dim, shape.head_dim, shape.value_dim
    qkv = tuple(rng.standard_normal((n, tokens, dim)).astype(np.float32) for n, dim in zip(heads, dims, strict=True))
    visible = None
    if masked:
        visible = rng.integers(0, max(new) + 2, (shape.batch, capacity)).astype(np.int32)
    return Case(cache, pool, qkv, np.array(new), np.array(past, np.int32), visible)
