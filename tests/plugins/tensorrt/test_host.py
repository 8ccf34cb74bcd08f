"""The plugin computes attention through TensorRT's plugin interface: of TensorRT 8.6 and 9.x, and of 10."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines.device import available_target

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=[8, 10])
def driven(request) -> dict:
    command = [sys.executable, "-m", "tests.plugins.tensorrt.drive", available_target().value, str(request.param)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_results_against_float64(driven):
    """FP32 sums of some tens of terms, of the very bytes of the cache; on a GPU recorded in a CUDA graph."""
    assert len(driven["errors"]) == 19
    assert max(driven["errors"].values()) < 3e-6


def test_workspace_is_enough_for_all_that_a_profile_takes(driven):
    """That of its largest sizes, for which alone TensorRT asks."""
    for name, (most, within) in driven["workspaces"].items():
        assert most >= within > 0, name


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("attributes", "attribute causal is 3; expected 0 or 1. the plugin's creator did not take the attributes"),
        ("no format", "attribute kv_format is ''; expected one of f32, f16, k8v8, k8v4, k4v4"),
        ("inputs", "found 3 inputs and 1 outputs; expected 4 and 1"),
        ("type", "the plugin does not take tensor number 5 of its 7 inputs and 1 output"),
        ("words", "the past of values has shape [1, 2, 16, 32]; expected [1, 2, 16, 16]"),
        ("k", "k has shape [1, 2, 2, 128]; expected [1, 2, 1, 128]"),
        ("mask", "past_visible has shape [1, 5]; expected [1, 16], or 1 last for all slots alike"),
        ("lengths", "past_length has shape [2]; expected [1]"),
        ("scale", "past_scale has shape [2, 1, 2, 16]; expected [2, 1, 2, 8]"),
        ("halves", "the plugin does not take tensor number 7 of its 8 inputs and 1 output"),
        ("odd", "a quantised cache has an even capacity; found 15"),
        ("no scale", "found 7 inputs and 1 outputs; expected 8 and 1"),
        ("linear features", "x has shape [2, 7, 96]; expected 100 features"),
        ("linear weight", "the weight has shape [20, 25]; expected [20, 32]"),
        ("linear residual", "the residual has shape [2, 6, 20] beside x of shape [2, 7, 100]; expected 20 features"),
        ("linear inputs", "found 4 inputs and 1 outputs; expected 5 and 1"),
        ("linear types", "the plugin does not take tensor number 2 of its 5 inputs"),
        ("linear bits", "attribute bits is 3; expected 16, 8 or 4"),
        ("linear activation", "attribute activation is 7; expected 0, 1 or 2"),
        ("linear gates", "multiple of 128"),
        ("workspace", "QuantLinear: it could not tell the workspace that it needs"),
        ("head size", "Packed attention has head sizes 64, 72 and 128; found key_dim 80"),
    ],
)
def test_bad_input_is_told(driven, what, sentence):
    assert sentence in driven["refused"][what]


def test_sizes_that_would_overflow_are_told(driven):
    assert len(driven["sizes"]) >= 60
    for case, sentence in driven["sizes"].items():
        assert re.search(r"; expected|; it must be|is not a multiple of|has an even capacity", sentence), (
            case,
            sentence,
        )
