"""FlashAttention2 in standard ONNX operators (opset 17), as the text that `onnx.parser.parse_function` reads.

A body makes a graph runnable anywhere and says exactly what the kernels must compute. It materialises the scores, and
a copy of the past in float32; only an engine that replaces the node does not. The op in another cache format has
another body, so each has a domain of its own, which begins with `OP_DOMAIN` (TensorRT's parser ignores domains).

Where causal, norms, RoPE and the cache's format are computed token by token, ``[heads, tokens, dim]``. For attention,
tokens are gathered to ``[batch, heads, seq, dim]``, seq as the longest sequence has it: the work grows with the number
of sequences and not with its square, and nothing of a sequence, a number that is none for example, reaches another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pascalvl.plugins.kv_format import PAGE_SLOTS, ROTATED_DIM, KVFormat, LayerLayout, RowFormat
from pascalvl.plugins.ops.flash_attention.op import (
    ATTR_CAUSAL,
    ATTR_EPSILON,
    ATTR_HEAD_DIM,
    ATTR_KV_FORMAT,
    ATTR_NUM_HEADS,
    ATTR_NUM_KV_HEADS,
    ATTR_SOFTMAX_SCALE,
    ATTR_VALUE_DIM,
    OP_DOMAIN,
    OP_NAME,
)
from pascalvl.plugins.ops.onnx_text import FLOAT, HALF, INT, INT64, OPSET, UINT32, half_bits, half_table, halves

PACKED_INPUTS = ("qkv", "rope_cos", "rope_sin", "cu_seqlens")
"""Those of the op where not causal, in its order."""
PACKED_ATTRIBUTES = (
    *(ATTR_CAUSAL, ATTR_SOFTMAX_SCALE, ATTR_EPSILON),
    *(ATTR_NUM_HEADS, ATTR_NUM_KV_HEADS, ATTR_HEAD_DIM, ATTR_VALUE_DIM),
)


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
            *("qkv", "q_norm", "k_norm", "rope_cos", "rope_sin"),
            *("cu_seqlens", "past_length", "page_table", "past_visible", "past_key", "past_value"),
            *["past_scale"] * self.kv_format.is_quantised,
        ]

    @property
    def outputs(self) -> list[str]:
        """In the op's order."""
        return ["output", "new_key", "new_value", *["new_scale"] * self.kv_format.is_quantised]

    @property
    def text(self) -> str:
        key_row, value_row = self.kv_format.rows
        lines = [
            *(half_table() if self.kv_format is not KVFormat.F32 else ()),
            *_PROLOGUE,
            *(_hadamard("roped_heads", "qk_rows") if self.is_rotated else ["qk_rows = Identity (roped_heads)"]),
            "q = Slice (qk_rows, zero, num_heads, zero)",
            "k = Slice (qk_rows, num_heads, qk_heads, zero)",
            *_PLACES,
            *_PAGES,
            *(_PAST_SCALES if self.kv_format.is_quantised else ()),
            *_past_rows("key", key_row),
            *_past_rows("value", value_row),
            *_new_rows("key", "k", key_row),
            *_new_rows("value", "v", value_row),
            *(_NEW_SCALES if self.kv_format.is_quantised else ()),
            *(_QUANTISED_QUERIES if key_row.is_quantised else ["queries = Identity (q)"]),
            *_of_sequences("queries"),
            *_of_sequences("new_keys"),
            *_of_sequences("new_values"),
            *_VISIBLE,
            *_SCORES,
            *_attended(value_row),
        ]
        return _function(self.domain, self.inputs, self.outputs, [*PACKED_ATTRIBUTES, ATTR_KV_FORMAT], lines)


def packed_body() -> str:
    """The op where not causal."""
    lines = [
        *PACKED_PROLOGUE,
        "rows_of_heads = Transpose <perm = [1, 0, 2]> (roped)",
        "q, k = Split <axis = 0> (rows_of_heads)",
        "v_of = Concat <axis = 0> (zero, num_heads, head_dim)",
        "v_tokens = Reshape (v_flat, v_of)",
        "v = Transpose <perm = [1, 0, 2]> (v_tokens)",
        "total = Shape <start = 0, end = 1> (qkv)",
        *_range("tokens", "total"),
        "column = Unsqueeze (tokens, one)",
        "passed = GreaterOrEqual (column, cu_seqlens)",
        f"bounds_passed = Cast <to = {INT}> (passed)",
        "segment = ReduceSum <keepdims = 1> (bounds_passed, one)",
        "other = Transpose <perm = [1, 0]> (segment)",
        "visible = Equal (segment, other)",
        "keys = Transpose <perm = [0, 2, 1]> (k)",
        "products = MatMul (q, keys)",
        "scores = Mul (products, scale)",
        "masked = Where (visible, scores, lowest)",
        "weights = Softmax <axis = -1> (masked)",
        "attended = MatMul (weights, v)",
        "of_tokens = Transpose <perm = [1, 0, 2]> (attended)",
        "flat = Concat <axis = 0> (zero, minus_one)",
        "output = Reshape (of_tokens, flat)",
    ]
    return _function(OP_DOMAIN, PACKED_INPUTS, ["output"], PACKED_ATTRIBUTES, lines)


def _function(
    domain: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[str], lines: list[str]
) -> str:
    return "\n".join(
        [
            f'<opset_import: ["" : {OPSET}], domain: "{domain}">',
            f"{OP_NAME} <{', '.join(attributes)}> ({', '.join(inputs)}) => ({', '.join(outputs)}) {{",
            *lines,
            "}",
        ]
    )


_SIZES = (ATTR_NUM_HEADS, ATTR_NUM_KV_HEADS, ATTR_HEAD_DIM, ATTR_VALUE_DIM)
_CONSTANTS = [
    *(f"{name} = Constant <value_ints = [{value}]> ()" for name, value in (("zero", 0), ("one", 1), ("two", 2))),
    "three = Constant <value_ints = [3]> ()",
    "minus_one = Constant <value_ints = [-1]> ()",
    "axes_of_heads = Constant <value_ints = [1, 2]> ()",
    "first = Constant <value = int64 {0}> ()",
    "step = Constant <value = int64 {1}> ()",
    "no_float = Constant <value = float {0.0}> ()",
    "unit = Constant <value = float {1.0}> ()",
    "lowest = Constant <value = float {-3.4028234663852886e38}> ()",
    f"scale = Constant <value_float : float = @{ATTR_SOFTMAX_SCALE}> ()",
    *(f"{size}_ = Constant <value_int : int = @{size}> ()" for size in _SIZES),
    *(f"{size} = Unsqueeze ({size}_, zero)" for size in _SIZES),
]


def _range(name: str, length: str) -> list[str]:
    """``name`` = 0 to ``length`` - 1, int32; ``length`` has one element, of int64."""
    return [
        f"{name}_end = Squeeze ({length}, zero)",
        f"{name}_wide = Range (first, {name}_end, step)",
        f"{name} = Cast <to = {INT}> ({name}_wide)",
    ]


# Prologue -------------------------------------------------------------------------------------------------------------

_ROPE = [
    "lower, upper = Split <axis = -1> (plain)",
    "minus_upper = Neg (upper)",
    "turned = Concat <axis = -1> (minus_upper, lower)",
    "by_cos = Mul (plain, cos)",
    "by_sin = Mul (turned, sin)",
    "roped = Add (by_cos, by_sin)",
]
"""``plain [..., heads, head_dim]`` to ``roped``, with ``cos`` and ``sin [..., 1, head_dim]``."""

PACKED_PROLOGUE = [
    *_CONSTANTS,
    "width = Shape <start = 1, end = 2> (qkv)",
    "q_width = Mul (num_heads, head_dim)",
    "qk_width = Mul (q_width, two)",
    "qk_flat = Slice (qkv, zero, qk_width, one)",
    "v_flat = Slice (qkv, qk_width, width, one)",
    "qk_of = Concat <axis = 0> (zero, minus_one, head_dim)",
    "plain = Reshape (qk_flat, qk_of)",
    "cos = Unsqueeze (rope_cos, one)",
    "sin = Unsqueeze (rope_sin, one)",
    *_ROPE,
]
"""Where not causal: ``roped [tokens, 2 num_heads, head_dim]``, queries and then keys, and values ``v_flat [tokens,
num_heads * head_dim]``; and constants, as `_CONSTANTS` names them."""

_PROLOGUE = [
    *_CONSTANTS,
    "total = Shape <start = 0, end = 1> (qkv)",
    "width = Shape <start = 1, end = 2> (qkv)",
    "qk_heads = Add (num_heads, num_kv_heads)",
    "qk_width = Mul (qk_heads, head_dim)",
    "qk_flat = Slice (qkv, zero, qk_width, one)",
    "v_flat = Slice (qkv, qk_width, width, one)",
    "qk_of = Concat <axis = 0> (zero, qk_heads, head_dim)",
    "qk = Reshape (qk_flat, qk_of)",
    "v_of = Concat <axis = 0> (zero, num_kv_heads, value_dim)",
    "v_tokens = Reshape (v_flat, v_of)",
    "v = Transpose <perm = [1, 0, 2]> (v_tokens)",
    f"epsilon = Constant <value_float : float = @{ATTR_EPSILON}> ()",
    "squares = Mul (qk, qk)",
    "mean_square = ReduceMean <axes = [-1], keepdims = 1> (squares)",
    "variance = Add (mean_square, epsilon)",
    "deviation = Sqrt (variance)",
    "inverse_deviation = Reciprocal (deviation)",
    "of_unit_size = Mul (qk, inverse_deviation)",
    "q_norm_of = Concat <axis = 0> (num_heads, head_dim)",
    "k_norm_of = Concat <axis = 0> (num_kv_heads, head_dim)",
    "q_norms = Expand (q_norm, q_norm_of)",
    "k_norms = Expand (k_norm, k_norm_of)",
    "norms = Concat <axis = 0> (q_norms, k_norms)",
    "plain = Mul (of_unit_size, norms)",
    "cos = Unsqueeze (rope_cos, one)",
    "sin = Unsqueeze (rope_sin, one)",
    *_ROPE,
    "roped_heads = Transpose <perm = [1, 0, 2]> (roped)",
]
"""Where causal: queries and then keys ``roped_heads [num_heads + num_kv_heads, tokens, head_dim]``, and values ``v
[num_kv_heads, tokens, value_dim]``."""


def _hadamard(x: str, result: str) -> list[str]:
    """As `pascalvl.plugins.kv_rows.hadamard` of rows of `ROTATED_DIM`, with its order of additions."""
    lines, step, rows = [], 1, x
    while step < ROTATED_DIM:
        name = f"{result}_{step}"
        lines += [
            f"{name}_pairs_of = Constant <value_ints = [0, 0, {ROTATED_DIM // step // 2}, {2 * step}]> ()",
            f"{name}_pairs = Reshape ({rows}, {name}_pairs_of)",
            f"{name}_a, {name}_b = Split <axis = -1> ({name}_pairs)",
            f"{name}_sum = Add ({name}_a, {name}_b)",
            f"{name}_difference = Sub ({name}_a, {name}_b)",
            f"{name} = Concat <axis = -1> ({name}_sum, {name}_difference)",
        ]
        rows, step = name, 2 * step
    return [
        *lines,
        f"{result}_of = Constant <value_ints = [0, 0, {ROTATED_DIM}]> ()",
        f"{result}_long = Reshape ({rows}, {result}_of)",
        f"{result}_norm = Constant <value = float {{{ROTATED_DIM**-0.5!r}}}> ()",
        f"{result} = Mul ({result}_long, {result}_norm)",
    ]


# Sequences ------------------------------------------------------------------------------------------------------------

_PLACES = [
    "batch = Shape (past_length)",
    f"batch_int = Cast <to = {INT}> (batch)",
    "one_int = Constant <value = int32[1] {1}> ()",
    "zero_int = Constant <value = int32[1] {0}> ()",
    "last_sequence = Sub (batch_int, one_int)",
    "bounds = Add (batch, one)",
    "begins = Slice (cu_seqlens, zero, batch, zero)",
    "ends = Slice (cu_seqlens, one, bounds, zero)",
    "sequence_lengths = Sub (ends, begins)",
    "longest_new = ReduceMax <keepdims = 1> (sequence_lengths)",
    # One where there is nothing but padding.
    "seq_int = Max (longest_new, one_int)",
    f"seq = Cast <to = {INT64}> (seq_int)",
    *_range("numbers", "seq"),
    # The token that is a sequence's number so and so; beyond its last, that: no other sequence's is read in its place.
    "begin_column = Unsqueeze (begins, one)",
    "end_column = Unsqueeze (ends, one)",
    "last_column = Sub (end_column, one_int)",
    "numbered = Add (begin_column, numbers)",
    "own_or_none = Min (numbered, last_column)",
    "token_at = Max (own_or_none, zero_int)",
    # Where a token is in [batch * seq]; padding, anywhere.
    *_range("tokens", "total"),
    "token_column = Unsqueeze (tokens, one)",
    "passed = GreaterOrEqual (token_column, ends)",
    f"ends_passed = Cast <to = {INT}> (passed)",
    "any_sequence = ReduceSum <keepdims = 0> (ends_passed, one)",
    "sequence = Min (any_sequence, last_sequence)",
    "begin = Gather (begins, sequence)",
    "any_number = Sub (tokens, begin)",
    "last_number = Sub (seq_int, one_int)",
    "number = Min (any_number, last_number)",
    "sequence_start = Mul (sequence, seq_int)",
    "place = Add (sequence_start, number)",
]
"""``batch``; ``seq``, the most tokens of a sequence; ``token_at [batch, seq]`` and its inverse, ``place [tokens]``."""

_PAGES = [
    # Of a sequence's pages, take as many as the longest past fills: the cost follows the past, not the capacity.
    "longest = ReduceMax <keepdims = 1> (past_length)",
    f"most = Cast <to = {INT64}> (longest)",
    f"page_slots = Constant <value_ints = [{PAGE_SLOTS}]> ()",
    f"page_slots_less_one = Constant <value_ints = [{PAGE_SLOTS - 1}]> ()",
    "most_rounded = Add (most, page_slots_less_one)",
    "most_pages = Div (most_rounded, page_slots)",
    "past_slots = Mul (most_pages, page_slots)",
    "page_table_cut = Slice (page_table, zero, most_pages, one)",
    # Each head of a page on its own, so that they come out in the order of attention, in the one copy.
    "pages = Unsqueeze (page_table_cut, one)",
    *_range("kv_heads", "num_kv_heads"),
    "kv_head_column = Unsqueeze (kv_heads, one)",
    f"num_kv_heads_int = Cast <to = {INT}> (num_kv_heads)",
    "page_starts = Mul (pages, num_kv_heads_int)",
    "pages_of_heads = Add (page_starts, kv_head_column)",
]
"""``past_slots`` of each sequence; and where the pages that have them lie, ``pages_of_heads [batch, num_kv_heads,
sequence_pages]``, in a pool ``[pages * num_kv_heads, PAGE_SLOTS, row]``."""


def _gathered(pool: str, result: str, row: Sequence[str] = ()) -> list[str]:
    """Of a pool ``[pages, num_kv_heads, PAGE_SLOTS, *row]`` what attention reads, ``[batch, num_kv_heads, past_slots,
    *row]``; ``row`` names the row's length."""
    return [
        f"{result}_flat_of = Concat <axis = 0> ({', '.join(['minus_one', 'page_slots', *row])})",
        f"{result}_flat = Reshape ({pool}, {result}_flat_of)",
        f"{result}_pages = Gather ({result}_flat, pages_of_heads)",
        f"{result}_of = Concat <axis = 0> ({', '.join(['zero', 'zero', 'minus_one', *row])})",
        f"{result} = Reshape ({result}_pages, {result}_of)",
    ]


def _of_sequences(x: str) -> list[str]:
    """``x_of [batch, heads, seq, dim]`` of ``x [heads, tokens, dim]``."""
    return [
        f"{x}_of_heads = Gather <axis = 1> ({x}, token_at)",
        f"{x}_of = Transpose <perm = [1, 0, 2, 3]> ({x}_of_heads)",
    ]


# Rows -----------------------------------------------------------------------------------------------------------------

_PAST_SCALES = [
    *_gathered("past_scale", "past_scale_cut"),
    "past_scale_words = Unsqueeze (past_scale_cut, three)",
    *halves("past_scale_words", "past_scales"),
    "past_key_scale, past_value_scale = Split <axis = -1> (past_scales)",
]
_NEW_SCALES = [
    "new_scales = Concat <axis = -1> (new_key_scale, new_value_scale)",
    *half_bits("new_scales", "new_scale_words"),
    "new_scale = Squeeze (new_scale_words, two)",
]

_NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]
"""Where a word holds each of eight 4-bit codes."""


def _bits_below(row: RowFormat) -> list[int]:
    """Of the codes in a word, in the order of their elements: how many bits lie below each."""
    return [0, 8, 16, 24] if row is RowFormat.INT8 else [4 * nibble for nibble in _NIBBLES]


def _past_rows(name: str, row: RowFormat) -> list[str]:
    """Rows of the past as floats, ``past_keys`` or ``past_values``, ``[batch, num_kv_heads, past_slots, row]``; of
    quantised ones in the order of `_planar`."""
    result, past = f"past_{name}s", f"past_{name}"
    lines = [
        f"{name}_words = Shape <start = 3, end = 4> ({past})",
        *_gathered(past, f"{past}_cut", [f"{name}_words"]),
    ]
    if row is RowFormat.FLOAT32:
        return [*lines, f"{result} = Identity ({past}_cut)"]
    if row is RowFormat.FLOAT16:
        return [*lines, *halves(f"{past}_cut", result)]
    # A code is brought to a word's upper end, made positive there (of int8, by flipping its sign), and moved down.
    below = _bits_below(row)
    bits = 32 // len(below)
    flipped = 1 << 31 if row is RowFormat.INT8 else 0
    planes = [f"{past}_plane{number}" for number in range(len(below))]
    lines += [
        f"{past}_flipped = Constant <value = uint32 {{{flipped}}}> ()",
        f"{past}_down = Constant <value = uint32 {{{32 - bits}}}> ()",
        f"{past}_centre = Constant <value = float {{{1 << bits - 1}}}> ()",
        f"{past}_words = Cast <to = {UINT32}> ({past}_cut)",
    ]
    for plane, place in zip(planes, below, strict=True):
        lines += [
            f"{plane}_up = Constant <value = uint32 {{{32 - bits - place}}}> ()",
            f'{plane}_upper = BitShift <direction = "LEFT"> ({past}_words, {plane}_up)',
            f"{plane}_positive = Add ({plane}_upper, {past}_flipped)",
            f'{plane}_codes = BitShift <direction = "RIGHT"> ({plane}_positive, {past}_down)',
            f"{plane} = Cast <to = {FLOAT}> ({plane}_codes)",
        ]
    return [
        *lines,
        f"{past}_biased = Concat <axis = 3> ({', '.join(planes)})",
        f"{past}_plain = Sub ({past}_biased, {past}_centre)",
        f"{result} = Mul ({past}_plain, {past}_scale)",
        f"{name}_planes = Constant <value_ints = [{len(below)}]> ()",
        f"{name}_elements = Mul ({name}_words, {name}_planes)",
    ]


def _new_rows(name: str, x: str, row: RowFormat) -> list[str]:
    """Rows ``x`` in the cache's format, ``new_key`` or ``new_value``, and those as `_past_rows` gives the past's."""
    result, new = f"new_{name}s", f"new_{name}"
    if row is RowFormat.FLOAT32:
        return [f"{new} = Identity ({x})", f"{result} = Identity ({x})"]
    if row is RowFormat.FLOAT16:
        return [*half_bits(x, new), f"{result} = Identity ({new}_floats)"]
    return [
        *_largest(new, x, row),
        # The scale as it is stored, and without a sign where it is 0.
        f"{new}_half = Cast <to = {HALF}> ({new}_wide)",
        f"{new}_signed = Cast <to = {FLOAT}> ({new}_half)",
        f"{new}_is_none = Equal ({new}_signed, no_float)",
        f"{new}_scale = Where ({new}_is_none, no_float, {new}_signed)",
        f"{new}_any_inverse = Div (unit, {new}_scale)",
        f"{new}_inverse = Where ({new}_is_none, no_float, {new}_any_inverse)",
        f"{new}_scaled = Mul ({x}, {new}_inverse)",
        f"{new}_steps = Round ({new}_scaled)",
        # Infinity times zero.
        f"{new}_is_no_number = IsNaN ({new}_steps)",
        f"{new}_numbers = Where ({new}_is_no_number, no_float, {new}_steps)",
        f"{new}_codes = Clip ({new}_numbers, {new}_least_code, {new}_most_code)",
        *_packed(new, row),
        f"{new}_stepped = Mul ({new}_codes, {new}_scale)",
        *_planar(name, f"{new}_stepped", result),
    ]


def _largest(new: str, x: str, row: RowFormat) -> list[str]:
    """``new_wide``: the scale of each row in float32; and the bounds of codes."""
    least, most = (-127, 127) if row is RowFormat.INT8 else (-8, 7)
    lines = [
        f"{new}_least_code = Constant <value = float {{{least}.0}}> ()",
        f"{new}_most_code = Constant <value = float {{{most}.0}}> ()",
    ]
    if row is RowFormat.INT8:
        return [
            *lines,
            f"{new}_magnitudes = Abs ({x})",
            f"{new}_largest = ReduceMax <axes = [-1], keepdims = 1> ({new}_magnitudes)",
            f"{new}_wide = Div ({new}_largest, {new}_most_code)",
        ]
    return [
        *lines,
        f"{new}_most = ReduceMax <axes = [-1], keepdims = 1> ({x})",
        f"{new}_least = ReduceMin <axes = [-1], keepdims = 1> ({x})",
        f"{new}_minus_least = Neg ({new}_least)",
        f"{new}_is_most = GreaterOrEqual ({new}_most, {new}_minus_least)",
        f"{new}_largest = Where ({new}_is_most, {new}_most, {new}_least)",
        f"{new}_wide = Div ({new}_largest, {new}_least_code)",
    ]


def _packed(new: str, row: RowFormat) -> list[str]:
    """``new_codes`` in words: the sum of each code times what its place is worth.

    Codes are taken as positive, but for the one in a word's upper end, which gives the word its sign.
    """
    below = _bits_below(row)
    bits = 32 // len(below)
    uppermost = [place == max(below) for place in below]
    places = ", ".join(str(1 << place) for place in below)
    # Of int8, the others that are negative take 2^8; of int4, which is stored with 8 more, the upper half loses 2^4.
    by = ", ".join(str(-16 * upper if row is RowFormat.INT4 else 256 * (not upper)) for upper in uppermost)
    more, bound, compare = (8, 8, "GreaterOrEqual") if row is RowFormat.INT4 else (0, 0, "Less")
    return [
        f"{new}_more = Constant <value = int32 {{{more}}}> ()",
        f"{new}_bound = Constant <value = int32 {{{bound}}}> ()",
        f"{new}_by = Constant <value = int32[{len(below)}] {{{by}}}> ()",
        f"{new}_places = Constant <value = int32[{len(below)}] {{{places}}}> ()",
        f"{new}_words_of = Constant <value_ints = [0, 0, -1, {32 // bits}]> ()",
        f"{new}_signed_codes = Cast <to = {INT}> ({new}_codes)",
        f"{new}_stored_codes = Add ({new}_signed_codes, {new}_more)",
        f"{new}_grouped = Reshape ({new}_stored_codes, {new}_words_of)",
        f"{new}_is_other = {compare} ({new}_grouped, {new}_bound)",
        f"{new}_others = Cast <to = {INT}> ({new}_is_other)",
        f"{new}_wraps = Mul ({new}_others, {new}_by)",
        f"{new}_wrapped = Add ({new}_grouped, {new}_wraps)",
        f"{new}_placed = Mul ({new}_wrapped, {new}_places)",
        f"{new}_used = ReduceSum <keepdims = 0> ({new}_placed, three)",
        *_padded(f"{new}_used", new, f"{new.removeprefix('new_')}_words"),
    ]


def _padded(x: str, result: str, size: str) -> list[str]:
    """The last of three axes with zeros up to ``size``."""
    return [
        f"{result}_dim = Shape <start = 2, end = 3> ({x})",
        f"{result}_missing = Sub ({size}, {result}_dim)",
        f"{result}_no_pads = Constant <value_ints = [0, 0, 0, 0, 0]> ()",
        f"{result}_pads = Concat <axis = 0> ({result}_no_pads, {result}_missing)",
        f"{result} = Pad ({x}, {result}_pads)",
    ]


def _planar(name: str, x: str, result: str) -> list[str]:
    """Elements in the order in which those of ``past_name`` come out of their words: first the first of each word.

    To bring a few queries or new rows into that order costs less than to bring the whole past into the usual one.
    """
    return [
        *_padded(x, f"{result}_padded", f"{name}_elements"),
        *_swapped(f"{result}_padded", result, f"{name}_words, {name}_planes", name),
    ]


def _swapped(x: str, result: str, split: str, name: str) -> list[str]:
    """The last of three axes split in two, which change places."""
    return [
        f"{result}_lead = Shape <start = 0, end = 2> ({x})",
        f"{result}_splitting = Concat <axis = 0> ({result}_lead, {split})",
        f"{result}_split = Reshape ({x}, {result}_splitting)",
        f"{result}_turned = Transpose <perm = [0, 1, 3, 2]> ({result}_split)",
        f"{result}_joining = Concat <axis = 0> ({result}_lead, {name}_elements)",
        f"{result} = Reshape ({result}_turned, {result}_joining)",
    ]


# Attention ------------------------------------------------------------------------------------------------------------

_QUANTISED_QUERIES = [
    "codes_most = Constant <value = float {127.0}> ()",
    "magnitudes = Abs (q)",
    "largest = ReduceMax <axes = [-1], keepdims = 1> (magnitudes)",
    "is_something = Greater (largest, no_float)",
    "codes_per_unit = Div (codes_most, largest)",
    "inverse = Where (is_something, codes_per_unit, no_float)",
    "q_scaled = Mul (q, inverse)",
    "q_codes = Round (q_scaled)",
    "q_scale = Div (largest, codes_most)",
    "q_stepped = Mul (q_codes, q_scale)",
    *_planar("key", "q_stepped", "queries"),
]

_VISIBLE = [
    "number_column = Unsqueeze (numbers, one)",
    *_range("slots", "past_slots"),
    "past_column = Unsqueeze (past_length, one)",
    "in_past = Less (slots, past_column)",
    "in_past_of_all = Unsqueeze (in_past, one)",
    "past_visible_cut = Slice (past_visible, zero, past_slots, one)",
    "past_visible_of_all = Unsqueeze (past_visible_cut, one)",
    "in_sight = Less (number_column, past_visible_of_all)",
    "past_seen = And (in_past_of_all, in_sight)",
    "not_later = GreaterOrEqual (number_column, numbers)",
    "new_shape = Concat <axis = 0> (batch, seq, one)",
    "new_seen = Expand (not_later, new_shape)",
    "visible = Concat <axis = 2> (past_seen, new_seen)",
    "visible_of_heads = Unsqueeze (visible, axes_of_heads)",
]

_SCORES = [
    # The queries of a group stay folded on one axis, so that its keys are not repeated in memory.
    "query_width = Shape <start = 3, end = 4> (queries_of)",
    "folding = Concat <axis = 0> (batch, num_kv_heads, minus_one, query_width)",
    "folded = Reshape (queries_of, folding)",
    *(
        line
        for source, keys in (("past", "past_keys"), ("new", "new_keys_of"))
        for line in (
            f"{source}_columns = Transpose <perm = [0, 1, 3, 2]> ({keys})",
            f"{source}_products = MatMul (folded, {source}_columns)",
        )
    ),
    "products = Concat <axis = 3> (past_products, new_products)",
    "scores = Mul (products, scale)",
]


def _attended(value_row: RowFormat) -> list[str]:
    """Scores to the output."""
    after = ["plain_attended = Identity (attended_tokens)"]
    if value_row.is_quantised:
        after = [
            *_swapped("attended_tokens", "padded", "value_planes, value_words", "value"),
            "plain_attended = Slice (padded, zero, value_dim, two)",
        ]
    return [
        "values = Concat <axis = 2> (past_values, new_values_of)",
        "lengths = Shape <start = 3, end = 4> (scores)",
        "unfolding = Concat <axis = 0> (batch, num_kv_heads, minus_one, seq, lengths)",
        "unfolded = Reshape (scores, unfolding)",
        "masked = Where (visible_of_heads, unfolded, lowest)",
        "weights = Softmax <axis = -1> (masked)",
        "shape = Shape (scores)",
        "folded_weights = Reshape (weights, shape)",
        "attended = MatMul (folded_weights, values)",
        "whole = Concat <axis = 0> (batch, num_heads, seq, minus_one)",
        "of_heads = Reshape (attended, whole)",
        "of_numbers = Transpose <perm = [0, 2, 1, 3]> (of_heads)",
        "value_width = Shape <start = 3, end = 4> (of_numbers)",
        "of_places_of = Concat <axis = 0> (minus_one, num_heads, value_width)",
        "of_places = Reshape (of_numbers, of_places_of)",
        "attended_tokens = Gather (of_places, place)",
        *after,
        "flat = Concat <axis = 0> (zero, minus_one)",
        "output = Reshape (plain_attended, flat)",
    ]
