"""Linear layers that a checkpoint holds in codes of 4 bits, as AWQ, GPTQ and llm-compressor write them; read exactly.

All mean element = (code - zero) * scale, with codes and zeros of 0 to 15, eight to an int32 word, and a scale and a
zero for each output and group of inputs. They differ in names, in the axis along which words lie, and in the order
within a word: AutoAWQ's GEMM layout, that of AutoGPTQ and GPTQModel (whose first version stores zeros less one, taken
off whole words), and the "pack-quantized" format of compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Protocol

import numpy as np
import torch

from pascalvl.export.transforms import WeightSource
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight

log = logging.getLogger(__name__)

BITS = 4
_OF_WORD = 32 // BITS
_MIDDLE = 1 << BITS - 1
"""What codes of 0 to 15 lose to become those of -8 to 7."""
REMEDY = "give another checkpoint, or the one with the original weights"


class TensorSource(WeightSource, Protocol):
    """A checkpoint's tensors by name, and their shapes."""

    def shape(self, name: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to store a layer.

    Attributes:
        codes, scale, zero: last parts of the tensors' names. Without a zero there, it is the middle, 8.
        group_of_input: likewise; has a number for each input, and need not be there.
        size: likewise; of the outputs and inputs, where these are stored.
        inputs_first: tensors are ``[inputs or groups, outputs]``, else ``[outputs, inputs or groups]``.
        words_of_outputs: a word has codes of several outputs, else of several inputs. Zeros' are always of outputs.
        order: which of a word's elements is in its nibble number i, from the lowest on.
        zero_offset: what is added to stored words of zeros.
    """

    codes: str
    scale: str
    zero: str
    group_of_input: str
    inputs_first: bool
    words_of_outputs: bool
    order: tuple[int, ...] = tuple(range(_OF_WORD))
    zero_offset: int = 0
    size: str = ""


AWQ = Layout("qweight", "scales", "qzeros", "g_idx", True, True, order=(0, 2, 4, 6, 1, 3, 5, 7))
GPTQ_V2 = Layout("qweight", "scales", "qzeros", "g_idx", True, False)
GPTQ = dataclasses.replace(GPTQ_V2, zero_offset=0x11111111)
PACKED = Layout(
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"), False, False, size="weight_shape"
)


@dataclasses.dataclass(frozen=True)
class StoredCodes:
    """The linear layers of a checkpoint that are in codes: their format, their tensors' layout, and these."""

    form: WeightFormat
    layout: Layout
    source: TensorSource

    def __contains__(self, layer: str) -> bool:
        return f"{layer}.{self.layout.codes}" in self.source

    def shape(self, layer: str) -> list[int]:
        """``[out_features, in_features]``."""
        shape = self.source.shape(f"{layer}.{self.layout.codes}")
        out_features, in_features = shape[::-1] if self.layout.inputs_first else shape
        if self.layout.words_of_outputs:
            return [out_features * _OF_WORD, in_features]
        return [out_features, in_features * _OF_WORD]

    def names(self, layer: str) -> tuple[str, ...]:
        """Of the tensors that a layer in codes may have."""
        parts = self.layout.codes, self.layout.scale, self.layout.zero, self.layout.group_of_input, self.layout.size
        return tuple(f"{layer}.{part}" for part in parts if part)

    def check(self, layer: str) -> None:
        """Raise `UserError` for tensors that are missing, do not fit each other, or have inputs in another order."""
        out_features, in_features = self.shape(layer)
        groups = -(-in_features // self.form.group)
        expected = {self.layout.scale: (out_features, groups)}
        if self._has_zero_tensor(layer):
            expected[self.layout.zero] = -(-out_features // _OF_WORD), groups
        for part, shape in expected.items():
            name = f"{layer}.{part}"
            if name not in self.source:
                raise UserError(f"the checkpoint lacks the tensor {name}: download the model again.")
            wanted = list(shape[::-1] if self.layout.inputs_first else shape)
            if (found := self.source.shape(name)) != wanted:
                raise UserError(
                    f"tensor {name} has shape {found}, expected {wanted} for 4 bits in groups of {self.form.group} "
                    "inputs: the files belong to different models."
                )
        name = f"{layer}.{self.layout.group_of_input}"
        in_order = torch.arange(in_features) // self.form.group
        if name in self.source and not torch.equal(self.source.tensor(name).long(), in_order):
            raise UserError(
                f"the inputs of {layer} have an order of their own (desc_act or actorder), which is not supported: "
                f"{REMEDY}."
            )

    def has_zero(self, layer: str) -> bool:
        """Whether a layer's zeros are other than the middle of the codes."""
        return self._zero(layer) is not None

    def read(self, layer: str) -> QuantisedWeight:
        """A layer's weight; `check` has nothing to say about it."""
        in_features = self.shape(layer)[1]
        scale = self._rows(layer, self.layout.scale).float().numpy()
        halves = scale.astype(np.float16)
        if not np.array_equal(halves.astype(np.float32), scale):
            log.warning("scales of %s are too small for float16, and are rounded", layer)
        codes = np.zeros((len(scale), self.form.padded(in_features)), np.int8)
        stored = self._elements(layer, self.layout.codes, self.layout.words_of_outputs)
        codes[:, :in_features] = stored.view(np.int8) - np.int8(_MIDDLE)
        return QuantisedWeight(codes, halves, in_features, self.form, self._zero(layer))

    def _has_zero_tensor(self, layer: str) -> bool:
        return f"{layer}.{self.layout.zero}" in self.source

    def _zero(self, layer: str) -> np.ndarray | None:
        """Zeros ``[out_features, groups]`` for codes of -8 to 7; None where all are 0."""
        if not self._has_zero_tensor(layer):
            return None
        stored = self._elements(layer, self.layout.zero, True, self.layout.zero_offset)
        zero = stored[: self.shape(layer)[0]].astype(np.float16) - _MIDDLE  # the last word may have more
        return zero if zero.any() else None

    def _rows(self, layer: str, part: str) -> torch.Tensor:
        """A tensor, outputs first."""
        tensor = self.source.tensor(f"{layer}.{part}")
        return tensor.T if self.layout.inputs_first else tensor

    def _elements(self, layer: str, part: str, of_outputs: bool, offset: int = 0) -> np.ndarray:
        """Elements of words that are of several outputs, or else inputs; in bytes, outputs first."""
        rows = self._rows(layer, part)
        words = (rows.T if of_outputs else rows).contiguous().numpy().view(np.uint32) + np.uint32(offset)
        pairs = words.view(np.uint8).reshape(*words.shape, 4)
        nibbles = np.stack([pairs & 15, pairs >> 4], -1).reshape(*words.shape, _OF_WORD)
        elements = nibbles[..., np.argsort(self.layout.order)].reshape(len(words), -1)
        return elements.T if of_outputs else elements
