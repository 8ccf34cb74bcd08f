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
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, AttentionArgs, KernelLibrary, LinearArgs, Rows
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

Field = tuple[ctypes.Structure, str, list[int]]


def up_to(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# What pascalvl.h says -------------------------------------------------------------------------------------------------


def attention_bytes(a: AttentionArgs) -> int | None:
    """Of workspace; None: the call is refused."""
    in_grid = a.num_heads in GRID and a.num_kv_heads in GRID
    if not in_grid or a.tokens not in SIZES or a.num_heads % a.num_kv_heads:
        return None
    rows, group = a.num_heads * a.tokens, a.num_heads // a.num_kv_heads
    if rows > LIMITS["ROWS"]:
        return None
    if not a.causal:
        dims = a.head_dim == a.value_dim and a.head_dim in (64, 72, 128)
        return 12 * rows * a.head_dim if dims and group == 1 and a.batch in SIZES else None
    if a.batch not in GRID:
        return None
    if not {a.head_dim, a.value_dim} <= {64, 96, 112, 128}:
        return None
    quantised = a.key_format >= RowFormat.INT8
    known = (a.key_format, a.value_format) in [tuple(map(int, pair)) for pair in PAIRS]
    if not known or (a.rotated and not (quantised and a.head_dim == 128)) or quantised > bool(a.new_rows.scale):
        return None
    capacity = 128 * a.sequence_pages
    if a.past_length:
        pool = a.num_pages in SIZES and 128 * a.num_pages * a.num_kv_heads <= LIMITS["ROWS"]
        table = a.sequence_pages in SIZES and a.batch * capacity <= LIMITS["ROWS"]
        if not pool or not table or quantised > bool(a.pool.scale):
            return None
    tile = 128 if a.value_dim <= 72 else 32 if a.tokens * group <= 32 else 64
    if a.tokens * group // tile + a.batch + 1 not in GRID:
        return None
    partial, wanted = (a.value_dim + 4) * 4, 2 * MULTIPROCESSORS
    size = rows * 128 + up_to(rows * 4, 16) if quantised else rows * a.head_dim * 4
    is_step = a.tokens <= a.batch
    decodes = a.past_length and not a.past_visible and group in (1, 2, 4, 8) and (is_step or a.batch > 1)
    if decodes:
        size += a.batch * a.num_heads * max(1, min(capacity // 128, wanted // a.num_kv_heads)) * partial
    if a.past_length and not (decodes and is_step):
        keys = 128 if a.value_dim > 72 else 64
        blocks = (up_to(a.tokens * group, tile) // tile + a.batch - 1) * a.num_kv_heads
        splits = min(capacity // (2 * keys), wanted // blocks)
        size += rows * splits * partial if splits > 1 else 0
    return size


def is_appended(a: AppendArgs, layer: AppendLayer) -> bool:
    in_grid = a.num_layers in (1, 2) and a.num_kv_heads in GRID
    fits = a.tokens in SIZES and a.num_kv_heads * a.tokens <= LIMITS["ROWS"]
    pool = a.num_pages in SIZES and 128 * a.num_pages * a.num_kv_heads <= LIMITS["ROWS"]
    return in_grid and fits and pool and {layer.key_row, layer.value_row} <= set(range(16, 513, 16))


def linear_bytes(a: LinearArgs) -> list[int]:
    """What the workspace may have, for any number of splits; empty: the call is refused."""
    fits = a.rows in GRID and a.in_features in SIZES and a.out_features in SIZES and a.activation in (0, 1, 2, 3)
    if not fits or (a.activation == 2 and a.out_features % 128):
        return []
    in_codes = a.bits in (8, 4)
    if a.bits not in (32, 16, 8, 4) or (in_codes and a.group not in (32, 64, 128)):
        return []
    if bool(a.scale) != in_codes or (a.zero and not in_codes):
        return []
    if a.norm not in (0, 1, 2) or bool(a.norm_weight) != (a.norm > 0) or bool(a.norm_bias) != (a.norm == 2):
        return []
    if a.norm and (a.norm_size not in SIZES or a.in_features % a.norm_size):
        return []
    if a.norm and in_codes and a.norm_size != a.in_features and a.norm_size % a.group:
        return []
    size = up_to(4 * a.rows * a.in_features, 16) if a.norm else 0
    if in_codes:
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


def try_append(library: KernelLibrary, args: AppendArgs, layer: AppendLayer) -> int:
    refused = 0
    for case in itertools.chain(each(args), each(layer)):
        if not is_appended(args, layer) and args.num_layers <= 2:  # there are no more to look at
            refused += 1
            assert refusal(library.kv_append, args).endswith("."), case
    return refused


def main() -> None:
    library = KernelLibrary(Path(sys.argv[1]))
    array = aligned((16,), np.uint8)
    somewhere = pointer(array)

    rows = Rows(key=somewhere, value=somewhere, scale=somewhere)
    sizes = {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "value_dim": 128, "softmax_scale": 1}
    arrays = dict.fromkeys(("qkv", "out", "cu_seqlens"), somewhere)
    for formats, tokens, more in (
        (PAIRS[1], 1, ()),
        (PAIRS[3], 1, ()),
        (PAIRS[3], 5, ()),
        (PAIRS[0], 5, ("past_visible",)),
    ):
        options = dict.fromkeys(("past_length", "page_table", *more), somewhere)
        of_cache = {
            "new_rows": rows,
            "pool": rows,
            "num_pages": 5,
            "sequence_pages": 2,
            "key_format": formats[0],
            "value_format": formats[1],
        }
        try_attention(library, AttentionArgs(**arrays, **sizes, **options, **of_cache, tokens=tokens, causal=1))
    packed = {**sizes, "num_kv_heads": 4, "batch": 2, "new_rows": rows}
    try_attention(library, AttentionArgs(**arrays, **packed, tokens=70))
    packed.pop("softmax_scale")
    for scale in (float("nan"), float("inf"), -float("inf"), 3e38, -2e6):
        told = refusal(library.attention, AttentionArgs(**arrays, **packed, tokens=70, softmax_scale=scale))
        assert "softmax_scale is" in told, scale

    sizes = {"rows": 20, "in_features": 300, "out_features": 256, "group": 64, "activation": 0}
    arrays = dict.fromkeys(("x", "weight", "out"), somewhere)
    for bits, norm, norm_size, options in (
        (32, 1, 150, ("norm_weight",)),
        (16, 0, 0, ()),
        (8, 2, 300, ("scale", "norm_weight", "norm_bias")),
        (4, 0, 0, ("scale", "zero")),
    ):
        normed = {"norm": norm, "norm_size": norm_size}
        try_linear(library, LinearArgs(**arrays, **sizes, **dict.fromkeys(options, somewhere), bits=bits, **normed))
    for epsilon in (float("nan"), float("inf"), -float("inf"), -1e-30):
        options = {"norm": 1, "norm_size": 300, "norm_weight": somewhere, "epsilon": epsilon}
        told = refusal(library.linear_workspace, LinearArgs(**arrays, **sizes, **options, bits=16))
        assert "epsilon is" in told, epsilon

    layers = [AppendLayer(new_rows=rows, pool=rows, key_row=128, value_row=64) for _ in range(2)]
    args = AppendArgs.of(layers, slots=somewhere, num_kv_heads=2, tokens=3, num_pages=9)
    assert try_append(library, args, args._layers[1]) > 1000

    for count, vocab_size in itertools.product(VALUES, repeat=2):
        if count not in SIZES or vocab_size not in SIZES:
            told = refusal(library.choose, somewhere, count, vocab_size, 0, somewhere, somewhere)
            assert told.endswith("."), (count, vocab_size)
    for rows, width, count in itertools.product(VALUES, repeat=3):
        if rows not in SIZES or width not in SIZES or width % 4 or count not in GRID:
            told = refusal(library.gather_rows, somewhere, rows, width, somewhere, count, somewhere)
            assert told.endswith("."), (rows, width, count)
    for rows, width in itertools.product(VALUES, repeat=2):
        if rows not in SIZES or width not in SIZES or width % 4 or rows * width > LIMITS["ROWS"]:
            told = refusal(library.add_to, somewhere, somewhere, rows, width)
            assert told.endswith("."), (rows, width)
    for row_format, dim in itertools.product([LEAST, -1, *range(5), MOST], [*VALUES, 72, 129]):
        bits = {0: 32, 1: 16, 2: 8, 3: 4}.get(row_format)
        expected = up_to(dim * bits // 8, 16) if bits and 0 < dim <= 128 else 0
        assert library.row_bytes(row_format, dim) == expected, (row_format, dim)


if __name__ == "__main__":
    main()
