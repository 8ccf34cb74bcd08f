"""The kernels of linear layers against float64 products of the same codes: on the emulator, and on a GPU."""

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import KernelLibrary, LinearArgs
from pascalvl.plugins.weight_format import GROUPS, WeightFormat
from pascalvl.plugins.weight_rows import linear, quantise_inputs, quantise_weight
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import copy, pointer, quantised_linear, relative_error

FORMATS = [WeightFormat(bits, group) for bits in (8, 4) for group in GROUPS]
TOLERANCE = 1e-6
"""FP32 sums over groups, whose own sums are exact: measured up to 2e-7."""
ODD_SHAPES = [(1, 32, 4), (1, 130, 5), (2, 96, 33), (3, 640, 130), (7, 1000, 70), (8, 256, 128), (9, 320, 140)]
ODD_SHAPES += [(16, 128, 64), (17, 96, 132), (33, 256, 20), (64, 128, 128), (65, 200, 257), (130, 1152, 36)]
"""Rows, inputs, outputs."""
LM_HEAD = 2048, 151936
WIDTHS = {
    "2B": [(2048, 4096), (2048, 6144), (6144, 2048), LM_HEAD],
    "4B": [(2560, 6144), (2560, 9728), (9728, 2560), (4096, 2560)],
    "8B": [(4096, 6144), (4096, 12288), (12288, 4096)],
    "vision": [(1024, 3072), (1152, 4304), (4304, 1152), (4608, 2560), (1536, 1152)],
}


@pytest.fixture(scope="module", params=reference.targets())
def library(request) -> KernelLibrary:
    return reference.open_library(request.param)


def check(library, rows, in_features, out_features, form, with_bias=True):
    rng = np.random.default_rng(rows + in_features + out_features)
    spread = np.exp(rng.standard_normal(in_features)).astype(np.float32)  # outliers
    x = rng.standard_normal((rows, in_features)).astype(np.float32) * spread
    weight = quantise_weight(rng.standard_normal((out_features, in_features)).astype(np.float32), form)
    bias = rng.standard_normal(out_features).astype(np.float32) if with_bias else None
    assert relative_error(quantised_linear(library, x, weight, bias), linear(x, weight, bias)) < TOLERANCE


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_linear_matches_float64(library, shape, form):
    check(library, *shape, form)


@pytest.mark.parametrize("form", [WeightFormat(8), WeightFormat(4)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 200])
@pytest.mark.parametrize("model", WIDTHS)
def test_widths_of_the_real_models(library, model, rows, form, request):
    if "EMULATOR" in request.node.name:
        pytest.skip("takes too long on the emulator")
    for in_features, out_features in WIDTHS[model]:
        if (in_features, out_features) == LM_HEAD and rows > 1:
            continue  # it meets the last token alone
        check(library, rows, in_features, out_features, form, with_bias=model == "vision")


def test_extreme_inputs(library):
    """Zeros, the largest codes on both sides, which fill the integers' room, and numbers near float32's ends."""
    for bits in (8, 4):
        form = WeightFormat(bits)
        ends = np.where(np.arange(256) % 3, 1, -1).astype(np.float32)
        x = np.stack([0 * ends, ends, -ends, 1e30 * ends, 1e-30 * ends, *(np.eye(256, dtype=np.float32)[:8])])
        weight = quantise_weight(np.stack([ends, -ends, np.ones(256, np.float32), 0 * ends]), form)
        found, expected = quantised_linear(library, x, weight), linear(x, weight)
        for row, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_bad_arguments(library):
    x, weight = np.zeros((1, 64), np.float32), quantise_weight(np.ones((4, 64), np.float32), WeightFormat(8, 32))
    for change, message in (
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"bits": 5}, "The weights have 5 bits; expected 8 or 4"),
        ({"group": 48}, "Groups have 48 inputs; expected 32, 64 or 128"),
        ({"x": None}, "x is a null pointer"),
    ):
        arrays = [copy(array) for array in (x, *weight.packed().values(), x)]
        fields = dict(zip(("x", "weight", "scale", "out"), map(pointer, arrays), strict=True))
        args = {**fields, "rows": 1, "in_features": 64, "out_features": 4, "bits": 8, "group": 32, **change}
        with pytest.raises(UserError, match=message):
            library.linear_workspace(LinearArgs(**args))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_rounding_of_weights(form):
    """Within half a step, a whole one where 4 bits have no code 8; and what is packed is what is meant."""
    weight = np.random.default_rng(0).standard_normal((20, 200)).astype(np.float32)
    found = quantise_weight(weight, form)
    step = np.repeat(np.abs(found.scale.astype(np.float32)), form.group, 1)[:, :200]
    assert (np.abs(found.dense() - weight) <= step * (1.001 if form.bits == 4 else 0.501)).all()
    codes, scale = (found.packed()[name] for name in ("weight", "scale"))
    np.testing.assert_array_equal(scale[:, :20].T, found.scale)
    for k in (0, 1, 5, 42, 199):
        if form.bits == 8:
            code = codes.view(np.int8)[:, k]
        else:
            byte = codes.view(np.uint8)[:, 4 * (k // 8) + k % 4]
            code = ((byte >> 4 * (k % 8 // 4) & 15).astype(np.int8) ^ 8) - 8
        np.testing.assert_array_equal(code, found.codes[:, k])


def test_inputs_are_rounded_by_group():
    x = np.array([[1, -2, *[0] * 30, 127, 254, *[0] * 6]], np.float32)
    codes, scale = quantise_inputs(x, WeightFormat(8, 32))
    assert codes.shape == (1, 64)
    np.testing.assert_array_equal(scale, np.array([[2 / 127, 2]], np.float32))
    assert codes[0, [0, 1, 32, 33]].tolist() == [64, -127, 64, 127]
