"""FlashAttention2 in standard ONNX operators (opset 17), as the text that `onnx.parser.parse_function` reads.

A body makes a graph runnable anywhere and says exactly what the kernels must compute. It materialises the scores, and
a copy of the past in float32; only an engine that replaces the node does not. The op in another cache format has
another body, so each has a domain of its own, which begins with `OP_DOMAIN` (TensorRT's parser ignores domains).
"""

from __future__ import annotations

import dataclasses

from pascalvl.plugins.kv_format import ROTATED_DIM, KVFormat, LayerLayout, RowFormat
from pascalvl.plugins.ops.flash_attention.op import (
    ATTR_CAUSAL,
    ATTR_KV_FORMAT,
    ATTR_SOFTMAX_SCALE,
    OP_DOMAIN,
    OP_NAME,
)
from pascalvl.plugins.ops.onnx_text import FLOAT, INT, INT64, OPSET, UINT32, half_table, halves


@dataclasses.dataclass(frozen=True)
class CausalBody:
    """The op where causal, over one kind of cache."""

    kv_format: KVFormat = KVFormat.F32
    is_rotated: bool = False

    @classmethod
    def of(cls, layout: LayerLayout) -> CausalBody:
        return cls(layout.kv_format, layout.is_rotated)

    @property
    def domain(self) -> str:
        """Domain of the nodes that have this body."""
        if self == CausalBody():
            return OP_DOMAIN
        return ".".join([OP_DOMAIN, self.kv_format.value, *["rotated"] * self.is_rotated])

    @property
    def inputs(self) -> list[str]:
        """In the op's order."""
        return [
            *("q", "k", "v", "past_length", "past_visible", "past_key", "past_value"),
            *["past_scale"] * self.kv_format.is_quantised,
        ]

    @property
    def text(self) -> str:
        key_row, value_row = self.kv_format.rows
        sources = ["past", "new"]
        lines = [
            *_CONSTANTS,
            *(half_table() if self.kv_format is not KVFormat.F32 else ()),
            # Of the capacity, take what the longest sequence fills: the cost follows the past, not the capacity.
            "longest = ReduceMax <keepdims = 1> (past_length)",
            f"most = Cast <to = {INT64}> (longest)",
            "one_more = Add (most, one)",
            "most_words = Div (one_more, two)",
            "queries = Shape <start = 2, end = 3> (q)",
            *_rows("past_key", key_row, 0),
            *_rows("past_value", value_row, 1),
            *(_quantised_queries(self.is_rotated) if key_row.is_quantised else ["past_q = Identity (q)"]),
            *_VISIBLE_PAST,
            *_VISIBLE_NEW,
            "kv_heads = Shape <start = 0, end = 2> (k)",
            *(line for source in sources for line in _scores(source, "past_q" if source == "past" else "q")),
            f"scores = Concat <axis = 3> ({', '.join(f'{source}_scores' for source in sources)})",
            f"visible = Concat <axis = 2> ({', '.join(f'{source}_seen' for source in sources)})",
            *_attended(sources, value_row),
        ]
        return _function(self.domain, self.inputs, [ATTR_SOFTMAX_SCALE, ATTR_CAUSAL, ATTR_KV_FORMAT], lines)


def packed_body() -> str:
    """The op where not causal."""
    lines = [
        *_CONSTANTS,
        "total = Shape <start = 2, end = 3> (q)",
        *_range("tokens", "total"),
        "column = Unsqueeze (tokens, one)",
        "passed = GreaterOrEqual (column, cu_seqlens)",
        f"bounds_passed = Cast <to = {INT}> (passed)",
        "segment = ReduceSum <keepdims = 1> (bounds_passed, one)",
        "other = Transpose <perm = [1, 0]> (segment)",
        "visible = Equal (segment, other)",
        "keys = Transpose <perm = [0, 1, 3, 2]> (k)",
        "products = MatMul (q, keys)",
        "scores = Mul (products, scale)",
        "masked = Where (visible, scores, lowest)",
        "weights = Softmax <axis = -1> (masked)",
        "attended = MatMul (weights, v)",
        "output = Transpose <perm = [0, 2, 1, 3]> (attended)",
    ]
    return _function(OP_DOMAIN, ["q", "k", "v", "cu_seqlens"], [ATTR_SOFTMAX_SCALE, ATTR_CAUSAL], lines)


def _function(domain: str, inputs: list[str], attributes: list[str], lines: list[str]) -> str:
    return "\n".join(
        [
            f'<opset_import: ["" : {OPSET}], domain: "{domain}">',
            f"{OP_NAME} <{', '.join(attributes)}> ({', '.join(inputs)}) => (output) {{",
            *lines,
            "}",
        ]
    )


_CONSTANTS = [
    *(f"{name} = Constant <value_ints = [{value}]> ()" for name, value in (("zero", 0), ("one", 1), ("two", 2))),
    "three = Constant <value_ints = [3]> ()",
    "minus_one = Constant <value_ints = [-1]> ()",
    "axes_of_heads = Constant <value_ints = [1, 2]> ()",
    "first = Constant <value = int64 {0}> ()",
    "step = Constant <value = int64 {1}> ()",
    "lowest = Constant <value = float {-3.4028234663852886e38}> ()",
    f"scale = Constant <value_float : float = @{ATTR_SOFTMAX_SCALE}> ()",
]


def _range(name: str, length: str) -> list[str]:
    """``name`` = 0 to ``length`` - 1, int32; ``length`` has one element, of int64."""
    return [
        f"{name}_end = Squeeze ({length}, zero)",
        f"{name}_wide = Range (first, {name}_end, step)",
        f"{name} = Cast <to = {INT}> ({name}_wide)",
    ]


def _rows(name: str, row: RowFormat, which: int) -> list[str]:
    """Rows of the past as floats, ``past_keys`` or ``past_rows``; of quantised ones in the order of `_planar`."""
    result = ("past_keys", "past_rows")[which]
    lines = [f"{name}_cut = Slice ({name}, zero, most, two)"]
    if row is RowFormat.FLOAT32:
        return [*lines, f"{result} = Identity ({name}_cut)"]
    if row is RowFormat.FLOAT16:
        return [*lines, *halves(f"{name}_cut", result)]
    # A code is brought to a word's upper end, made positive there (of int8, by flipping its sign), and moved down.
    bits = 8 if row is RowFormat.INT8 else 4
    shifts = [24, 16, 8, 0] if row is RowFormat.INT8 else [28, 20, 12, 4, 24, 16, 8, 0]
    flipped = 1 << 31 if row is RowFormat.INT8 else 0
    planes = [f"{name}_plane{number}" for number in range(len(shifts))]
    lines += [
        f"{name}_flipped = Constant <value = uint32 {{{flipped}}}> ()",
        f"{name}_down = Constant <value = uint32 {{{32 - bits}}}> ()",
        f"{name}_centre = Constant <value = float {{{1 << bits - 1}}}> ()",
        f"{name}_words = Cast <to = {UINT32}> ({name}_cut)",
    ]
    for plane, shift in zip(planes, shifts, strict=True):
        lines += [
            f"{plane}_up = Constant <value = uint32 {{{shift}}}> ()",
            f'{plane}_upper = BitShift <direction = "LEFT"> ({name}_words, {plane}_up)',
            f"{plane}_positive = Add ({plane}_upper, {name}_flipped)",
            f'{plane}_codes = BitShift <direction = "RIGHT"> ({plane}_positive, {name}_down)',
            f"{plane} = Cast <to = {FLOAT}> ({plane}_codes)",
        ]
    return [
        *lines,
        f"{name}_biased = Concat <axis = 3> ({', '.join(planes)})",
        f"{name}_plain = Sub ({name}_biased, {name}_centre)",
        f"{name}_which = Constant <value = int64 {{{which}}}> ()",
        f"{name}_scales = Gather <axis = 0> (past_scale, {name}_which)",
        f"{name}_scale_words = Slice ({name}_scales, zero, most_words, two)",
        *halves(f"{name}_scale_words", f"{name}_scale_pairs"),
        f"{name}_scale = Slice ({name}_scale_pairs, zero, most, two)",
        f"{name}_scale_column = Unsqueeze ({name}_scale, three)",
        f"{result} = Mul ({name}_plain, {name}_scale_column)",
        f"{name}_planes = Constant <value_ints = [{len(shifts)}]> ()",
        f"{name}_words_of_row = Shape <start = 3, end = 4> ({name})",
        f"{name}_elements = Mul ({name}_words_of_row, {name}_planes)",
    ]


def _planar(name: str, x: str, result: str) -> list[str]:
    """Elements in the order in which those of rows ``name`` come out of their words: first the first of each word.

    To bring a few queries or new rows into that order costs less than to bring the whole past into the usual one.
    """
    return [
        f"{result}_dim = Shape <start = 3, end = 4> ({x})",
        f"{result}_missing = Sub ({name}_elements, {result}_dim)",
        f"{result}_no_pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0]> ()",
        f"{result}_pads = Concat <axis = 0> ({result}_no_pads, {result}_missing)",
        f"{result}_padded = Pad ({x}, {result}_pads)",
        *_swapped(f"{result}_padded", result, f"{name}_words_of_row, {name}_planes", name),
    ]


def _swapped(x: str, result: str, split: str, name: str) -> list[str]:
    """The last axis split in two, which change places."""
    return [
        f"{result}_lead = Shape <start = 0, end = 3> ({x})",
        f"{result}_splitting = Concat <axis = 0> ({result}_lead, {split})",
        f"{result}_split = Reshape ({x}, {result}_splitting)",
        f"{result}_turned = Transpose <perm = [0, 1, 2, 4, 3]> ({result}_split)",
        f"{result}_joining = Concat <axis = 0> ({result}_lead, {name}_elements)",
        f"{result} = Reshape ({result}_turned, {result}_joining)",
    ]


def _quantised_queries(is_rotated: bool) -> list[str]:
    """``past_q``: queries as they meet codes."""
    lines = ["turned = Identity (q)"]
    if is_rotated:
        # Sylvester's matrix, doubled from 1.
        lines = ["h1 = Constant <value = float[1, 1] {1.0}> ()"]
        size = 1
        while size < ROTATED_DIM:
            lines += [
                f"n{size} = Neg (h{size})",
                f"upper{size} = Concat <axis = 1> (h{size}, h{size})",
                f"lower{size} = Concat <axis = 1> (h{size}, n{size})",
                f"h{2 * size} = Concat <axis = 0> (upper{size}, lower{size})",
            ]
            size *= 2
        lines += [
            f"norm = Constant <value = float {{{ROTATED_DIM**-0.5!r}}}> ()",
            f"turned_long = MatMul (q, h{size})",
            "turned = Mul (turned_long, norm)",
        ]
    return [
        *lines,
        "no_float = Constant <value = float {0.0}> ()",
        "codes_most = Constant <value = float {127.0}> ()",
        "magnitudes = Abs (turned)",
        "largest = ReduceMax <axes = [-1], keepdims = 1> (magnitudes)",
        "is_something = Greater (largest, no_float)",
        "codes_per_unit = Div (codes_most, largest)",
        "inverse = Where (is_something, codes_per_unit, no_float)",
        "q_scaled = Mul (turned, inverse)",
        "q_codes = Round (q_scaled)",
        "q_scale = Div (largest, codes_most)",
        "q_stepped = Mul (q_codes, q_scale)",
        *_planar("past_key", "q_stepped", "past_q"),
    ]


_VISIBLE_PAST = [
    *_range("numbers", "queries"),
    "number_column = Unsqueeze (numbers, one)",
    *_range("slots", "most"),
    "past_column = Unsqueeze (past_length, one)",
    "in_past = Less (slots, past_column)",
    "in_past_of_all = Unsqueeze (in_past, one)",
    "past_visible_cut = Slice (past_visible, zero, most, one)",
    "past_visible_of_all = Unsqueeze (past_visible_cut, one)",
    "in_sight = Less (number_column, past_visible_of_all)",
    "past_seen = And (in_past_of_all, in_sight)",
]
_VISIBLE_NEW = [
    "not_later = GreaterOrEqual (number_column, numbers)",
    "batch = Shape <start = 0, end = 1> (q)",
    "new_shape = Concat <axis = 0> (batch, queries, one)",
    "new_seen = Expand (not_later, new_shape)",
    "new_keys = Identity (k)",
    "new_rows = Identity (v)",
]


def _scores(source: str, queries: str) -> list[str]:
    """The queries of a group stay folded on one axis, so that its keys are not repeated in memory."""
    return [
        f"{source}_width = Shape <start = 3, end = 4> ({queries})",
        f"{source}_folding = Concat <axis = 0> (kv_heads, minus_one, {source}_width)",
        f"{source}_folded = Reshape ({queries}, {source}_folding)",
        f"{source}_columns = Transpose <perm = [0, 1, 3, 2]> ({source}_keys)",
        f"{source}_products = MatMul ({source}_folded, {source}_columns)",
        f"{source}_scores = Mul ({source}_products, scale)",
    ]


def _attended(sources: list[str], value_row: RowFormat) -> list[str]:
    """Scores to the output."""
    rows, after = [f"{source}_rows" for source in sources], ["plain = Identity (attended)"]
    lines = []
    if value_row.is_quantised:
        lines = [line for row in rows[1:] for line in _planar("past_value", row, f"{row}_planar")]
        rows[1:] = [f"{row}_planar" for row in rows[1:]]
        after = [
            *_swapped("attended", "padded", "past_value_planes, past_value_words_of_row", "past_value"),
            "value_dim = Shape <start = 3, end = 4> (v)",
            "plain = Slice (padded, zero, value_dim, three)",
        ]
    return [
        *lines,
        f"values = Concat <axis = 2> ({', '.join(rows)})",
        "lengths = Shape <start = 3, end = 4> (scores)",
        "unfolding = Concat <axis = 0> (kv_heads, minus_one, queries, lengths)",
        "unfolded = Reshape (scores, unfolding)",
        "visible_of_heads = Unsqueeze (visible, axes_of_heads)",
        "masked = Where (visible_of_heads, unfolded, lowest)",
        "weights = Softmax <axis = -1> (masked)",
        "shape = Shape (scores)",
        "folded_weights = Reshape (weights, shape)",
        "attended = MatMul (folded_weights, values)",
        *after,
        "heads = Shape <start = 0, end = 3> (q)",
        "whole = Concat <axis = 0> (heads, minus_one)",
        "of_heads = Reshape (plain, whole)",
        "output = Transpose <perm = [0, 2, 1, 3]> (of_heads)",
    ]
