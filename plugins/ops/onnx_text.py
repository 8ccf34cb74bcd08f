"""What the ONNX bodies of the ops share: the operator set, and lines that read and write halves."""

from __future__ import annotations

OPSET = 17
"""The last that TensorRT 8.6's parser reads."""
FLOAT, INT, INT64, HALF, UINT32 = 1, 6, 7, 10, 12
"""ONNX's numbers of element types."""


def half_table() -> list[str]:
    """What `halves` and `half_bits` need, once a body.

    Opset 17 cannot take bits as another type, so they are looked up in a table of all halves, which integer arithmetic
    makes of constants alone: a runtime computes it once, when it loads the graph.
    """
    exponents = range(32)
    bases = ", ".join(repr(2.0 ** (e - 15) if e else 0.0) for e in exponents)
    units = ", ".join(repr(2.0 ** (max(e, 1) - 25)) for e in exponents)
    constants = {
        **{"none": "int32 {0}", "one": "int32 {1}", "exponents": "int32 {32}", "highest": "int32 {31}"},
        **{"mantissas": "int32 {1024}", "positive": "int32 {32768}", "count": "int32 {65536}"},
        # By the exponent: the lowest magnitude that has it, and what a mantissa's unit adds.
        **{"bases": f"float[32] {{{bases}}}", "units": f"float[32] {{{units}}}"},
        **{"zero": "float {0.0}", "unit": "float {1.0}", "minus_two": "float {-2.0}"},
        **{"up": "uint32[2] {16, 0}", "down": "uint32 {16}", "last": "int64[1] {-1}", "pair": "int64[1] {2}"},
    }
    lines = [
        *(f"${name} = Constant <value = {value}> ()" for name, value in constants.items()),
        "$bits = Range ($none, $count, $one)",
        "$mantissa = Mod ($bits, $mantissas)",
        "$upper = Div ($bits, $mantissas)",
        "$exponent = Mod ($upper, $exponents)",
        "$base = Gather ($bases, $exponent)",
        "$step = Gather ($units, $exponent)",
        f"$steps = Cast <to = {FLOAT}> ($mantissa)",
        "$more = Mul ($steps, $step)",
        "$finite = Add ($base, $more)",
        # The highest exponent: 1 / 0, infinity, where the mantissa is 0, else 0 / 0, no number.
        "$is_whole = Equal ($steps, $zero)",
        f"$whole = Cast <to = {FLOAT}> ($is_whole)",
        "$infinite = Div ($whole, $zero)",
        "$is_highest = Equal ($exponent, $highest)",
        "$magnitude = Where ($is_highest, $infinite, $finite)",
        "$sign = Div ($bits, $positive)",
        f"$signs = Cast <to = {FLOAT}> ($sign)",
        "$minus = Mul ($signs, $minus_two)",
        "$factor = Add ($minus, $unit)",
        "$table = Mul ($magnitude, $factor)",
    ]
    return [line.replace("$", "half_") for line in lines]


def halves(words: str, result: str) -> list[str]:
    """``result``: the halves in int32 ``words [..., n]`` as floats ``[..., 2 n]``; after `half_table`."""
    lines = [
        f"$unsigned = Cast <to = {UINT32}> ({words})",
        "$column = Unsqueeze ($unsigned, half_last)",
        '$top = BitShift <direction = "LEFT"> ($column, half_up)',
        '$number = BitShift <direction = "RIGHT"> ($top, half_down)',
        f"$index = Cast <to = {INT}> ($number)",
        "$pairs = Gather (half_table, $index)",
        f"$lead = Shape <start = 0, end = -1> ({words})",
        f"$words = Shape <start = -1> ({words})",
        "$elements = Mul ($words, half_pair)",
        "$shape = Concat <axis = 0> ($lead, $elements)",
        f"{result} = Reshape ($pairs, $shape)",
    ]
    return [line.replace("$", f"{result}_") for line in lines]


def half_bits(floats: str, result: str) -> list[str]:
    """``result``: float32 ``floats [..., 2 n]``, rounded to halves, in int32 words ``[..., n]``; after `half_table`.

    Besides, ``result_floats``: the same halves as floats, ``[..., 2 n]``. What is no number becomes 0x7e00.
    """
    constants = {
        # Beyond all finite halves: the lowest magnitude that has the highest exponent, which is that of infinity.
        **{"ceiling": "float {65536.0}", "no_number": "int32 {32256}", "pairs_of": "int64[2] {-1, 2}"},
        # The sign, of the lower half and of the upper, which is a word's own.
        **{"signs": "int32[2] {32768, -32768}", "places": "int32[2] {1, 65536}"},
    }
    lines = [
        *(f"${name} = Constant <value = {value}> ()" for name, value in constants.items()),
        f"$rounded = Cast <to = {HALF}> ({floats})",
        f"$floats = Cast <to = {FLOAT}> ($rounded)",
        "$is_none = IsNaN ($floats)",
        "$any_magnitude = Abs ($floats)",
        "$magnitude = Min ($any_magnitude, $ceiling)",
    ]
    # By bisection: the last exponent whose lowest magnitude is not greater.
    exponent = "half_none"
    for step in (16, 8, 4, 2, 1):
        lines += [
            f"$step{step} = Constant <value = int32 {{{step}}}> ()",
            f"$next{step} = Add ({exponent}, $step{step})",
            f"$base{step} = Gather (half_bases, $next{step})",
            f"$reaches{step} = GreaterOrEqual ($magnitude, $base{step})",
            f"$exponent{step} = Where ($reaches{step}, $next{step}, {exponent})",
        ]
        exponent = f"$exponent{step}"
    lines += [
        f"$base = Gather (half_bases, {exponent})",
        f"$unit = Gather (half_units, {exponent})",
        "$over = Sub ($magnitude, $base)",
        "$steps = Div ($over, $unit)",
        f"$mantissa = Cast <to = {INT}> ($steps)",
        f"$upper = Mul ({exponent}, half_mantissas)",
        "$number = Add ($upper, $mantissa)",
        "$bits = Where ($is_none, $no_number, $number)",
        # That of zero shows in its inverse, and that of infinity does not.
        "$inverse = Div (half_unit, $floats)",
        "$is_negative = Less ($floats, half_zero)",
        "$has_negative_inverse = Less ($inverse, half_zero)",
        "$has_sign = Or ($is_negative, $has_negative_inverse)",
        f"$sign = Cast <to = {INT}> ($has_sign)",
        f"$lead = Shape <start = 0, end = -1> ({floats})",
        "$shape = Concat <axis = 0> ($lead, $pairs_of)",
        "$bit_pairs = Reshape ($bits, $shape)",
        "$sign_pairs = Reshape ($sign, $shape)",
        "$signs_placed = Mul ($sign_pairs, $signs)",
        "$signed = Add ($bit_pairs, $signs_placed)",
        "$placed = Mul ($signed, $places)",
        f"{result} = ReduceSum <keepdims = 0> ($placed, half_last)",
    ]
    return [line.replace("$", f"{result}_") for line in lines]
