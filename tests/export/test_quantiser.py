"""The quantiser's parts, by the error that they are to make small: of a layer's outputs, over correlated inputs."""

import numpy as np
import pytest
import torch

from pascalvl.export.quantiser import compensated, input_scale, round_to_nearest
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import quantise_weight

OUT, IN, ROWS = 64, 200, 3000


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs, of which some channels are large and all correlated."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(IN, IN, generator=generator) / IN**0.5 + torch.eye(IN)
    size = torch.exp(torch.randn(IN, generator=generator))
    inputs = torch.randn(ROWS, IN, generator=generator) @ mix * size
    return torch.randn(OUT, IN, generator=generator) / IN**0.5, inputs


def error(layer, quantised, scale=1.0) -> float:
    """Of the outputs, relative; the inputs divided by ``scale``."""
    weight, inputs = layer
    found = torch.from_numpy(quantised.dense()) / scale
    return ((inputs @ (found - weight).T).norm() / (inputs @ weight.T).norm()).item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 128])
def test_nearest_is_the_kernels_own_rounding(layer, bits, group):
    found = round_to_nearest(layer[0], WeightFormat(bits, group), clip=False)
    expected = quantise_weight(layer[0].numpy(), WeightFormat(bits, group))
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scale, expected.scale)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_each_part_makes_the_error_smaller(layer, group):
    weight, inputs = layer
    form, moment = WeightFormat(4, group), inputs.T @ inputs / ROWS
    nearest = error(layer, round_to_nearest(weight, form, clip=False))
    searched = error(layer, round_to_nearest(weight, form))
    weighted = error(layer, round_to_nearest(weight, form, moment.diagonal()))
    scale = input_scale([weight], form, moment)
    scaled = error(layer, round_to_nearest(weight * scale, form, moment.diagonal() / scale**2), scale)
    compensating = error(layer, compensated(weight, form, moment))
    both = error(layer, compensated(weight * scale, form, moment / scale / scale[:, None]), scale)
    assert nearest > searched > weighted > scaled
    assert compensating < 0.8 * weighted
    assert both < 0.8 * scaled


def test_the_search_never_loses(layer):
    """In every group, by the error that it looks at."""
    form = WeightFormat(4, 32)

    def errors(clip):
        dense = torch.from_numpy(round_to_nearest(layer[0], form, clip=clip).dense())
        return torch.nn.functional.pad((dense - layer[0]) ** 2, (0, 24)).unflatten(1, (-1, 32)).sum(-1)

    assert (errors(True) <= errors(False) * (1 + 1e-6)).all()


def test_inputs_that_were_never_seen():
    """A channel that is always zero, and a layer without any input, are rounded like others."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    form = WeightFormat(4, 32)
    moment = torch.eye(64)
    moment[3, 3] = 0
    for seen in (moment, torch.zeros(64, 64)):
        found = torch.from_numpy(compensated(weight, form, seen).dense())
        assert (found - weight).norm() < 0.15 * weight.norm()
    assert input_scale([weight], form, moment).isfinite().all()


def test_a_scale_is_of_the_weights_own_size(layer):
    weight, inputs = layer
    scale = input_scale([weight], WeightFormat(4), inputs.T @ inputs / ROWS)
    assert scale.log().mean().abs() < 1e-5
    assert scale.min() > 0
