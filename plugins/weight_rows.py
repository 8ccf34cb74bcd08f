"""Quantised weights of linear layers in NumPy: codes and scales, laid out as the kernels read them."""

from __future__ import annotations

import dataclasses

import numpy as np

from pascalvl.plugins.kv_format import RowFormat
from pascalvl.plugins.kv_rows import quantise

GROUPS = 32, 64, 128
"""Inputs that share a scale."""
_SCALES = 8
"""Scales of a group are padded to a multiple of this many."""
_NIBBLES = np.array([0, 4, 1, 5, 2, 6, 3, 7])
"""Which of a word's eight codes is in its nibble number i, from the lowest on."""


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Symmetric codes of ``bits`` 8 or 4, with a scale in half for each output and ``group`` of inputs."""

    bits: int
    group: int = 128

    def padded(self, in_features: int) -> int:
        """Codes of a row: inputs up to whole groups."""
        return -(-in_features // self.group) * self.group


@dataclasses.dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """A weight of a linear layer, ``[out_features, in_features]``.

    Attributes:
        codes: int8 ``[out_features, padded]``, zeros beyond the inputs.
        scale: float16 ``[out_features, padded / group]``.
    """

    codes: np.ndarray
    scale: np.ndarray
    in_features: int
    form: WeightFormat

    def dense(self, dtype: type = np.float32) -> np.ndarray:
        """What it stands for, ``[out_features, in_features]``."""
        scales = np.repeat(self.scale.astype(dtype), self.form.group, 1)
        return (self.codes * scales)[:, : self.in_features]

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """As ``pascalvl_linear_args`` has it: uint8 ``[out_features, padded * bits / 8]``, and float16
        ``[padded / group, out_features up to a multiple of 8]``."""
        out_features = len(self.codes)
        scale = np.zeros((self.scale.shape[1], -(-out_features // _SCALES) * _SCALES), np.float16)
        scale[:, :out_features] = self.scale.T
        if self.form.bits == 8:
            return self.codes.view(np.uint8), scale
        words = self.codes.reshape(out_features, -1, 8)[..., _NIBBLES].view(np.uint8) & 15
        return (words[..., 0::2] | words[..., 1::2] << 4).reshape(out_features, -1), scale


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


def linear(x: np.ndarray, weight: QuantisedWeight, bias: np.ndarray | None = None) -> np.ndarray:
    """What the kernels compute of float32 ``x [rows, in_features]``, in float64: ``[rows, out_features]``."""
    codes, scale = quantise_inputs(x, weight.form)
    inputs = codes * np.repeat(scale.astype(np.float64), weight.form.group, 1)
    return inputs[:, : weight.in_features] @ weight.dense(np.float64).T + (0 if bias is None else bias)


def _groups(x: np.ndarray, form: WeightFormat) -> np.ndarray:
    """Rows ``[n, in_features]`` as float32 ``[n, groups, group]``, with zeros beyond the inputs."""
    padded = np.zeros((len(x), form.padded(x.shape[1])), np.float32)
    padded[:, : x.shape[1]] = x
    return padded.reshape(len(x), -1, form.group)
