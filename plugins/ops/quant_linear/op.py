"""The QuantLinear op: the identity that its torch op, its ONNX node, its TensorRT plugin and its kernels share.

out = activation(norm(x) W^T + bias) + residual, with W in codes, and norm(x) rounded to int8 by row and group of inputs
(its scale there is the largest magnitude / 127); or with W in halves or floats, and norm(x) as it is. Inputs, in order:
``x`` float32 ``[..., in_features]``; ``weight``, codes or halves in int32 words ``[out_features, padded * bits / 32]``
(`pascalvl.plugins.weight_rows` tells how they lie), or float32 ``[out_features, padded]``; of codes ``scale``, halves
in int32 words ``[padded / group, pitch / 2]``, the pitch being out_features up to a multiple of 8, and where
`ATTR_HAS_ZERO` is 1 ``zero``, of the same shape: element = (code - zero) * scale; ``bias`` float32 ``[out_features]``
and ``residual`` float32, of the result's shape, where the attributes say so; ``norm_weight`` float32 ``[norm_size]``
where there is a norm, and ``norm_bias``, the same, where it is layer norm. Result: float32 ``[..., out_features]``, or
half as many where the activation is gated.
"""

from __future__ import annotations

import dataclasses
import enum

from pascalvl.plugins.weight_format import WeightFormat

OP_NAME = "QuantLinear"
OP_VERSION = "2"
"""In TensorRT: what a node's attribute ``plugin_version`` asks for."""
SERIALISED_LAYOUT = 2
"""Of the attributes in a plan, for TensorRT's plugin: one more whenever it changes."""

ATTR_IN_FEATURES = "in_features"
"""Those of x, which a row of codes may exceed."""
ATTR_OUT_FEATURES = "out_features"
"""Of the weight: where gated, twice as many as the result's."""
ATTR_BITS = "bits"
"""8 or 4, of codes; 16, of halves; 32, of floats."""
ATTR_GROUP = "group"
"""Inputs that share a scale; of codes."""
ATTR_ACTIVATION = "activation"
"""Number of an `Activation`."""
ATTR_HAS_ZERO = "has_zero"
ATTR_HAS_BIAS = "has_bias"
ATTR_HAS_RESIDUAL = "has_residual"
ATTR_NORM = "norm"
"""Number of a `Norm`."""
ATTR_NORM_SIZE = "norm_size"
"""Inputs that are normed together, each such segment of a row by itself; 0 where there is no norm."""
ATTR_EPSILON = "epsilon"
"""Of the norm, a float: what is added to the mean square, or to the variance."""

GATED_BLOCK = 64
"""Outputs of a gated layer lie in blocks: so many gates, and then as many values that they are for."""


class Activation(enum.IntEnum):
    """What becomes of the sums; numbered as in the kernels' C ABI."""

    NONE = 0
    GELU_TANH = 1
    """GELU, approximated by tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    SILU_GATED = 2
    """SiLU of a gate times its value (SwiGLU, Shazeer, arXiv:2002.05202)."""
    GELU_ERF = 3
    """GELU itself, by the error function."""


class Norm(enum.IntEnum):
    """What x is normed by; numbered as in the kernels' C ABI."""

    NONE = 0
    RMS = 1
    """x * rsqrt(mean(x^2) + epsilon) * norm_weight (Zhang and Sennrich, arXiv:1910.07467)."""
    LAYER = 2
    """(x - mean) * rsqrt(variance + epsilon) * norm_weight + norm_bias (Ba et al., arXiv:1607.06450)."""


@dataclasses.dataclass(frozen=True)
class LinearOptions:
    """The op's arguments that are no tensors.

    Attributes:
        form: of the weight.
        activation: what becomes of the sums.
        norm: what x is normed by.
        epsilon: of the norm.
    """

    form: WeightFormat
    activation: Activation = Activation.NONE
    norm: Norm = Norm.NONE
    epsilon: float = 0.0

    @classmethod
    def of(cls, bits: int, group: int, activation: int, norm: int, epsilon: float) -> LinearOptions:
        """Inverse of `flat`."""
        return cls(WeightFormat(bits, group), Activation(activation), Norm(norm), epsilon)

    @property
    def flat(self) -> tuple[int, int, int, int, float]:
        """As the torch op's schema has them."""
        return self.form.bits, self.form.group, int(self.activation), int(self.norm), self.epsilon
