"""The C ABI on sizes of any int32: ``python -m tests.plugins.kernels.extremes LIBRARY``, a library of the emulator.

Every integer of every struct, and every two of them, is set to what overflows when it is multiplied, and to what is at
the bounds of what is allowed. A call is refused exactly where `pascalvl.h` says so; else the workspace is as large as
Python's integers, which do not overflow, say. Nothing is launched: where a call would be, only refusals are tried.
"""

import ctypes
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import build as kernels_build
from pascalvl.plugins.kernels.library import AppendArgs, AttentionArgs, Cache, KernelLibrary, LinearArgs
from pascalvl.plugins.kv_format import RowFormat
from tests.plugins.kernels.reference import PAIRS, aligned, pointer

HEADER = (kernels_build.FOLDER / "pascalvl.h").read_text(encoding="utf-8")
LIMITS = {
    name: int(number) << int(shift or 0)
    for name, number, shift in re.findall(r"PASCALVL_MAX_(\w+) = (\d+)(?: << (\d+))?,", HEADER)
}
SIZES, GRID = range(1, LIMITS["SIZE"] + 1), range(1, LIMITS["GRID"] + 1)
MULTIPROCESSORS = 2
"""Of the emulator."""
LEAST, MOST = -(1 << 31), (1 << 31) - 1
VALUES = [LEAST, -1, 0, 1, 1 << 15, 1 << 16, 1 << 30, MOST]
VALUES += [128, GRID[-1], SIZES[-1], SIZES[-1] + 1, LIMITS["ROWS"] >> 15]
STRIDES = [-(1 << 63), -(1 << 47), 0, 1, 1 << 47, (1 << 47) + 16, (1 << 62), (1 << 63) - 1]

Field = tuple[ctypes.Structure, str, list[int]]


def up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# What pascalvl.h says -------------------------------------------------------------------------------------------------


def is_right(cache: Cache, key_dim: int) -> bool:
    known = (cache.key_format, cache.value_format) in [tuple(map(int, pair)) for pair in PAIRS]
    quantised = cache.key_format >= RowFormat.INT8
    return known and cache.capacity in SIZES and (not cache.rotated or (quantised and key_dim == 128))


def attention_bytes(a: AttentionArgs) -> int | None:
    """Of workspace; None: the call is refused."""
    in_grid = a.batch in GRID and a.num_heads in GRID and a.num_kv_heads in GRID
    if not in_grid or a.seq not in SIZES or a.num_heads % a.num_kv_heads:
        return None
    rows, group = a.batch * a.num_heads * a.seq, a.num_heads // a.num_kv_heads
    if rows > LIMITS["ROWS"]:
        return None
    if not a.causal:
        dims = a.key_dim == a.value_dim and a.key_dim in (64, 72, 128)
        return 0 if dims and a.batch == 1 and group == 1 and a.num_sequences in SIZES else None
    if not {a.key_dim, a.value_dim} <= {64, 96, 112, 128} or (a.past_length and not is_right(a.cache, a.key_dim)):
        return None
    quantised = bool(a.past_length) and a.cache.key_format >= RowFormat.INT8
    caches = [a.cache]
    if a.recent_length and a.seq == 1:
        caches.append(a.recent)
        if not quantised or a.past_visible or not is_right(a.recent, 0) or a.recent.key_format != RowFormat.FLOAT16:
            return None
    if a.seq == 1 and a.past_length and not a.past_visible:
        wanted = 2 * MULTIPROCESSORS // (a.batch * a.num_kv_heads)
        splits = sum(max(1, min(up_to(cache.capacity, 64) // 64, wanted)) for cache in caches)
        return rows * splits * (a.value_dim + 4) * 4 if group in (1, 2, 4, 8) else None
    tile = 64 if a.value_dim > 72 else 128
    if up_to(a.seq * group, tile) // tile not in GRID:
        return None
    keys = 128 if a.value_dim > 72 else 64
    blocks = up_to(a.seq * group, tile) // tile * a.num_kv_heads * a.batch
    splits = min(up_to(a.cache.capacity, 2 * keys) // (2 * keys), 2 * MULTIPROCESSORS // blocks) if a.past_length else 1
    return rows * (128 + 4 if quantised else 0) + (rows * splits * (a.value_dim + 4) * 4 if splits > 1 else 0)


def is_appended(a: AppendArgs) -> bool:
    in_grid = a.layers in GRID and a.batch in GRID and a.num_kv_heads in GRID
    if not in_grid or a.seq not in SIZES or a.batch * a.num_kv_heads * a.seq > LIMITS["ROWS"]:
        return False
    if not {a.key_dim, a.value_dim} <= {64, 96, 112, 128} or not is_right(a.cache, a.key_dim):
        return False
    strides = [(a.key_stride, 16), (a.value_stride, 16)]
    if a.cache.key_format >= RowFormat.INT8:
        strides += [(a.key_scale_stride, 2), (a.value_scale_stride, 2)]
    return a.layers == 1 or all(abs(stride) <= 1 << 47 and stride % multiple == 0 for stride, multiple in strides)


def linear_bytes(a: LinearArgs) -> list[int]:
    """What the workspace may have, for any number of splits; empty: the call is refused."""
    fits = a.rows in GRID and a.in_features in SIZES and a.out_features in SIZES and a.activation in (0, 1, 2)
    if not fits or (a.activation == 2 and a.out_features % 128):
        return []
    if a.bits != 16 and (a.bits not in (8, 4) or a.group not in (32, 64, 128)):
        return []
    if bool(a.scale) != (a.bits != 16) or (a.bits == 16 and a.zero):
        return []
    size = 0
    if a.bits != 16:
        padded = up_to(a.in_features, a.group)
        tile = 16 if a.rows <= 16 else 32 if a.rows <= 32 else 64
        size = max(a.rows, 8) * padded + padded // a.group * up_to(a.rows, tile) * 4 * (2 if a.zero else 1)
    splits = [0, *range(2, 9)] if a.rows > 8 else [0]
    return [size + of * a.rows * a.out_features * 4 for of in splits]


# Trying -------------------------------------------------------------------------------------------------------------


def integers(args: ctypes.Structure) -> Iterator[Field]:
    """Those of a struct, and of the structs in it."""
    for name, kind in args._fields_:
        if issubclass(kind, ctypes.Structure):
            yield from integers(getattr(args, name))
        elif kind is ctypes.c_int32:
            yield args, name, VALUES
        elif kind is ctypes.c_int64:
            yield args, name, STRIDES


def each(args: ctypes.Structure) -> Iterator[str]:
    """The struct with every two integers at every two values; gives their names."""
    for (owner, name, values), (other, second, others) in itertools.combinations_with_replacement(integers(args), 2):
        before = getattr(owner, name), getattr(other, second)
        for value, more in itertools.product(values, others):
            setattr(owner, name, value)
            setattr(other, second, more)
            yield f"{name} {value}, {second} {more}"
        setattr(owner, name, before[0])
        setattr(other, second, before[1])


def refusal(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except UserError as error:
        return str(error)
    return ""


def try_attention(library: KernelLibrary, args: AttentionArgs) -> None:
    for case in each(args):
        expected = attention_bytes(args)
        if expected is None:
            assert refusal(library.attention_workspace, args).endswith("."), case
            assert refusal(library.attention, args).endswith("."), case
        else:
            assert library.attention_workspace(args) == expected, case


def try_linear(library: KernelLibrary, args: LinearArgs) -> None:
    for case in each(args):
        expected = linear_bytes(args)
        if not expected:
            assert refusal(library.linear_workspace, args).endswith("."), case
            assert refusal(library.linear, args, 0, 0).endswith("."), case
        else:
            assert library.linear_workspace(args) in expected, case


def try_append(library: KernelLibrary, args: AppendArgs) -> int:
    refused = 0
    for case in each(args):
        if not is_appended(args):
            refused += 1
            assert refusal(library.kv_append, args).endswith("."), case
    return refused


def main() -> None:
    library = KernelLibrary(Path(sys.argv[1]))
    array = aligned((16,), np.uint8)
    somewhere = pointer(array)

    def cache(key: RowFormat, value: RowFormat) -> Cache:
        names = ("key", "value", "key_scale", "value_scale")[: 4 if key >= RowFormat.INT8 else 2]
        return Cache(**dict.fromkeys(names, somewhere), key_format=key, value_format=value, capacity=200)

    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "key_dim": 128, "value_dim": 128}
    arrays = dict.fromkeys(("q", "k", "v", "out"), somewhere)
    for formats, seq, more in (
        (PAIRS[1], 1, ()),
        (PAIRS[3], 1, ("recent_length",)),
        (PAIRS[3], 5, ()),
        (PAIRS[0], 5, ("past_visible",)),
    ):
        options = dict.fromkeys(("past_length", *more), somewhere)
        views = {"cache": cache(*formats), "recent": cache(*PAIRS[1])}
        try_attention(library, AttentionArgs(**arrays, **sizes, **options, **views, seq=seq, softmax_scale=1, causal=1))
    packed = {**sizes, "num_kv_heads": 4, "cu_seqlens": somewhere, "num_sequences": 2}
    try_attention(library, AttentionArgs(**arrays, **packed, seq=70, softmax_scale=1))
    for scale in (float("nan"), float("inf"), -float("inf"), 3e38, -2e6):
        told = refusal(library.attention, AttentionArgs(**arrays, **packed, seq=70, softmax_scale=scale))
        assert "softmax_scale is" in told, scale

    sizes = {"rows": 20, "in_features": 300, "out_features": 256, "group": 64, "activation": 0}
    arrays = dict.fromkeys(("x", "weight", "out"), somewhere)
    for bits, options in ((16, ()), (8, ("scale",)), (4, ("scale", "zero"))):
        try_linear(library, LinearArgs(**arrays, **sizes, **dict.fromkeys(options, somewhere), bits=bits))

    sizes = {"layers": 2, "batch": 1, "num_kv_heads": 2, "seq": 3, "key_dim": 128, "value_dim": 128}
    arrays = dict.fromkeys(("key", "value", "slots"), somewhere)
    for formats in (PAIRS[1], PAIRS[3]):
        assert try_append(library, AppendArgs(**arrays, **sizes, cache=cache(*formats))) > 1000

    for rows, vocab_size in itertools.product(VALUES, repeat=2):
        if rows not in SIZES or vocab_size not in SIZES:
            told = refusal(library.greedy, somewhere, rows, vocab_size, somewhere, somewhere)
            assert told.endswith("."), (rows, vocab_size)
    for row_format, dim in itertools.product([LEAST, -1, *range(5), MOST], [*VALUES, 72, 129]):
        bits = {0: 32, 1: 16, 2: 8, 3: 4}.get(row_format)
        expected = up_to(dim * bits // 8, 16) if bits and 0 < dim <= 128 else 0
        assert library.row_bytes(row_format, dim) == expected, (row_format, dim)


if __name__ == "__main__":
    main()
