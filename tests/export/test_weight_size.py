"""What weights take of a card, against what exports wrote; and the format that a card has room for."""

import re

import onnx
import pytest

from pascalvl.engines.device import gpu
from pascalvl.engines.device.memory import available_target
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.export.weight_size import fitting_weights, room_of_card, weight_bytes
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig
from pascalvl.runtime.cli import main
from tests.conftest import ALL_WEIGHT_FORMATS
from tests.export import coded_checkpoint

CACHE, CONTEXT = CacheConfig.parse("k8v4"), 4096


@pytest.mark.parametrize(
    ("bundle", "weights"), [("nano_model_bundle", "f32"), ("nano_quantised_bundle", ALL_WEIGHT_FORMATS)]
)
def test_bytes_are_those_that_an_export_writes(bundle, weights, nano_checkpoint, request):
    folder, written = request.getfixturevalue(bundle), 0
    for graph in ("vision", "decoder"):
        for tensor in onnx.load(folder / f"{graph}.onnx", load_external_data=False).graph.initializer:
            written += sum(int(entry.value) for entry in tensor.external_data if entry.key == "length")
    with Checkpoint(nano_checkpoint) as checkpoint:
        assert weight_bytes(checkpoint, WeightConfig.parse(weights)) == written


def test_the_most_exact_format_that_fits(nano_checkpoint):
    with Checkpoint(nano_checkpoint) as checkpoint:
        besides = 800_000_000 + CACHE.nbytes(checkpoint.model_config().text, CONTEXT)
        sizes = {name: weight_bytes(checkpoint, WeightConfig.parse(name)) for name in ("f32", "f16", "w8", "w4")}
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    for name, size in sizes.items():
        found = fitting_weights(nano_checkpoint, room_of_card("Tesla P4", besides + size), CACHE, CONTEXT)
        assert found.weights == WeightConfig.parse(name)
        assert re.match(rf"{name}, the most exact format for Tesla P4 \(0.\d GB\): 0.0 GB of weights", found.reason)
    with pytest.raises(UserError, match=r"Tesla P4 has 0.8 GB of memory, and even in 4 bits this model takes 0.0 GB"):
        fitting_weights(nano_checkpoint, room_of_card("Tesla P4", besides + sizes["w4"] - 1), CACHE, CONTEXT)


def test_codes_of_a_checkpoint_stay(nano_checkpoint, tmp_path):
    coded_checkpoint.write(nano_checkpoint, tmp_path / "coded", "awq")
    found = fitting_weights(tmp_path / "coded", room_of_card("Tesla P4", 8_000_000_000), CACHE, CONTEXT)
    assert found.weights is None
    assert found.reason == "the checkpoint's own codes of 4 bits"


def test_the_command_tells_what_it_takes(nano_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "find_gpu", lambda: gpu.Gpu("Tesla P4", (6, 1), 840_000_000, 0, (12, 9)))
    arguments = ["export", str(nano_checkpoint), "--output", str(tmp_path / "model"), "--weights", "auto"]
    assert main(arguments) == 0
    assert "weights: f16, the most exact format for Tesla P4 (0.8 GB)" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "model", "model").weights == WeightConfig.parse("f16")


@pytest.mark.skipif(available_target() is Target.CUDA, reason="there is a GPU")
def test_without_a_card_there_is_nothing_to_fit(nano_checkpoint, tmp_path, capsys):
    arguments = ["export", str(nano_checkpoint), "--output", str(tmp_path / "model"), "--weights", "auto"]
    assert main(arguments) == 2
    assert "no NVIDIA" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
