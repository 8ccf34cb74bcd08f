"""The TensorRT plugin in the registry of TensorRT 10.16 itself (tensorrt-lean, which needs no GPU for that)."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.tensorrt import build as plugin_build


def in_registry(library: Path) -> tuple[dict, str]:
    """What `registry.py` found, and what the plugin reported."""
    script = Path(__file__).with_name("registry.py")
    result = subprocess.run([sys.executable, script, library], capture_output=True, text=True, check=True)
    return json.loads(result.stdout), result.stderr


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> tuple[dict, str]:
    library = tmp_path_factory.mktemp("plugin") / "libpascalvl_plugin.so"
    plugin_build.build(library, 10, target=Target.EMULATOR)
    return in_registry(library)


def test_the_creator_is_found_by_the_nodes_names(tried):
    found, _ = tried
    assert found["found"]
    ops = vars(flash_attention)
    assert sorted(found["fields"]) == sorted(value for name, value in ops.items() if name.startswith("ATTR_"))
    assert found["identity"] == [OP_NAME, OP_VERSION, ""]
    assert found["outputs"] == [4, 3, 1]


def test_plugins_survive_serialisation_and_cloning(tried):
    found, _ = tried
    assert bytes.fromhex(found["bytes"]) == struct.pack("<4sIi2f5i", b"PVFA", 5, 1, 0.125, 0.5, 4, 2, 128, 96, 3)
    assert found["clone"] == found["copy"] == found["bytes"]
    assert bytes.fromhex(found["vision"]) == struct.pack("<4sIi2f5i", b"PVFA", 5, 0, 0.125, 0, 2, 2, 72, 72, 0)


def test_what_is_not_understood_is_refused_in_words(tried):
    found, told = tried
    assert set(found["refused"].values()) == {None}
    for sentence in (
        "a serialised plugin of 39 bytes; expected 40: build the engine again",
        "the serialised plugin is not this one's",
        "the serialised plugin has layout 9; expected 5",
        "attribute num_heads is missing",
        "attribute causal is 2; expected 0 or 1",
        "attribute causal must be one int32",
        "attribute kv_format is 'k8'; expected one of f32, f16, k8v8, k8v4, k4v4",
        "num_heads 4 is not a multiple of num_kv_heads 3.",
        "softmax_scale is nan; expected a number between -1e+06 and 1e+06.",
        "softmax_scale is -inf; expected a number between -1e+06 and 1e+06.",
        "epsilon is -0.5; expected a number from 0 to 1.",
        "head_dim is 72; expected 64, 96, 112 or 128.",
        "Packed attention has head sizes 64, 72 and 128; found head_dim 72 and value_dim 64.",
    ):
        assert f"{OP_NAME}: {sentence}" in told


def test_made_up_bytes_are_a_plugin_or_refused(tried):
    """Those that are taken are what the kernels take, too."""
    made_up = tried[0]["made up"]

    def is_attention(causal, scale, epsilon, heads, kv_heads, head_dim, value_dim, kv_format):
        in_grid = {heads, kv_heads} <= set(range(1, 65536)) and heads % kv_heads == 0
        dims = {head_dim, value_dim} <= {64, 96, 112, 128}
        if not causal:
            dims = head_dim == value_dim and head_dim in (64, 72, 128) and heads == kv_heads
        cached = kv_format in range(5 if causal else 1)
        return causal in (0, 1) and abs(scale) <= 1e6 and 0 <= epsilon <= 1 and in_grid and dims and cached

    def is_linear(inputs, outputs, bits, group, activation, has_zero, has_bias, has_residual, norm, size, epsilon):
        sizes = inputs in range(1, (1 << 24) + 1) and outputs in range(1, (1 << 24) + 1)
        codes = bits in (32, 16) or (bits in (8, 4) and group in (32, 64, 128))
        flags = {has_zero, has_bias, has_residual} <= {0, 1} and not (bits >= 16 and has_zero)
        if not (sizes and codes and flags and norm in (0, 1, 2) and 0 <= epsilon < float("inf")):
            return False
        whole = size > 0 and inputs % size == 0 and (bits >= 16 or size == inputs or size % group == 0)
        normed = whole if norm else size == 0
        return normed and (activation in (0, 1, 3) or (activation == 2 and outputs % 128 == 0))

    for name, form, is_right in (("attention", "4sIi2f5i", is_attention), ("linear", "4sI10if", is_linear)):
        head = struct.unpack_from(
            "<4sI", bytes.fromhex(tried[0]["linear"]["bytes"] if name == "linear" else tried[0]["bytes"])
        )
        taken = 0
        for text, is_taken in made_up[name].items():
            blob = bytes.fromhex(text)
            whole = len(blob) == struct.calcsize(f"<{form}") and struct.unpack_from("<4sI", blob) == head
            assert is_taken == (whole and is_right(*struct.unpack(f"<{form}", blob)[2:])), text
            taken += is_taken
        assert 10 < taken < len(made_up[name]) / 2


def test_the_second_creator(tried):
    found, told = tried
    linear = found["linear"]
    ops = vars(quant_linear)
    assert sorted(linear["fields"]) == sorted(value for name, value in ops.items() if name.startswith("ATTR_"))
    assert linear["copy"] == linear["bytes"]
    assert [linear[what] for what in ("foreign", "bits", "incomplete", "epsilon")] == [None] * 4
    assert "attribute bits is 5; expected 32, 16, 8 or 4" in told
    assert "attribute epsilon is nan; expected a finite number of at least 0" in told
    assert "attribute has_zero is missing" in told
    assert "attribute in_features is 2147483647; expected 1 to 16777216" in told


def test_a_library_for_version_8_is_invisible_to_version_10(tmp_path, monkeypatch):
    monkeypatch.setattr(plugin_build.kernels_build, "SOURCES", ())
    library = tmp_path / "libpascalvl_plugin.so"
    plugin_build.build(library, 8, target=Target.EMULATOR)
    found, told = in_registry(library)
    assert not found["found"]
    for op in ("FlashAttention2", "QuantLinear"):
        assert f"{op}: TensorRT did not take the creator" in told


def test_layouts_of_both_majors():
    """What must not move; `--check-layout` compares it with TensorRT's headers."""
    eight, ten = plugin_build.layout(8), plugin_build.layout(10)
    for op in ("FlashAttention2", "QuantLinear"):
        assert eight[op] == ten[op]
        assert len(eight[op]) == 30
        assert eight[f"Creator<{op}>"][0] == "getTensorRTVersion"
        assert ten[f"Creator<{op}>"][:2] == ["getAPILanguage", "getInterfaceInfo"]
    assert (eight["PluginTensorDesc"], ten["PluginTensorDesc"]) == (["48"], ["88"])


def test_the_command_names_headers_that_do_not_fit(tmp_path):
    (tmp_path / "NvInferRuntime.h").write_text("#error not these\n", encoding="utf-8")
    with pytest.raises(UserError, match="not these"):
        plugin_build.layout(8, [tmp_path])
