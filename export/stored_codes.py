"""Linear layers that a checkpoint holds in codes of 4 bits, as AWQ, GPTQ and llm-compressor write them; read exactly.

All mean element = (code - zero) * scale, with codes and zeros of 0 to 15, eight to an int32 word, and a scale and a
zero for each output and group of inputs. They differ in names, in the axis along which words lie, and in the order
within a word: AutoAWQ's GEMM layout, that of AutoGPTQ and GPTQModel (whose first version stores zeros less one, taken
off whole words), and the "pack-quantized" format of compressed-tensors.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from pascalvl.export.transforms import WeightSource
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.weight_format import GROUPS, WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight

log = logging.getLogger(__name__)

_BITS = 4
_OF_WORD = 32 // _BITS
_MIDDLE = 1 << _BITS - 1
"""What codes of 0 to 15 lose to become those of -8 to 7."""
_REMEDY = "give another checkpoint, or the one with the original weights"


class TensorSource(WeightSource, Protocol):
    """A checkpoint's tensors by name, and their shapes."""

    def shape(self, name: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class _Layout:
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


_AWQ = _Layout("qweight", "scales", "qzeros", "g_idx", True, True, order=(0, 2, 4, 6, 1, 3, 5, 7))
_GPTQ_V2 = _Layout("qweight", "scales", "qzeros", "g_idx", True, False)
_GPTQ = dataclasses.replace(_GPTQ_V2, zero_offset=0x11111111)
_PACKED = _Layout(
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"), False, False, size="weight_shape"
)
_METHODS = {
    "awq": {"gemm": _AWQ},
    "gptq": {"gptq": _GPTQ, "gptq_v2": _GPTQ_V2},
    "compressed-tensors": {"pack-quantized": _PACKED},
}
"""By ``quant_method`` and its variants, of which the first is meant where none is named."""
_FIELDS = {
    "awq": (
        "quant_method bits group_size version zero_point backend do_fuse exllama_config fuse_max_seq_len "
        "modules_to_fuse modules_to_not_convert"
    ),
    "gptq": (
        "quant_method bits group_size checkpoint_format format desc_act sym lm_head static_groups true_sequential "
        "damp_percent damp_auto_increment dataset tokenizer meta model_name_or_path model_file_base_name model_seqlen "
        "block_name_to_quantize modules_in_block_to_quantize module_name_preceding_first_block batch_size pad_token_id "
        "use_cuda_fp16 use_exllama disable_exllama exllama_config max_input_length cache_block_outputs pack_dtype "
        "is_marlin_format backend mse"
    ),
    "compressed-tensors": (
        "quant_method format version config_groups ignore quantization_status global_compression_ratio run_compressed"
    ),
}
"""Fields of a config whose meaning is in the tensors, or of no matter to who reads them."""
_MUST_BE_EMPTY = ("dynamic", "kv_cache_scheme", "sparsity_config", "transform_config")
"""Fields that ask for more than codes, scales and zeros."""
_SCHEME = (
    "num_bits type symmetric group_size strategy dynamic actorder observer observer_kwargs block_structure scale_dtype "
    "zp_dtype"
)
"""Fields of compressed-tensors' weights."""
_GROUP = "targets weights input_activations output_activations format"


@dataclasses.dataclass(frozen=True)
class StoredCodes:
    """The linear layers of a checkpoint that are in codes: their format, their tensors' layout, and these."""

    form: WeightFormat
    layout: _Layout
    source: TensorSource

    @classmethod
    def parse(cls, quantization: Any, where: object, source: TensorSource) -> StoredCodes:
        """Read a config's ``quantization_config``; ``where`` is what errors call the checkpoint.

        Raises:
            UserError: another method, or one of its variants that `QuantLinear` cannot express.
        """
        data = quantization if isinstance(quantization, dict) else {"quant_method": quantization}
        method, schemes, bits = data.get("quant_method"), [data], "bits"

        def check(what: str, found: object, accepted: tuple[object, ...]) -> Any:
            if found not in accepted:
                raise UserError(
                    f"{where} holds weights quantised with {method!r}: expected {what} "
                    f"{' or '.join(map(repr, accepted))}, found {found!r}; {_REMEDY}."
                )
            return found

        def check_fields(found: Mapping[str, Any], known: str) -> None:
            if unknown := sorted(found.keys() - known.split()):
                raise UserError(
                    f"{where} holds weights quantised with {method!r}, whose config has the field {unknown[0]!r}, "
                    f"which is not known here: {_REMEDY}."
                )

        variants = _METHODS[check("quant_method", str(method), tuple(_METHODS))]
        kind = next((data[key] for key in ("checkpoint_format", "format", "version") if data.get(key)), None)
        for name in _MUST_BE_EMPTY:
            check(f"no {name}", data.get(name) or None, (None,))
        check_fields(data, f"{_FIELDS[method]} {' '.join(_MUST_BE_EMPTY)}")
        layout = variants[check("the layout", str(kind or next(iter(variants))).lower(), tuple(variants))]
        if layout is _PACKED:
            named = data.get("config_groups")
            groups = _objects(named.values() if isinstance(named, dict) else ())
            for group in groups:
                check_fields(group, _GROUP)
                for activations in ("input_activations", "output_activations"):
                    check(activations, group.get(activations), (None,))
            schemes, bits = _objects(group.get("weights") for group in groups), "num_bits"
            for scheme in schemes:
                check_fields(scheme, _SCHEME)
                check("type", scheme.get("type", "int"), ("int",))
        for scheme in schemes:
            check("bits", scheme.get(bits), (_BITS,))
            check("group_size", scheme.get("group_size"), GROUPS)
        sizes = {scheme["group_size"] for scheme in schemes}
        check("groups of one size, of which there are", len(sizes), (1,))
        return cls(WeightFormat(_BITS, *sizes), layout, source)

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
                f"{_REMEDY}."
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


def _objects(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Those of JSON's values that are objects."""
    return [value for value in values if isinstance(value, dict)]
