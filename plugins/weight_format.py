"""How the weights of linear layers are stored, and the grammar in which a user asks for it."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.model_config import LONGEST_GRAMMAR

GROUPS = 32, 64, 128
"""Inputs that share a scale."""
_BITS = {"f32": 32, "f16": 16, "w8": 8, "w4": 4}


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """Floats of ``bits`` 32 or 16; or symmetric codes of 8 or 4, with a scale in half for each output and ``group`` of
    inputs, which are met by inputs rounded to int8 by token and group."""

    bits: int
    group: int = 128

    @classmethod
    def parse(cls, name: str, group: int = 128) -> WeightFormat:
        """The format called ``name``; raises `UserError` naming those there are."""
        if name not in _BITS:
            raise UserError(f"unknown weight format {shown(name)}: expected one of {', '.join(_BITS)}.")
        return cls(_BITS[name], group)

    @property
    def name(self) -> str:
        return next(name for name, bits in _BITS.items() if bits == self.bits)

    @property
    def is_quantised(self) -> bool:
        return self.bits <= 8

    @property
    def dtype(self) -> np.dtype:
        """Of a weight as it is stored: float32, or int32 words of codes or halves."""
        return np.dtype(np.float32 if self.bits == 32 else np.int32)

    def padded(self, in_features: int) -> int:
        """Elements of a stored row: inputs up to whole groups, of floats to 16 bytes."""
        multiple = self.group if self.is_quantised else 128 // self.bits
        return -(-in_features // multiple) * multiple

    def weight_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of a weight in words of 32 bits, as `dtype` has them."""
        return out_features, self.padded(in_features) * self.bits // 32

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Of the scales of codes, in int32 words of two halves each."""
        return self.padded(in_features) // self.group, scale_pitch(out_features) // 2

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a weight with its scales."""
        size = out_features, in_features
        return 4 * (math.prod(self.weight_shape(*size)) + self.is_quantised * math.prod(self.scale_shape(*size)))


F32 = WeightFormat(32)


def scale_pitch(out_features: int) -> int:
    """Scales of a group: outputs up to whole lines of 16 bytes."""
    return -(-out_features // 8) * 8


@dataclasses.dataclass(frozen=True)
class WeightConfig:
    """What a user asks of the weights; `parse` reads it, `str` writes it. Fixed by an export.

    Norms and biases stay float32, and the vision encoder's first layer, which reads pixels, is in float16 where its
    others are in codes; token and position embeddings are as in the checkpoint.
    """

    form: WeightFormat = F32
    """Of the decoder's layers."""
    lm_head: WeightFormat = F32
    vision: WeightFormat = F32
    overrides: tuple[tuple[int, int, WeightFormat], ...] = ()
    """Decoder layers, first and last, with another format; a later one counts more."""

    GRAMMAR = (
        "FORMAT[,group=INPUTS][,lm_head=FORMAT][,vision=FORMAT][,layer.FIRST-LAST=FORMAT], "
        f"FORMAT one of {', '.join(_BITS)}, INPUTS one of {', '.join(map(str, GROUPS))}"
    )

    @classmethod
    def parse(cls, text: str) -> WeightConfig:
        """Read, for example, ``w4,group=64,layer.0-1=w8``; with w4, lm_head and vision are w8 unless told otherwise.

        Raises:
            UserError: the text is none of that; names what is.
        """
        if len(text) > LONGEST_GRAMMAR:
            raise UserError(f"the weights {shown(text)} are too long: expected {LONGEST_GRAMMAR} characters at most.")
        first, *options = (part.strip() for part in text.split(","))
        named: dict[str, str] = {}
        for option in options:
            name, _, value = option.partition("=")
            if not re.fullmatch(r"group|lm_head|vision|layer\.\d{1,4}(-\d{1,4})?", name):
                raise UserError(f"unknown weight option {shown(option)}: expected {cls.GRAMMAR}.")
            if name in named:
                raise UserError(f"the weight option {name} is given twice: expected it once.")
            named[name] = value
        group = named.pop("group", "128")
        if group not in map(str, GROUPS):
            raise UserError(f"the weight option {shown(f'group={group}')} is out of range: expected one of {GROUPS}.")
        form = WeightFormat.parse(first, int(group))
        rest = dataclasses.replace(form, bits=max(form.bits, 8))
        of = {name: WeightFormat.parse(value, int(group)) for name, value in named.items()}
        parts = {name: of.pop(name, rest) for name in ("lm_head", "vision")}
        overrides = []
        for name, other in of.items():
            start, _, stop = name.removeprefix("layer.").partition("-")
            overrides.append((int(start), int(stop or start), other))
            if overrides[-1][0] > overrides[-1][1]:
                raise UserError(f"the weight option {name} names no layers: expected the first one first.")
        return cls(form, **parts, overrides=tuple(overrides))

    def __str__(self) -> str:
        parts = [self.form.name]
        if self.form.group != 128:
            parts.append(f"group={self.form.group}")
        rest = max(self.form.bits, 8)
        for name in ("lm_head", "vision"):
            if (form := getattr(self, name)).bits != rest:
                parts.append(f"{name}={form.name}")
        for first, last, form in self.overrides:
            parts.append(f"layer.{first if first == last else f'{first}-{last}'}={form.name}")
        return ",".join(parts)

    @property
    def is_quantised(self) -> bool:
        """Whether any weight is other than float32."""
        forms = self.form, self.lm_head, self.vision, *(form for _, _, form in self.overrides)
        return any(form.bits != 32 for form in forms)

    def layers(self, count: int) -> tuple[WeightFormat, ...]:
        """The format of each decoder layer; raises `UserError` for layers that the model does not have."""
        forms = [self.form] * count
        for first, last, form in self.overrides:
            if last >= count:
                raise UserError(f"the weight option layer.{last} is out of range: this model has layers 0-{count - 1}.")
            forms[first : last + 1] = [form] * (last + 1 - first)
        return tuple(forms)


FLOAT_WEIGHTS = WeightConfig()
"""All in float32."""
