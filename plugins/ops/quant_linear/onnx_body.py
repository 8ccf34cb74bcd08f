"""QuantLinear in standard ONNX operators (opset 17), as the text that `onnx.parser.parse_function` reads.

As for attention, a body makes a graph runnable anywhere and says exactly what the kernels must compute; a runtime that
does not replace the node unpacks the weight to float32. Each kind of layer has a body, and a domain, of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN
from pascalvl.plugins.ops.onnx_text import FLOAT, OPSET, UINT32, half_table, halves
from pascalvl.plugins.ops.quant_linear.op import (
    ATTR_ACTIVATION,
    ATTR_BITS,
    ATTR_EPSILON,
    ATTR_GROUP,
    ATTR_HAS_BIAS,
    ATTR_HAS_RESIDUAL,
    ATTR_HAS_ZERO,
    ATTR_IN_FEATURES,
    ATTR_NORM,
    ATTR_NORM_SIZE,
    ATTR_OUT_FEATURES,
    GATED_BLOCK,
    OP_NAME,
    Activation,
    Norm,
)


@dataclasses.dataclass(frozen=True)
class LinearBody:
    """The op for one kind of layer."""

    bits: int
    has_zero: bool = False
    has_bias: bool = False
    has_residual: bool = False
    activation: Activation = Activation.NONE
    norm: Norm = Norm.NONE

    @classmethod
    def of(cls, attributes: Mapping[str, int]) -> LinearBody:
        """That of a node with these attributes."""
        return cls(
            attributes[ATTR_BITS],
            bool(attributes[ATTR_HAS_ZERO]),
            bool(attributes[ATTR_HAS_BIAS]),
            bool(attributes[ATTR_HAS_RESIDUAL]),
            Activation(attributes[ATTR_ACTIVATION]),
            Norm(attributes[ATTR_NORM]),
        )

    @property
    def domain(self) -> str:
        """Domain of the nodes that have this body."""
        parts = [f"w{self.bits}", *[name for name in ("zero", "bias", "residual") if getattr(self, f"has_{name}")]]
        parts += [kind.name.lower() for kind in (self.activation, self.norm) if kind]
        return ".".join([OP_DOMAIN, *parts])

    @property
    def inputs(self) -> list[str]:
        """In the op's order."""
        given = {"scale": self.bits < 16, "zero": self.has_zero, "bias": self.has_bias, "residual": self.has_residual}
        given |= {"norm_weight": self.norm is not Norm.NONE, "norm_bias": self.norm is Norm.LAYER}
        return ["x", "weight", *(name for name, is_there in given.items() if is_there)]

    @property
    def text(self) -> str:
        if self.bits == 32:
            return self.function(product_of_floats("weight"), self.domain)
        if self.bits == 16:
            return self.function([*half_table(), *halves("weight", "wide"), *product_of_floats("wide")], self.domain)
        return self.function(_codes(self.bits, self.has_zero), self.domain)

    def function(self, product: list[str], domain: str, opset: str = "") -> str:
        """The body with other lines that compute ``product``, ``[rows, out_features]``, of ``x2``, which is x, normed,
        as ``[rows, in_features]``; ``opset`` is what they need besides."""
        lines = [
            *(f"{name} = Constant <value_ints = [{value}]> ()" for name, value in (("zero_", 0), ("one", 1))),
            "minus_one = Constant <value_ints = [-1]> ()",
            "lead = Shape <start = 0, end = -1> (x)",
            "in_features = Shape <start = -1> (x)",
            "rows_of = Concat <axis = 0> (minus_one, in_features)",
            *_NORMS[self.norm],
            *product,
            "biased = Add (product, bias)" if self.has_bias else "biased = Identity (product)",
            *_ACTIVATIONS[self.activation],
            "out_shape = Concat <axis = 0> (lead, minus_one)",
            "shaped = Reshape (active, out_shape)",
            "output = Add (shaped, residual)" if self.has_residual else "output = Identity (shaped)",
        ]
        known = [ATTR_IN_FEATURES, ATTR_OUT_FEATURES, ATTR_BITS, ATTR_GROUP, ATTR_ACTIVATION]
        known += [ATTR_HAS_ZERO, ATTR_HAS_BIAS, ATTR_HAS_RESIDUAL, ATTR_NORM, ATTR_NORM_SIZE, ATTR_EPSILON]
        return "\n".join(
            [
                f'<opset_import: ["" : {OPSET}{opset}], domain: "{domain}">',
                f"{OP_NAME} <{', '.join(known)}> ({', '.join(self.inputs)}) => (output) {{",
                *lines,
                "}",
            ]
        )


def product_of_floats(weight: str) -> list[str]:
    """``product`` of a weight in float32 ``[out_features, padded]``, read as it lies."""
    return [
        f"padded = Shape <start = 1, end = 2> ({weight})",
        *_PAD_INPUTS,
        f"product = Gemm <transB = 1> (x_padded, {weight})",
    ]


_PAD_INPUTS = (
    "no_pads = Constant <value_ints = [0, 0, 0]> ()",
    "missing = Sub (padded, in_features)",
    "pads = Concat <axis = 0> (no_pads, missing)",
    "x_padded = Pad (x2, pads)",
)
"""``x_padded``: ``x2`` with zeros up to ``padded`` inputs."""


def _codes(bits: int, has_zero: bool) -> list[str]:
    # A code is brought to a word's upper end, made positive there by flipping its sign, and moved down.
    shifts = [24, 16, 8, 0] if bits == 8 else [28, 20, 12, 4, 24, 16, 8, 0]
    planes = [f"plane{number}" for number in range(len(shifts))]
    lines = [
        f"flipped = Constant <value = uint32 {{{1 << 31}}}> ()",
        f"down = Constant <value = uint32 {{{32 - bits}}}> ()",
        f"centre = Constant <value = float {{{1 << bits - 1}}}> ()",
        "no_float = Constant <value = float {0.0}> ()",
        "codes_most = Constant <value = float {127.0}> ()",
        f"group_ = Constant <value_int : int = @{ATTR_GROUP}> ()",
        "group_of = Unsqueeze (group_, zero_)",
        "two = Constant <value_ints = [2]> ()",
        f"words = Cast <to = {UINT32}> (weight)",
    ]
    for plane, shift in zip(planes, shifts, strict=True):
        lines += [
            f"{plane}_up = Constant <value = uint32 {{{shift}}}> ()",
            f'{plane}_upper = BitShift <direction = "LEFT"> (words, {plane}_up)',
            f"{plane}_positive = Add ({plane}_upper, flipped)",
            f'{plane}_codes = BitShift <direction = "RIGHT"> ({plane}_positive, down)',
            f"{plane}_floats = Cast <to = {FLOAT}> ({plane}_codes)",
            f"{plane} = Unsqueeze ({plane}_floats, two)",
        ]
    lines += [
        f"biased_codes = Concat <axis = 2> ({', '.join(planes)})",
        "codes = Sub (biased_codes, centre)",
        "outputs = Shape <start = 0, end = 1> (weight)",
        "of_groups = Concat <axis = 0> (outputs, minus_one, group_of)",
        "grouped_codes = Reshape (codes, of_groups)",
        *half_table(),
        *_of_outputs("scale"),
    ]
    if has_zero:
        lines += [*_of_outputs("zero"), "centred = Sub (grouped_codes, zero_columns)"]
    else:
        lines.append("centred = Identity (grouped_codes)")
    return [
        *lines,
        "weights = Mul (centred, scale_columns)",
        "of_outputs = Concat <axis = 0> (outputs, minus_one)",
        "weight_rows = Reshape (weights, of_outputs)",
        "columns = Transpose <perm = [1, 0]> (weight_rows)",
        "padded = Shape <start = 1, end = 2> (weight_rows)",
        *_PAD_INPUTS,
        "x_groups_of = Concat <axis = 0> (zero_, minus_one, group_of)",
        "x_grouped = Reshape (x_padded, x_groups_of)",
        "magnitudes = Abs (x_grouped)",
        "largest = ReduceMax <axes = [-1], keepdims = 1> (magnitudes)",
        "is_something = Greater (largest, no_float)",
        "codes_per_unit = Div (codes_most, largest)",
        "inverse = Where (is_something, codes_per_unit, no_float)",
        "x_scaled = Mul (x_grouped, inverse)",
        "x_codes = Round (x_scaled)",
        "x_scale = Div (largest, codes_most)",
        "x_stepped = Mul (x_codes, x_scale)",
        "x_rows_of = Concat <axis = 0> (minus_one, padded)",
        "x_rows = Reshape (x_stepped, x_rows_of)",
        "product = MatMul (x_rows, columns)",
    ]


def _of_outputs(name: str) -> list[str]:
    """Scales or zeros ``[groups, outputs and more]`` as ``[outputs, groups, 1]``."""
    return [
        *halves(name, f"{name}_wide"),
        f"{name}_cut = Slice ({name}_wide, zero_, outputs, one)",
        f"{name}_turned = Transpose <perm = [1, 0]> ({name}_cut)",
        f"{name}_columns = Unsqueeze ({name}_turned, two)",
    ]


_SEGMENTS = (
    f"segment_size = Constant <value_int : int = @{ATTR_NORM_SIZE}> ()",
    "segment_of = Unsqueeze (segment_size, zero_)",
    "segments_of = Concat <axis = 0> (minus_one, segment_of)",
    "segments = Reshape (x, segments_of)",
)
_SCALED_SEGMENTS = (
    "segment_squares = Mul (centred_segments, centred_segments)",
    "segment_variance = ReduceMean <axes = [-1], keepdims = 1> (segment_squares)",
    f"segment_epsilon = Constant <value_float : float = @{ATTR_EPSILON}> ()",
    "segment_sum = Add (segment_variance, segment_epsilon)",
    "segment_deviation = Sqrt (segment_sum)",
    "segment_units = Div (centred_segments, segment_deviation)",
    "segments_scaled = Mul (segment_units, norm_weight)",
)
_NORMS = {
    Norm.NONE: ["x2 = Reshape (x, rows_of)"],
    Norm.RMS: [
        *_SEGMENTS,
        "centred_segments = Identity (segments)",
        *_SCALED_SEGMENTS,
        "x2 = Reshape (segments_scaled, rows_of)",
    ],
    Norm.LAYER: [
        *_SEGMENTS,
        "segment_mean = ReduceMean <axes = [-1], keepdims = 1> (segments)",
        "centred_segments = Sub (segments, segment_mean)",
        *_SCALED_SEGMENTS,
        "segments_moved = Add (segments_scaled, norm_bias)",
        "x2 = Reshape (segments_moved, rows_of)",
    ],
}
"""``x2``: x as rows, normed."""
_ACTIVATIONS = {
    Activation.NONE: ["active = Identity (biased)"],
    Activation.GELU_TANH: [
        f"inner = Constant <value = float {{{(2 / 3.141592653589793) ** 0.5!r}}}> ()",
        "cubic = Constant <value = float {0.044715}> ()",
        "half = Constant <value = float {0.5}> ()",
        "unit = Constant <value = float {1.0}> ()",
        "square = Mul (biased, biased)",
        "cube = Mul (square, biased)",
        "of_cube = Mul (cube, cubic)",
        "both = Add (biased, of_cube)",
        "argument = Mul (both, inner)",
        "tangent = Tanh (argument)",
        "share = Add (tangent, unit)",
        "half_of = Mul (biased, half)",
        "active = Mul (half_of, share)",
    ],
    Activation.GELU_ERF: [
        f"inverse_root = Constant <value = float {{{0.5**0.5!r}}}> ()",
        "half = Constant <value = float {0.5}> ()",
        "unit = Constant <value = float {1.0}> ()",
        "argument = Mul (biased, inverse_root)",
        "error = Erf (argument)",
        "share = Add (error, unit)",
        "half_of = Mul (biased, half)",
        "active = Mul (half_of, share)",
    ],
    Activation.SILU_GATED: [
        f"blocks = Constant <value_ints = [0, -1, 2, {GATED_BLOCK}]> ()",
        "blocked = Reshape (biased, blocks)",
        "gate_at = Constant <value = int64 {0}> ()",
        "value_at = Constant <value = int64 {1}> ()",
        "gate = Gather <axis = 2> (blocked, gate_at)",
        "value = Gather <axis = 2> (blocked, value_at)",
        "sigmoid = Sigmoid (gate)",
        "silu = Mul (gate, sigmoid)",
        "active = Mul (silu, value)",
    ],
}
