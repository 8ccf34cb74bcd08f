"""Quantised weights of linear layers in NumPy: codes and scales, laid out as the kernels read them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import quantise
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation, Norm
from pascalvl.plugins.weight_format import WeightFormat, scale_pitch

_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which of a word's eight codes is in its nibble number i, from the lowest on."""


@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight of a linear layer, ``[out_features, in_features]``: element = (code - zero) * scale.

    Attributes:
        codes: int8 ``[out_features, padded]``, zeros beyond the inputs.
        scale: float16 ``[out_features, padded / group]``.
        zero: whole numbers in float16, of the same shape; None: zeros.
    """

    codes: np.ndarray
    scale: np.ndarray
    in_features: int
    form: WeightFormat
    zero: np.ndarray | None = None

    def dense(self, dtype: type = np.float32) -> np.ndarray:
        """What it stands for, ``[out_features, in_features]``."""
        scale: np.ndarray = np.repeat(self.scale.astype(dtype), self.form.group, 1)
        zero: np.ndarray | int = 0 if self.zero is None else np.repeat(self.zero.astype(dtype), self.form.group, 1)
        return ((self.codes - zero) * scale)[:, : self.in_features]

    def packed(self) -> dict[str, np.ndarray]:
        """As the op takes it: ``weight``, int32 ``[out_features, padded * bits / 32]``, ``scale`` and, where there is
        one, ``zero``, halves in int32 ``[padded / group, out_features up to a multiple of 8, / 2]``.

        Of a word, byte i holds code i; codes of 4 bits are eight to a word, number i in the low half of byte i, and
        number i + 4 in its high half.
        """
        packed = {"weight": self.codes.view(np.int32)} if self.form.bits == 8 else {"weight": _packed4(self.codes)}
        for name in ("scale", "zero"):
            if (rows := getattr(self, name)) is not None:
                halves = np.zeros((rows.shape[1], scale_pitch(len(rows))), np.float16)
                halves[:, : len(rows)] = rows.T
                packed[name] = halves.view(np.int32)
        return packed

    @classmethod
    def unpacked(cls, packed: dict[str, np.ndarray], in_features: int, form: WeightFormat) -> QuantisedWeight:
        """Inverse of `packed`."""
        words = np.ascontiguousarray(packed["weight"])
        codes = words.view(np.int8)
        if form.bits == 4:
            codes = np.empty((*words.shape, 8), np.int8)
            nibbles = words.view(np.uint8).reshape(*words.shape, 4)
            codes[..., :4] = (nibbles << 4).view(np.int8) >> 4
            codes[..., 4:] = nibbles.view(np.int8) >> 4
            codes = codes.reshape(len(words), -1)
        halves = {name: packed[name].view(np.float16).T[: len(words)] for name in ("scale", "zero") if name in packed}
        return cls(codes, halves["scale"], in_features, form, halves.get("zero"))


def _packed4(codes: np.ndarray) -> np.ndarray:
    nibbles = codes.reshape(len(codes), -1, 8)[..., _NIBBLES].view(np.uint8) & 15
    return np.ascontiguousarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4).reshape(len(codes), -1).view(np.int32)


def quantise_weight(weight: np.ndarray, form: WeightFormat) -> QuantisedWeight:
    """Round a float32 weight ``[out_features, in_features]`` to the nearest codes.

    A group's scale is set by its element of largest magnitude: in 8 bits that has code 127 or -127, in 4 bits -8. Codes
    are those of the scale as stored.
    """
    codes, scale = quantise(_groups(weight, form), RowFormat.INT8 if form.bits == 8 else RowFormat.INT4)
    return QuantisedWeight(codes.reshape(len(weight), -1), scale, weight.shape[1], form)


def quantise_inputs(x: np.ndarray, form: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """Float32 ``[rows, in_features]`` as the kernels meet a weight with it: int8 ``[rows, padded]``, and float32 scales
    ``[rows, padded / group]``."""
    groups = _groups(x, form)
    most = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 0)
    codes = np.clip(np.rint(groups * inverse), -127, 127).astype(np.int8)
    return codes.reshape(len(x), -1), most[..., 0] / np.float32(127)


@dataclasses.dataclass(frozen=True, eq=False)
class InputNorm:
    """A norm of a layer's inputs: float32 ``weight [norm_size]`` and, of layer norm, ``bias``."""

    kind: Norm
    weight: np.ndarray
    epsilon: float
    bias: np.ndarray | None = None

    def normed(self, x: np.ndarray) -> np.ndarray:
        """Rows ``[rows, in_features]``, each of their segments of norm_size inputs normed by itself, in float64."""
        segments = x.astype(np.float64).reshape(len(x), -1, len(self.weight))
        if self.kind is Norm.LAYER:
            segments = segments - segments.mean(-1, keepdims=True)
        segments = segments / np.sqrt(np.square(segments).mean(-1, keepdims=True) + self.epsilon) * self.weight
        return (segments + (0 if self.bias is None else self.bias)).reshape(x.shape)


def linear(
    x: np.ndarray,
    weight: QuantisedWeight | np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    activation: Activation = Activation.NONE,
    norm: InputNorm | None = None,
) -> np.ndarray:
    """The op in float64, of float32 ``x [rows, in_features]`` and codes, or a weight ``[out_features, padded]`` in
    float16 or float32: ``[rows, out_features]``, half as many where gated. Codes meet normed inputs in float32."""
    if norm is not None:
        x = norm.normed(x)
    if isinstance(weight, QuantisedWeight):
        codes, scale = quantise_inputs(x.astype(np.float32), weight.form)
        inputs = codes * np.repeat(scale.astype(np.float64), weight.form.group, 1)
        sums = inputs[:, : weight.in_features] @ weight.dense(np.float64).T
    else:
        sums = x.astype(np.float64) @ weight[:, : x.shape[1]].T.astype(np.float64)
    sums += 0 if bias is None else bias
    if activation is Activation.GELU_TANH:
        sums = sums * (1 + np.tanh((2 / np.pi) ** 0.5 * (sums + 0.044715 * sums**3))) / 2
    elif activation is Activation.GELU_ERF:
        sums = sums * (1 + np.vectorize(math.erf)(sums / 2**0.5)) / 2
    elif activation is Activation.SILU_GATED:
        gate, value = np.moveaxis(sums.reshape(len(x), -1, 2, GATED_BLOCK), 2, 0)
        sums = (gate / (1 + np.exp(-gate)) * value).reshape(len(x), -1)
    return sums + (0 if residual is None else residual)


def _groups(x: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Rows ``[n, in_features]`` as float32 ``[n, groups, group]``, with zeros beyond the inputs."""
    padded = np.zeros((len(x), form.padded(x.shape[1])), np.float32)
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), -1, form.group)
