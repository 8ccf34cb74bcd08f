"""All kernels on made-up inputs, as TensorRT times plugins on: ``python -m tests.plugins.kernels.made_up LIBRARY EVERY
TARGET ROUNDS``.

Every integer input holds any int32; codes, halves and floats any bits. Nothing is expected of the results, but that no
byte beside an array changes, and that the calls end. Of the formats of the cache, the bits of weights and the head
sizes of vision, each EVERY-th is tried; each kernel meets other numbers in so many ROUNDS.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import CHOICE, KernelLibrary
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import (
    PAIRS,
    HostRows,
    Memory,
    Pool,
    Prologue,
    Shape,
    aligned,
    append,
    copy,
    packed_attention,
    pointer,
)

LEAST, MOST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
GUARD = 4096
"""Bytes on either side of an array that nobody may write."""
PATTERN = 0xA5
BATCH = 2


class GuardedMemory(Memory):
    """Memory of another kind, with guards."""

    def __init__(self, inner: Memory) -> None:
        self._inner = inner
        self._guards: list[np.ndarray] = []

    def allocate(self, size: int) -> np.ndarray:
        whole = self._inner.allocate(size + 2 * GUARD)
        before, array, after = np.split(whole, [GUARD, GUARD + size])
        for guard in (before, after):
            guard[:] = PATTERN
            self._guards.append(guard)
        return array

    def wait(self) -> None:
        self._inner.wait()

    def check(self) -> None:
        """Fail if a guard was written; forgets them all."""
        self.wait()
        assert all((guard == PATTERN).all() for guard in self._guards)
        self._guards.clear()


class MadeUp:
    """Draws inputs of any bits."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._turn = 0

    def bits(self, *shape: int, dtype: type = np.float32) -> np.ndarray:
        array = aligned(shape, dtype)
        array.view(np.uint8)[...] = self._rng.integers(0, 256, array.view(np.uint8).shape, np.uint8)
        return array

    def integers(self, *shape: int) -> np.ndarray:
        return self._rng.integers(LEAST, MOST, shape, np.int32, endpoint=True)

    def lengths(self, capacity: int) -> np.ndarray:
        """Of `BATCH` sequences, in turn: what is out of range on either side, just so and far, and anything."""
        self._turn += 1
        pairs = (MOST, -1), (LEAST, capacity + 1), self.integers(BATCH)
        return np.array(pairs[self._turn % len(pairs)], np.int32)

    def pages(self, pool: Pool) -> np.ndarray:
        """A table of pages that there are not, and of some that there are."""
        table = self.integers(*pool.table.shape)
        table[:, 0] = self._rng.choice([-1, LEAST, MOST, pool.num_pages, 0], len(table))
        return table

    def bounds(self, seq: int) -> tuple[int, np.ndarray]:
        """A number of tokens, and bounds of `BATCH` sequences: in turn right ones, such as go back or too far, and
        anything."""
        tokens = BATCH * seq if self._turn % 4 else BATCH * seq + 3
        usual = np.arange(BATCH + 1) * seq
        kinds = usual, self._rng.integers(-3, tokens + 4, BATCH + 1), self.integers(BATCH + 1)
        return tokens, kinds[self._rng.integers(len(kinds))]

    def distinct(self, seq: int, capacity: int) -> np.ndarray:
        """Slots ``[BATCH, seq]``: within range each at most once, for two tokens that go to one race for it."""
        usual = [self._rng.permutation(capacity)[: seq - 4] for _ in range(BATCH)]
        strange = [MOST, LEAST, -1, capacity]
        return np.array([self._rng.permutation([*slots, *strange]) for slots in usual], np.int32)

    def rows(self, library: KernelLibrary, shape: Shape, formats: tuple) -> HostRows:
        rows = HostRows(library, shape, formats, formats[0].is_quantised and shape.head_dim == 128)
        for array in rows.arrays:
            array.view(np.uint8)[...] = self.bits(array.nbytes, dtype=np.uint8).reshape(array.view(np.uint8).shape)
        return rows

    def prologue(self, batch: int, seq: int, dim: int) -> Prologue:
        return Prologue(*(self.bits(dim) for _ in range(2)), *(self.bits(batch, seq, dim) for _ in range(2)))


def attend(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, formats: tuple) -> None:
    """Decode with all groups; prefill of all head sizes, with and without a mask."""
    for heads, seq, head_dim, value_dim, with_mask in (
        *((group, 1, 128, 128, False) for group in (1, 2, 4, 8)),
        (4, 1, 112, 96, False),
        (2, 3, 128, 64, False),
        (2, 3, 128, 128, False),
        (2, 3, 128, 64, True),
        (4, 1, 128, 128, True),
    ):
        capacity = 70
        shape = Shape(BATCH, heads, 1, head_dim, value_dim, capacity)
        pool = Pool(made_up.rows(library, shape, formats))
        visible = made_up.integers(BATCH, capacity) if with_mask else None
        tokens, bounds = made_up.bounds(seq)
        pool.table = made_up.pages(pool)
        qkv = tuple(made_up.bits(n, tokens, dim) for n, dim in ((heads, head_dim), (1, head_dim), (1, value_dim)))
        prologue = made_up.prologue(1, tokens, head_dim)
        reference.attend(library, pool.cache, qkv, bounds, made_up.lengths(capacity), 0.1, visible, prologue, pool)
        guarded.check()


def store(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, formats: tuple) -> None:
    seq, capacity = 12, 20
    shape = Shape(BATCH, 2, 1, capacity=capacity)
    new = made_up.rows(library, dataclasses.replace(shape, capacity=seq), formats)
    append(library, made_up.rows(library, shape, formats), new, made_up.distinct(seq, capacity))
    guarded.check()


def attend_both_ways(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, every: int) -> None:
    seq = 70
    bounds = (
        made_up.integers(5),
        np.array([MOST, LEAST, MOST, 0, 70], np.int32),
        np.array([-5, 90, 20, 66, 1000], np.int32),
        np.array([10, 60, 30, 65, -1], np.int32),
    )
    for dim, cu_seqlens in itertools.product((64, 72, 128)[::every], bounds):
        q, k, v = (made_up.bits(1, seq, dim) for _ in range(3))
        packed_attention(library, q, k, v, cu_seqlens, 0.1, made_up.prologue(1, seq, dim))
        guarded.check()


def multiply(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, every: int) -> None:
    for bits, rows, has_zero in itertools.product((32, 16, 8, 4)[::every], (1, 2, 4, 8, 9, 20, 40), (False, True)):
        if has_zero and bits >= 16:
            continue
        form, inputs, outputs = WeightFormat(bits, 32), 100, 128
        x, padded = made_up.bits(rows, inputs), form.padded(inputs)
        if bits >= 16:
            weight = made_up.bits(outputs, padded, dtype=np.float16 if bits == 16 else np.float32)
        else:
            codes = made_up.bits(outputs, padded, dtype=np.int8) >> (8 - bits)
            halves = [made_up.bits(outputs, padded // 32, dtype=np.float16) for _ in range(1 + has_zero)]
            weight = QuantisedWeight(codes, halves[0], inputs, form, halves[1] if has_zero else None)
        for kind, activation in zip(Norm, (Activation.SILU_GATED, Activation.GELU_ERF, Activation.NONE), strict=True):
            if kind and rows not in (2, 9):
                continue
            operands = made_up.bits(inputs), 1e-6, made_up.bits(inputs) if kind is Norm.LAYER else None
            norm = InputNorm(kind, *operands) if kind else None
            reference.quantised_linear(library, x, weight, activation=activation, norm=norm)
            guarded.check()


def main() -> None:
    path, every, target, rounds = sys.argv[1:]
    library = reference.open_library(Target(target), Path(path))
    guarded = reference.memory = GuardedMemory(reference.memory)
    made_up = MadeUp()
    for formats in PAIRS[:: int(every)] * int(rounds):
        attend(library, made_up, guarded, formats)
        store(library, made_up, guarded, formats)
    attend_both_ways(library, made_up, guarded, int(every))
    multiply(library, made_up, guarded, int(every))
    logits, token, logit = made_up.bits(3, 700), aligned((3,), np.int32), aligned((3,))
    logits[1] = np.nan
    library.choose(pointer(logits), 3, 700, 0, pointer(token), pointer(logit))
    guarded.check()
    assert ((token >= -1) & (token < 700)).all()
    assert token[1] == -1
    choices = made_up.bits(3, 16).view(CHOICE)[:, 0]
    tables = {"counts": copy(made_up.integers(700)), "bias": made_up.bits(700), "mask": copy(made_up.integers(22))}
    for name, array in tables.items():
        choices[name] = pointer(array), 0, pointer(array)
    for k in (int(choices["top_k"][0]), 0, 5, 1024, 1025):
        choices["top_k"] = k
        choices["temperature"][1:] = 0.5, np.nan
        library.choose(pointer(logits), 3, 700, pointer(choices), pointer(token), pointer(logit))
        guarded.check()
        assert ((token >= -1) & (token < 700)).all()
    matrix, picked, out = made_up.bits(5, 68), copy(made_up.integers(7)), aligned((7, 68))
    library.gather_rows(pointer(matrix), 5, 68, pointer(picked), 7, pointer(out))
    library.add_to(pointer(out), pointer(made_up.bits(7, 68)), 7, 68)
    guarded.check()


if __name__ == "__main__":
    main()
