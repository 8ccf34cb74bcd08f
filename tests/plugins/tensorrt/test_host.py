"""The plugin computes attention through TensorRT's plugin interface: of TensorRT 8.6 and 9.x, and of 10."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines.device.memory import available_target

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[8, 10])
def driven(request) -> dict:
    command = [sys.executable, "-m", "tests.plugins.tensorrt.drive", available_target().value, str(request.param)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


STEPS = {"f32": 1e-6, "f16": 4e-4, "k8": 0.01, "k4": 0.15, "v8": 0.01, "v4": 0.15}
"""Errors that a format's rounding leaves, relative to rows of normal numbers."""


def test_results_against_float64(driven):
    """FP32 sums of some tens of terms, of the very bytes of the cache; on a GPU recorded in a CUDA graph."""
    assert len(driven["errors"]) == 14
    assert max(driven["errors"].values()) < 3e-6
    assert len(driven["causal"]) == 26
    for case, errors in driven["causal"].items():
        formats = re.findall("[kv][48]", case) or [case.split()[0]] * 2
        # One code of a query that float32's rounding carried over a border: some 1e-4.
        assert errors["result"] < (1e-3 if "k" in formats[0] else 3e-6), case
        assert errors["key"] < STEPS[formats[0]], case
        assert errors["value"] < STEPS[formats[1]], case
        assert errors["padding"] == 0, case


def test_any_integers_write_nothing_beside_the_outputs(driven):
    """As TensorRT times plugins on; keys and values do not depend on where the tokens are from."""
    assert len(driven["made up"]) == 20
    for case, are_numbers in driven["made up"].items():
        assert are_numbers, case


def test_workspace_is_enough_for_all_that_a_profile_takes(driven):
    """That of its largest sizes, for which alone TensorRT asks: as much as any call needs, and no more."""
    assert len(driven["workspaces"]) == 14
    for case, (asked, needed) in driven["workspaces"].items():
        assert asked == needed > 0, case


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("attributes", "attribute causal is 3; expected 0 or 1. the plugin's creator did not take the attributes"),
        ("no format", "attribute kv_format is ''; expected one of f32, f16, k8v8, k8v4, k4v4"),
        ("heads", "num_heads 5 is not a multiple of num_kv_heads 2."),
        ("key size", "head_dim is 80; expected 64, 96, 112 or 128."),
        ("head size", "Packed attention has head sizes 64, 72 and 128; found head_dim 80"),
        ("inputs", "found 3 inputs and 1 outputs; expected 4 and 1"),
        ("no scale", "found 11 inputs and 4 outputs; expected 12 and 4"),
        ("type", "the plugin does not take tensor number 9 of its 11 inputs and 3 outputs"),
        ("halves", "the plugin does not take tensor number 11 of its 12 inputs and 4 outputs"),
        ("qkv", "qkv has shape [1, 512]; expected 2 dimensions, the last of 1024"),
        ("qkv's axes", "qkv has shape [1, 1, 1024]; expected 2 dimensions, the last of 1024"),
        ("no axes", "qkv has shape []; expected 2 dimensions, the last of 1024"),
        ("norm", "k_norm has shape [64]; expected [128]"),
        ("table", "rope_cos has shape [2, 128]; expected [1, 128]"),
        ("sine", "rope_sin has shape [1, 64]; expected [1, 128]"),
        ("causal bounds", "cu_seqlens has shape [1, 2]; expected 1 dimension"),
        ("no sequences", "batch is 0; it must be at least 1"),
        ("lengths", "past_length has shape [2]; expected [1]"),
        ("table's axes", "page_table has shape [2]; expected 2 dimensions"),
        ("page table", "page_table has shape [2, 2]; expected [1, 2]"),
        ("mask", "past_visible has shape [1, 255]; expected [1, 256], or 1 last for all slots alike"),
        ("mask of a page", "past_visible has shape [1, 128]; expected [1, 256], or 1 last for all slots alike"),
        ("mask's axes", "past_visible has shape [256]; expected [1, 256], or 1 last for all slots alike"),
        ("mask's sequences", "past_visible has shape [2, 1]; expected [1, 1]"),
        ("axes", "past_key has shape [2, 128, 32]; expected 4 dimensions"),
        ("slots", "past_key has shape [3, 2, 64, 32]; expected [3, 2, 128, 32]"),
        ("heads of the pool", "past_key has shape [3, 1, 128, 32]; expected [3, 2, 128, 32]"),
        ("words", "past_value has shape [3, 2, 128, 32]; expected [3, 2, 128, 16]"),
        ("values' pages", "past_value has shape [2, 2, 128, 16]; expected [3, 2, 128, 16]"),
        ("scale", "past_scale has shape [3, 2, 127]; expected [3, 2, 128]"),
        ("packed qkv", "qkv has shape [8, 192]; expected 2 dimensions, the last of 384"),
        ("bounds", "cu_seqlens has shape [1, 2]; expected 1 dimension"),
        ("linear features", "x has shape [2, 7, 96]; expected 100 features"),
        ("linear weight", "the weight has shape [20, 25]; expected [20, 32]"),
        ("linear residual", "the residual has shape [2, 6, 20] beside x of shape [2, 7, 100]; expected 20 features"),
        ("linear inputs", "found 4 inputs and 1 outputs; expected 7 and 1"),
        ("linear types", "the plugin does not take tensor number 2 of its 7 inputs"),
        ("linear floats", "the plugin does not take tensor number 1 of its 6 inputs"),
        ("linear bits", "attribute bits is 3; expected 32, 16, 8 or 4"),
        ("linear activation", "attribute activation is 7; expected 0, 1, 2 or 3"),
        ("linear norm", "attribute norm is 3; expected 0, 1 or 2"),
        ("norm size", "attribute norm_size is 48; expected 100 or a divisor of it that has whole groups"),
        ("norm's groups", "attribute norm_size is 50; expected 100 or a divisor of it that has whole groups"),
        ("no norm", "attribute norm_size is 100; expected 0 without a norm"),
        ("epsilon", "attribute epsilon is -0.500000; expected a finite number of at least 0"),
        ("norm's weight", "the norm's weight has shape [96]; expected [100]"),
        ("norm's bias", "the norm's bias has shape [1, 100]; expected [100]"),
        ("linear gates", "multiple of 128"),
        ("workspace", "QuantLinear: it could not tell the workspace that it needs"),
    ],
)
def test_bad_input_is_told(driven, what, sentence):
    assert sentence in driven["refused"][what]


def test_sizes_that_would_overflow_are_told(driven):
    assert len(driven["sizes"]) >= 120
    for case, sentence in driven["sizes"].items():
        assert re.search(r"; expected|; it must be|has head sizes|is not a multiple of", sentence), (
            case,
            sentence,
        )
