"""The parameters of `QuantLinear` layers, made of a checkpoint's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from pascalvl.export.checkpoint import TOKEN_EMBEDDINGS, Checkpoint
from pascalvl.export.modules import GATE_UP, MERGED, Decoder, VisionEncoder
from pascalvl.export.quantiser import round_to_nearest
from pascalvl.export.stored_codes import StoredCodes
from pascalvl.export.transforms import DECODER_LAYERS, WeightSource
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig, WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight

LM_HEAD = "lm_head"
_VISION = "model.visual"


class QuantisedWeights:
    """A model's weights, in which `QuantLinear` layers have theirs.

    Args:
        weights: the model's, in float.
        layers: see `quant_layers`.
        codes: given a layer's name, what it is packed to (`QuantisedWeight.packed`), or None: it is rounded to nearest.
    """

    def __init__(
        self,
        weights: WeightSource,
        layers: Mapping[str, QuantLinear],
        codes: Callable[[str], Mapping[str, torch.Tensor] | None] = lambda _: None,
    ) -> None:
        self._weights = weights
        self._layers = layers
        self._codes = codes
        self._latest: tuple[str, Mapping[str, torch.Tensor]] = "", {}

    def tensor(self, name: str) -> torch.Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in self._layers:
            return self._weights.tensor(name)
        module = self._layers[layer]
        if part == "bias":
            return float_tensor(self._weights, layer, module, part)
        if not module.form.is_quantised:
            weight = float_tensor(self._weights, layer, module, "weight")
            if missing := module.form.padded(module.in_features) - module.in_features:
                weight = nn.functional.pad(weight, (0, missing))
            return weight if module.form.bits == 32 else weight.half().view(torch.int32)
        if self._latest[0] != layer:
            self._latest = layer, self._packed(layer, module)
        return self._latest[1][part]

    def _packed(self, layer: str, module: QuantLinear) -> Mapping[str, torch.Tensor]:
        if (known := self._codes(layer)) is not None:
            return known
        return packed(round_to_nearest(float_tensor(self._weights, layer, module, "weight"), module.form))

    def __contains__(self, name: str) -> bool:
        layer, _, part = name.rpartition(".")
        if layer not in self._layers:
            return name in self._weights
        return getattr(self._layers[layer], part, None) is not None


def packed(weight: QuantisedWeight) -> dict[str, torch.Tensor]:
    """The parameters of a layer."""
    return {name: torch.from_numpy(array) for name, array in weight.packed().items()}


def quant_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """A model's layers by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def parts(layer: str) -> list[str]:
    """The checkpoint's names of the linear layers that a layer is made of."""
    parent, _, name = layer.rpartition(".")
    return [f"{parent}.{part}".removeprefix(".") for part in MERGED.get(name, (name,))]


def float_tensor(weights: WeightSource, layer: str, module: QuantLinear, kind: str) -> torch.Tensor:
    """The weight or bias of a layer, float32, its parts put together and padded to its size."""
    names = [f"{part}.{kind}" for part in parts(layer)]
    if layer == LM_HEAD and names[0] not in weights:  # tied
        names = [TOKEN_EMBEDDINGS]
    tensors = [weights.tensor(name).float() for name in names]
    if kind == "weight":
        tensors = [tensor.flatten(1) for tensor in tensors]  # of a convolution
    return _whole(layer, module, tensors, module.in_features if kind == "weight" else None)


def _whole(layer: str, module: QuantLinear, tensors: list[torch.Tensor], columns: int | None) -> torch.Tensor:
    """Rows of a layer's parts as one, padded to its outputs, and to so many columns where they have columns."""
    if columns is not None and columns != tensors[0].shape[1]:
        tensors = [nn.functional.pad(tensor, (0, columns - tensor.shape[1])) for tensor in tensors]
    if layer.endswith(f".{GATE_UP}"):
        gate, value = tensors
        return gated(gate, value, module.out_features // 2)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)  # an lm_head is too large for copies


def gated(gate: torch.Tensor, value: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of gates and values in blocks, as QuantLinear has them; padded to ``width`` each."""
    rows = torch.zeros(2, width, *gate.shape[1:], dtype=gate.dtype)
    rows[0, : len(gate)], rows[1, : len(value)] = gate, value
    return rows.unflatten(1, (-1, GATED_BLOCK)).transpose(0, 1).flatten(0, 2)


# Codes that a checkpoint has ------------------------------------------------------------------------------------------


def stored_config(checkpoint: Checkpoint, text: TextConfig) -> WeightConfig:
    """The formats in which a checkpoint is exported as it is.

    Decoder layers, vision encoder and lm_head that it has in codes keep those. What it has in float is in float16 in
    decoder layers, and in 8 bits elsewhere, as with w4. Of a checkpoint without codes: all in float32.

    Raises:
        UserError: of a decoder layer, or of the vision encoder, only a part is in codes.
    """
    if checkpoint.codes is None:
        return FLOAT_WEIGHTS
    codes = checkpoint.codes
    form = codes.form
    model = checkpoint.meta_model()
    VisionEncoder(model, form)
    Decoder(model, text, WeightConfig(form, lm_head=form))
    places = [LM_HEAD, _VISION, *(f"{DECODER_LAYERS}{i}" for i in range(text.num_hidden_layers))]
    layers = quant_layers(model).items()
    names = [part for layer, module in layers if module.form.is_quantised for part in parts(layer)]

    def is_stored(place: str) -> bool:
        of_place = [name for name in names if f"{name}.".startswith(f"{place}.")]
        in_codes = [name for name in of_place if name in codes]
        if in_codes and len(in_codes) < len(of_place):
            other = next(name for name in of_place if name not in codes)
            raise UserError(
                f"of {place}, {in_codes[0]} is in codes of 4 bits and {other} is not: expected all or none; give "
                "--weights w8, f16 or f32 to have them all in that."
            )
        return bool(in_codes)

    lm_head, vision, *decoder_layers = map(is_stored, places)
    return dataclasses.replace(
        WeightConfig.parse(f"{form.name},group={form.group}"),
        **{name: form for name, there in (("lm_head", lm_head), ("vision", vision)) if there},
        overrides=tuple((i, i, WeightFormat(16, form.group)) for i, there in enumerate(decoder_layers) if not there),
    )


def check_stored(checkpoint: Checkpoint, weights: WeightConfig, text: TextConfig) -> None:
    """Raise `UserError` for codes of 4 bits that those of the checkpoint cannot be."""
    if checkpoint.codes is None:
        return
    expected = checkpoint.codes.form.group
    for form in (weights.lm_head, weights.vision, *weights.layers(text.num_hidden_layers)):
        if form.bits == 4 and form.group != expected:
            raise UserError(
                f"the checkpoint's weights are in codes of 4 bits, in groups of {expected} inputs: groups of "
                f"{form.group} would round them again; leave --weights out, or give w4,group={expected}."
            )


def stored_values(checkpoint: Checkpoint, weights: WeightConfig, text: TextConfig) -> frozenset[int]:
    """Decoder layers whose values must stay as they are, for the codes that make and read them do."""
    return frozenset(
        i
        for i, form in enumerate(weights.layers(text.num_hidden_layers))
        for name in ("v_proj", "o_proj")
        if form.bits == 4 and checkpoint.codes and f"{DECODER_LAYERS}{i}.self_attn.{name}" in checkpoint.codes
    )


def stored_codes(
    checkpoint: Checkpoint, layers: Mapping[str, QuantLinear]
) -> Callable[[str], Mapping[str, torch.Tensor] | None]:
    """What `QuantisedWeights` takes as ``codes``: those of layers that the checkpoint has in their format."""

    def codes(name: str) -> Mapping[str, torch.Tensor] | None:
        if (stored := _stored(checkpoint, name, layers[name])) is None:
            return None
        return packed(_merged(name, layers[name], [stored.read(part) for part in parts(name)]))

    return codes


def add_stored_zeros(checkpoint: Checkpoint, layers: Mapping[str, QuantLinear]) -> None:
    """Give layers zeros where `stored_codes` has some."""
    for name, module in layers.items():
        if (stored := _stored(checkpoint, name, module)) and any(map(stored.has_zero, parts(name))):
            module.add_zero()


def _stored(checkpoint: Checkpoint, name: str, module: QuantLinear) -> StoredCodes | None:
    """The checkpoint's codes, if they have all of a layer in its format."""
    stored = checkpoint.codes
    if stored is None or module.form != stored.form or not all(part in stored for part in parts(name)):
        return None
    return stored


def _merged(name: str, module: QuantLinear, weights: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """The codes of a layer, those of its parts put together and padded to its size."""

    def whole(arrays: list[np.ndarray], columns: int) -> np.ndarray:
        return _whole(name, module, [torch.from_numpy(array) for array in arrays], columns).numpy()

    padded = module.form.padded(module.in_features)
    groups = padded // module.form.group
    zero = None
    if any(weight.zero is not None for weight in weights):
        zero = whole([np.zeros_like(w.scale) if w.zero is None else w.zero for w in weights], groups)
    codes, scale = whole([w.codes for w in weights], padded), whole([w.scale for w in weights], groups)
    return QuantisedWeight(codes, scale, module.in_features, module.form, zero)
