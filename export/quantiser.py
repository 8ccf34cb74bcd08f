"""Weights of linear layers to codes: which scales, and which code for each element.

- *Round to nearest*, with a search for each group's scale: a smaller one clips the largest elements, a larger one is
  symmetric, and whichever leaves the least error, weighted by the size of the inputs where that is known, is taken.
- *Scaling* of inputs that matter more (AWQ, Lin et al., arXiv:2306.00978): a channel of the inputs is divided, and its
  column of the weight multiplied, by a power of the channel's size. The division is folded into what comes before.
- *Compensation* (GPTQ, Frantar et al., arXiv:2210.17323): columns are rounded one after the other, and the columns yet
  to come take over what the inputs' correlation lets them of the error.

The mathematics is in PyTorch, because it is quick with all cores of a CPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight

_CLIPS = (1.0, 8 / 7, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Tried scales of 4 bits, as shares of that which gives the largest element code -8."""
_POWERS = tuple(i / 10 for i in range(11))
_OUTPUTS_TRIED = 1024
"""About so many tell which power is best: the others would say the same, and take the most of a fit's time."""
_DAMPING = 0.01
"""Share of the mean that is added to the moment's diagonal: what the prompts have not shown may come too."""
_BLOCK = 128
_ELEMENTS_AT_ONCE = 1 << 25
"""What is rounded at a time, lest several copies of an lm_head are in memory."""
_ELEMENTS_SEARCHED = 1 << 18
"""Those that a search for scales takes at a time: the machine's caches hold them."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How 4-bit codes are found; all of it by default. Without a calibration there is only ``clip``."""

    clip: bool = True
    scale: bool = True
    compensate: bool = True


ALL = Method()


def round_to_nearest(
    weight: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None = None, clip: bool = True
) -> QuantisedWeight:
    """Codes of a float32 weight ``[out_features, in_features]``, each rounded by itself.

    Args:
        importance: of each input ``[in_features]``, its mean square; None: all alike.
        clip: whether scales of 4 bits are searched for.
    """
    codes, scales = [], []
    for rows in weight.split(max(1, _ELEMENTS_AT_ONCE // weight.shape[1])):
        groups = _grouped(rows, form)
        scales.append(_scales(groups, form, importance, clip))
        codes.append(_codes(groups, scales[-1][..., None], form).to(torch.int8).flatten(1))
    return _weight(torch.cat(codes), torch.cat(scales), weight.shape[1], form)


def compensated(weight: torch.Tensor, form: WeightFormat, moment: torch.Tensor, clip: bool = True) -> QuantisedWeight:
    """Codes of a float32 weight, columns rounded one after the other.

    Scales are found before; columns of larger inputs come first, as they have most to lose and then most of the others
    to help them.

    Args:
        moment: E x x^T of the inputs, ``[in_features, in_features]``.
    """
    in_features = weight.shape[1]
    importance = moment.diagonal()
    scale = _scales(_grouped(weight, form), form, importance, clip)
    of_column = torch.arange(in_features) // form.group
    order = importance.argsort(descending=True)
    upper = _inverse_factor(moment[order][:, order])
    rest = weight[:, order].clone()
    steps = scale[:, of_column[order]]
    codes = torch.zeros(len(weight), form.padded(in_features), dtype=torch.int8)
    for start in range(0, in_features, _BLOCK):
        stop = min(start + _BLOCK, in_features)
        block, factor = rest[:, start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for i in range(stop - start):
            step = steps[:, start + i]
            code = _codes(block[:, i], step, form)
            codes[:, order[start + i]] = code
            errors[:, i] = (block[:, i] - code * step) / factor[i, i]
            block[:, i + 1 :] -= errors[:, i : i + 1] * factor[i, i + 1 :]
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return _weight(codes, scale, in_features, form)


def input_scale(
    weights: list[torch.Tensor], form: WeightFormat, moment: torch.Tensor, clip: bool = True
) -> torch.Tensor:
    """By how much columns of the weights that read the same inputs are multiplied, ``[in_features]``; its geometric
    mean is 1.

    The best of some powers of the inputs' sizes, by the error of rounding to nearest.
    """
    importance = moment.diagonal().clamp(min=moment.diagonal().mean() * 1e-6)
    tried = [weight[:: max(1, len(weight) // _OUTPUTS_TRIED)] for weight in weights]
    best, least = torch.ones_like(importance), None
    for power in _POWERS:
        scale = importance ** (power / 2)
        scale = scale / scale.log().mean().exp()
        error = 0.0
        for weight in tried:
            found = round_to_nearest(weight * scale, form, importance / scale**2, clip)
            error += ((torch.from_numpy(found.dense()) / scale - weight) ** 2 @ importance).sum().item()
        if least is None or error < least:
            best, least = scale, error
    return best


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moment's inverse, float32."""
    damped = moment.double()
    diagonal = damped.diagonal()
    mean = diagonal.mean()
    diagonal += _DAMPING * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _grouped(weight: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """``[out_features, groups, group]``, with zeros beyond the inputs."""
    padded = torch.nn.functional.pad(weight, (0, form.padded(weight.shape[1]) - weight.shape[1]))
    return padded.unflatten(1, (-1, form.group))


def _scales(groups: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None, clip: bool) -> torch.Tensor:
    """Scales ``[out_features, groups]``, as float16 keeps them, in float32."""
    if importance is not None:
        importance = _grouped(importance[None], form)[0]
    rows = max(1, _ELEMENTS_SEARCHED // groups[0].numel())
    return torch.cat([_best_scale(part, form, importance, clip) for part in groups.split(rows)])


def _best_scale(groups: torch.Tensor, form: WeightFormat, importance: torch.Tensor | None, clip: bool) -> torch.Tensor:
    if form.bits == 8:
        return _stored(groups.abs().amax(-1) / 127)
    most, least = groups.amax(-1), groups.amin(-1)
    whole = torch.where(most >= -least, most, least) / -8
    best, smallest = _stored(whole), None
    for share in _CLIPS if clip else ():
        scale = _stored(whole * share)
        error = (groups - _codes(groups, scale[..., None], form) * scale[..., None]).square_()
        error = error.sum(-1) if importance is None else (error * importance).sum(-1)
        if smallest is None:
            smallest = error
        else:
            is_better = error < smallest
            best, smallest = torch.where(is_better, scale, best), torch.where(is_better, error, smallest)
    return best


def _stored(scale: torch.Tensor) -> torch.Tensor:
    return scale.half().float() + 0.0  # a scale of zero has no sign


def _codes(x: torch.Tensor, scale: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Nearest codes, as float32."""
    lowest, highest = (-127, 127) if form.bits == 8 else (-8, 7)
    inverse = torch.where(scale != 0, 1 / scale, 0)
    return (x * inverse).round_().clamp_(lowest, highest)


def _weight(codes: torch.Tensor, scale: torch.Tensor, in_features: int, form: WeightFormat) -> QuantisedWeight:
    return QuantisedWeight(codes.numpy(), scale.numpy().astype(np.float16), in_features, form)
