"""The parameters of `QuantLinear` layers, made of a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pascalvl.export.checkpoint import TOKEN_EMBEDDINGS
from pascalvl.export.modules import GATE_UP, MERGED
from pascalvl.export.quant_linear import QuantLinear
from pascalvl.export.quantiser import round_to_nearest
from pascalvl.export.transforms import WeightSource
from pascalvl.plugins.quant_linear import GATED_BLOCK
from pascalvl.plugins.weight_rows import QuantisedWeight

LM_HEAD = "lm_head"


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
            return nn.functional.pad(weight, (0, module.weight.shape[1] - weight.shape[1])).half()
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
        tensors = [nn.functional.pad(tensor, (0, module.in_features - tensor.shape[1])) for tensor in tensors]
    if layer.endswith(f".{GATE_UP}"):
        return gated(*tensors, module.out_features // 2)
    return torch.cat(tensors)


def gated(gate: torch.Tensor, value: torch.Tensor, width: int) -> torch.Tensor:
    """Rows of gates and values in blocks, as `pascalvl.plugins.quant_linear` has them; padded to ``width`` each."""
    rows = torch.zeros(2, width, *gate.shape[1:])
    rows[0, : len(gate)], rows[1, : len(value)] = gate, value
    return rows.unflatten(1, (-1, GATED_BLOCK)).transpose(0, 1).flatten(0, 2)
