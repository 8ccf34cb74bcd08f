"""The kernels of linear layers against float64 products of the same codes: on the emulator, and on a GPU."""

import dataclasses

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.library import KernelLibrary, LinearArgs
from pascalvl.plugins.ops.quant_linear.op import Activation, Norm
from pascalvl.plugins.weight_format import GROUPS, WeightFormat
from pascalvl.plugins.weight_rows import InputNorm, QuantisedWeight, linear, quantise_inputs, quantise_weight
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import (
    away_from_ties,
    copy,
    pointer,
    quantised_linear,
    random_norm,
    relative_error,
)

FORMATS = [WeightFormat(bits, group) for bits in (8, 4) for group in GROUPS]
F16, F32 = WeightFormat(16), WeightFormat(32)
TOLERANCE = 1e-6
"""FP32 sums over groups, whose own sums are exact: measured up to 2e-7. The norm adds no more, where codes are the same
as of a norm in float64, see `away_from_ties`."""
FLOATS_TOLERANCE = 2e-6
"""FP32 sums of every product, up to 12,288 in turn."""
ODD_SHAPES = [(1, 32, 4), (1, 130, 5), (2, 96, 33), (3, 640, 130), (7, 1000, 70), (8, 256, 128), (9, 320, 140)]
ODD_SHAPES += [(6, 4100, 12)]  # four warps share its inputs
ODD_SHAPES += [(16, 128, 64), (17, 96, 132), (33, 256, 20), (64, 128, 128), (65, 200, 257), (130, 1152, 36)]
"""Rows, inputs, outputs."""
GATED_SHAPES = [(1, 32, 128), (2, 1030, 256), (3, 2100, 128), (5, 96, 384), (8, 640, 128), (9, 256, 128)]
NORM_SHAPES = [
    *((rows, inputs, outputs, inputs) for rows, inputs, outputs in ODD_SHAPES),
    (1, 2560, 8, 2560),  # a thread has a quad or two
    (2, 8200, 4, 8200),  # and reads the rest again
    (1, 9001, 4, 9001),
    (3, 512, 20, 128),  # several norms a row
    (9, 1152, 24, 288),
    (20, 4608, 12, 1152),
]
"""Rows, inputs, outputs, inputs that are normed together."""
GATED_SHAPES += [(16, 1152, 256), (33, 200, 384), (64, 96, 128), (65, 256, 128), (130, 320, 256)]
RMS = {"norm": Norm.RMS, "norm_weight": 16, "norm_size": 64}
"""Of bad arguments: never read."""
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


def random_weight(rng, out_features, in_features, form, with_zero=False):
    weight = rng.standard_normal((out_features, in_features)).astype(np.float32)
    if not form.is_quantised:
        padding = (0, 0), (0, form.padded(in_features) - in_features)
        return np.pad(weight, padding).astype(np.float16 if form.bits == 16 else np.float32)
    weight = quantise_weight(weight, form)
    most = 2 ** (form.bits - 1)
    zero = rng.integers(-most, most, weight.scale.shape).astype(np.float16)
    return dataclasses.replace(weight, zero=zero) if with_zero else weight


def check(
    library,
    rows,
    in_features,
    out_features,
    form,
    with_bias=True,
    with_zero=False,
    with_residual=False,
    activation=Activation.NONE,
    norm=Norm.NONE,
    norm_size=None,
):
    rng = np.random.default_rng(rows + in_features + out_features)
    spread = np.exp(rng.standard_normal(in_features)).astype(np.float32)  # outliers
    # Results about 1 in size, where activations bend.
    x = (0.1 + rng.standard_normal((rows, in_features)).astype(np.float32)) * spread / np.float32(in_features**0.5)
    weight = random_weight(rng, out_features, in_features, form, with_zero)
    of_norm = None
    if norm is not Norm.NONE:
        of_norm = random_norm(rng, norm, norm_size or in_features)
        x *= np.float32(in_features**0.5)
        shrunk = [None if v is None else v / np.float32(in_features**0.5) for v in (of_norm.weight, of_norm.bias)]
        of_norm = dataclasses.replace(of_norm, weight=shrunk[0], bias=shrunk[1])
        if form.is_quantised:
            x = away_from_ties(x, of_norm, form)
    bias = rng.standard_normal(out_features).astype(np.float32) if with_bias else None
    width = out_features // 2 if activation is Activation.SILU_GATED else out_features
    residual = rng.standard_normal((rows, width)).astype(np.float32) if with_residual else None
    case = x, weight, bias, residual, activation, of_norm
    found, expected = quantised_linear(library, *case), linear(*case)
    assert relative_error(found, expected) < (TOLERANCE if form.is_quantised else FLOATS_TOLERANCE)


@pytest.mark.parametrize("form", [*FORMATS, F16, F32], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_linear_matches_float64(library, shape, form):
    check(library, *shape, form)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_zeros(library, shape, form):
    check(library, *shape, form, with_zero=True)


@pytest.mark.parametrize(
    ("form", "with_zero"),
    [
        (F16, False),
        (F32, False),
        *((form, zero) for form in (WeightFormat(8, 32), WeightFormat(4, 64)) for zero in (False, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("activation", "shape"),
    [
        *(
            (activation, shape)
            for activation in Activation
            if activation is not Activation.SILU_GATED
            for shape in ODD_SHAPES
        ),
        *((Activation.SILU_GATED, shape) for shape in GATED_SHAPES),
    ],
    ids=str,
)
def test_activations_and_residuals(library, activation, shape, form, with_zero):
    for with_bias, with_residual in ((True, False), (False, True), (True, True)):
        check(library, *shape, form, with_bias, with_zero, with_residual, activation)


@pytest.mark.parametrize("form", [WeightFormat(8, 32), WeightFormat(4), F16, F32], ids=str)
@pytest.mark.parametrize("norm", [Norm.RMS, Norm.LAYER], ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norms(library, shape, norm, form):
    *sizes, norm_size = shape
    if form.is_quantised and norm_size != sizes[1]:
        form = dataclasses.replace(form, group=32)  # which divides what is normed together
    check(library, *sizes, form, with_zero=form.bits == 4, norm=norm, norm_size=norm_size)


@pytest.mark.parametrize("seed", range(150))
def test_random_layers(library, seed):
    """All that a layer may have, at once and in any sizes."""
    rng = np.random.default_rng(seed)
    form = WeightFormat((4, 8, 16, 32)[rng.integers(4)], GROUPS[rng.integers(3)])
    activation, norm = Activation(rng.integers(4)), Norm(rng.integers(3))
    rows, inputs = int(rng.choice([1, 2, 3, 5, 8, 9, 17, 40])), int(rng.integers(1, 900))
    outputs = 128 * int(rng.integers(1, 3)) if activation is Activation.SILU_GATED else int(rng.integers(1, 200))
    norm_size = inputs
    if norm is not Norm.NONE and rng.integers(2):
        norm_size = form.group * int(rng.integers(1, 4)) if form.is_quantised else int(rng.integers(3, 300))
        inputs = norm_size * int(rng.integers(1, 5))
    bias, residual, zero = rng.integers(2, size=3).astype(bool)
    check(library, rows, inputs, outputs, form, bias, zero and form.is_quantised, residual, activation, norm, norm_size)


def test_norms_of_extreme_inputs(library):
    """Zeros, of which epsilon makes zeros, numbers whose squares float32 has no more, and all inputs alike."""
    ends = np.where(np.arange(256) % 3, 1, -1).astype(np.float32)
    x = np.stack([0 * ends, ends, 1e17 * ends, 1e-30 * ends, np.ones(256, np.float32)])
    norm = InputNorm(Norm.RMS, ends, 1e-6)
    layer = InputNorm(Norm.LAYER, ends, 1e-6, 0.5 * ends)
    weight = np.stack([ends, np.arange(256, dtype=np.float32)])
    for of_norm in (norm, layer):
        for w in (weight, quantise_weight(weight, WeightFormat(8, 32))):
            found, expected = quantised_linear(library, x, w, norm=of_norm), linear(x, w, norm=of_norm)
            for row, wanted in zip(found, expected, strict=True):
                np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_variance_is_of_what_the_mean_leaves(library):
    """A mean of 1,000 deviations: the difference of squares would have lost a tenth of the variance, this has 1e-4."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((3, 1024))).astype(np.float32)
    case = x, np.eye(1024, dtype=np.float32)
    norm = InputNorm(Norm.LAYER, np.ones(1024, np.float32), 1e-6, np.zeros(1024, np.float32))
    assert relative_error(quantised_linear(library, *case, norm=norm), linear(*case, norm=norm)) < 2e-4


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_are_exact(library, bits, rows):
    """Whole numbers come out as such, also those that fill the integers' room: code - zero up to twice a code."""
    rng = np.random.default_rng(0)
    most = 2 ** (bits - 1)
    codes = rng.integers(-most, most, (8, 256)).astype(np.int8)
    zero = rng.integers(-most, most + 1, (8, 2)).astype(np.float16)
    codes[:2], zero[:2] = -most, most
    codes[2:4], zero[2:4] = most - 1, -most
    weight = QuantisedWeight(codes, np.ones((8, 2), np.float16), 256, WeightFormat(bits), zero)
    x = rng.integers(-127, 128, (rows, 256)).astype(np.float32)
    x[0] = 127
    x[:, ::128] = 127  # so that a group's scale is 1
    x[:, 1] = 126
    np.testing.assert_array_equal(
        quantised_linear(library, x, weight),
        x.astype(np.float64) @ (codes - np.repeat(zero.astype(np.float64), 128, 1)).T,
    )


@pytest.mark.parametrize("rows", [8, 9])
@pytest.mark.parametrize("activation", [Activation.GELU_TANH, Activation.SILU_GATED, Activation.GELU_ERF], ids=str)
def test_activations_do_not_overflow(library, activation, rows):
    x = np.array([0, 1e-30, -1, 100, -100, 1e30, -1e30, -3e38, 3e38], np.float32)[-rows:, None]
    weight = np.zeros((128, 8), np.float16)
    weight[:64, 0] = 1
    bias = np.repeat(np.array([0, 1], np.float32), 64)
    found = quantised_linear(library, x, weight, bias, activation=activation)
    with np.errstate(over="ignore"):
        expected = linear(x, weight, bias, activation=activation)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", [WeightFormat(8), WeightFormat(4), F16], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 200])
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("model", WIDTHS)
def test_widths_of_the_real_models(library, model, has_norm, rows, form, request):
    if "EMULATOR" in request.node.name:
        pytest.skip("takes too long on the emulator")
    norm = Norm.NONE if not has_norm else Norm.LAYER if model == "vision" else Norm.RMS
    for in_features, out_features in WIDTHS[model]:
        if (in_features, out_features) == LM_HEAD and rows > 1:
            continue  # it meets the last token alone
        check(library, rows, in_features, out_features, form, with_bias=model == "vision", norm=norm)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0; it must be at least 1"),
        ({"bits": 5}, "The weights have 5 bits; expected 32, 16, 8 or 4"),
        ({"group": 48}, "Groups have 48 inputs; expected 32, 64 or 128"),
        ({"x": None}, "x is a null pointer"),
        ({"scale": None}, "scale is a null pointer"),
        ({"bits": 16}, "Weights of 16 bits have no scale; expected a null pointer"),
        ({"bits": 16, "scale": None, "zero": 16}, "Weights of 16 bits have no zero; expected a null pointer"),
        ({"bits": 32}, "Weights of 32 bits have no scale; expected a null pointer"),
        (
            {"activation": 4},
            r"The activation is 4; expected 0 \(none\), 1 \(GELU by tanh\), 2 \(SiLU, gated\) or 3 \(GELU\)",
        ),
        ({"activation": 2}, "A gated layer has 4 outputs; expected a multiple of 128"),
        ({"norm": 3}, r"The norm is 3; expected 0 \(none\), 1 \(RMS\) or 2 \(layer norm\)"),
        ({"norm_weight": 16}, "Norm 0 has no norm_weight; expected a null pointer"),
        ({"norm": 1}, "norm_weight is a null pointer"),
        (RMS | {"norm_bias": 16}, "Norm 1 has no norm_bias; expected a null pointer"),
        (RMS | {"norm": 2}, "norm_bias is a null pointer"),
        (RMS | {"norm_size": 0}, "norm_size is 0; it must be at least 1"),
        (RMS | {"norm_size": 48}, "norm_size is 48; expected a divisor of in_features, which is 64"),
        (
            RMS | {"norm_size": 16},
            "norm_size is 16; expected in_features, which is 64, or a multiple of the groups of 32",
        ),
        (RMS | {"epsilon": -1e-6}, "epsilon is -1e-06; expected a finite number of at least 0"),
        (RMS | {"epsilon": float("inf")}, "epsilon is inf; expected a finite number of at least 0"),
        (RMS | {"epsilon": float("nan")}, "epsilon is nan; expected a finite number of at least 0"),
    ],
    ids=str,
)
def test_bad_arguments(library, change, message):
    x, weight = np.zeros((1, 64), np.float32), quantise_weight(np.ones((4, 64), np.float32), WeightFormat(8, 32))
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
    np.testing.assert_array_equal(scale.view(np.float16)[:, :20].T, found.scale)
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
