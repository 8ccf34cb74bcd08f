"""All kernels on made-up inputs, as TensorRT times plugins on: ``python -m tests.plugins.kernels.made_up LIBRARY EVERY
TARGET ROUNDS``.

Every integer input holds any int32; codes, halves and floats any bits. Nothing is expected of the results, but that no
byte beside an array changes, and that the calls end. Of the formats of the cache, each EVERY-th is tried; each kernel
meets other numbers in so many ROUNDS.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np

from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kernels.library import AttentionArgs, KernelLibrary
from pascalvl.plugins.ops.quant_linear.op import Activation
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import PAIRS, HostCache, Memory, Shape, aligned, append, causal_attention, pointer

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

    def distinct(self, seq: int, capacity: int) -> np.ndarray:
        """Slots ``[BATCH, seq]``: within range each at most once, for two tokens that go to one race for it."""
        usual = [self._rng.permutation(capacity)[: seq - 4] for _ in range(BATCH)]
        strange = [MOST, LEAST, -1, capacity]
        return np.array([self._rng.permutation([*slots, *strange]) for slots in usual], np.int32)

    def cache(self, library: KernelLibrary, shape: Shape, formats: tuple) -> HostCache:
        cache = HostCache(library, shape, formats, formats[0].is_quantised and shape.key_dim == 128)
        for array in (*cache.rows, *cache.scales):
            array.view(np.uint8)[...] = self.bits(array.nbytes, dtype=np.uint8).reshape(array.view(np.uint8).shape)
        return cache


def attend(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, formats: tuple) -> None:
    """Decode with all groups, with and without recent tokens; prefill of all head sizes, with and without a mask."""
    for heads, seq, value_dim, more in (
        *((group, 1, 128, None) for group in (1, 2, 4, 8)),
        (4, 1, 96, "recent"),
        (2, 3, 64, None),
        (2, 3, 128, None),
        (2, 3, 64, "mask"),
        (4, 1, 128, "mask"),
    ):
        capacity, recent = 70, None
        shape = Shape(BATCH, heads, 1, 112 if value_dim == 96 else 128, value_dim, capacity)
        cache = made_up.cache(library, shape, formats)
        if more == "recent":
            if not formats[0].is_quantised:
                continue
            rows = made_up.cache(library, dataclasses.replace(shape, capacity=9), PAIRS[1])
            recent = rows, made_up.lengths(9)
        visible = made_up.integers(BATCH, capacity) if more == "mask" else None
        q = made_up.bits(BATCH, heads, seq, shape.key_dim)
        new = made_up.bits(BATCH, 1, seq, shape.key_dim), made_up.bits(BATCH, 1, seq, value_dim)
        causal_attention(library, cache, q, *new, made_up.lengths(capacity), 0.1, visible, recent)
        guarded.check()


def store(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory, formats: tuple) -> None:
    seq, capacity = 12, 20
    shape = Shape(BATCH, 2, 1, capacity=capacity)
    key, value = (made_up.bits(1, BATCH, 1, seq, 128) for _ in range(2))
    for slots in (None, made_up.distinct(seq, capacity)):
        append(library, made_up.cache(library, shape, formats), key, value, made_up.lengths(capacity), slots)
        guarded.check()


def attend_both_ways(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory) -> None:
    seq = 70
    bounds = (
        made_up.integers(5),
        np.array([MOST, LEAST, MOST, 0, 70], np.int32),
        np.array([-5, 90, 20, 66, 1000], np.int32),
        np.array([10, 60, 30, 65, -1], np.int32),
    )
    for dim, cu_seqlens in itertools.product((64, 72, 128), bounds):
        arrays = {name: made_up.bits(1, seq, dim) for name in ("q", "k", "v", "out")}
        arrays["cu_seqlens"] = reference.copy(cu_seqlens)
        args = AttentionArgs(
            **{name: pointer(array) for name, array in arrays.items()},
            **{"batch": 1, "num_heads": 1, "num_kv_heads": 1, "seq": seq, "key_dim": dim, "value_dim": dim},
            softmax_scale=0.1,
            num_sequences=len(cu_seqlens) - 1,
        )
        library.attention(args)
        guarded.check()


def multiply(library: KernelLibrary, made_up: MadeUp, guarded: GuardedMemory) -> None:
    for bits, rows, has_zero in itertools.product((16, 8, 4), (1, 2, 4, 8, 9, 20, 40), (False, True)):
        if has_zero and bits == 16:
            continue
        form, inputs, outputs = WeightFormat(bits, 32), 100, 128
        x, padded = made_up.bits(rows, inputs), form.padded(inputs)
        if bits == 16:
            weight = made_up.bits(outputs, padded, dtype=np.float16)
        else:
            codes = made_up.bits(outputs, padded, dtype=np.int8) >> (8 - bits)
            halves = [made_up.bits(outputs, padded // 32, dtype=np.float16) for _ in range(1 + has_zero)]
            weight = QuantisedWeight(codes, halves[0], inputs, form, halves[1] if has_zero else None)
        reference.quantised_linear(library, x, weight, activation=Activation.SILU_GATED)
        guarded.check()


def main() -> None:
    path, every, target, rounds = sys.argv[1:]
    library = reference.open_library(Target(target), Path(path))
    guarded = reference.memory = GuardedMemory(reference.memory)
    made_up = MadeUp()
    for formats in PAIRS[:: int(every)] * int(rounds):
        attend(library, made_up, guarded, formats)
        store(library, made_up, guarded, formats)
    attend_both_ways(library, made_up, guarded)
    multiply(library, made_up, guarded)
    logits, token, logit = made_up.bits(3, 700), aligned((3,), np.int32), aligned((3,))
    logits[1] = np.nan
    library.greedy(pointer(logits), 3, 700, pointer(token), pointer(logit))
    guarded.check()
    assert ((token >= 0) & (token < 700)).all()


if __name__ == "__main__":
    main()
