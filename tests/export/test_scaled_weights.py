"""Checkpoints in 8 bits, as Qwen's FP8 and llm-compressor's: read, exported and answering as what they stand for."""

import functools
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from pascalvl.engines import build
from pascalvl.export import export_checkpoint
from pascalvl.export.checkpoint import Checkpoint, load_model
from pascalvl.export.quantised_weights import check_stored, stored_config, stored_values
from pascalvl.export.scaled_weights import ScaledWeights
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.cli import main
from tests.engines.torch_reference import answer, reference_answer, scene, user
from tests.export import requantised, scaled_checkpoint

WEIGHT = "model.language_model.layers.3.mlp.down_proj.weight"
PICTURE = [user(scene(3, 100, 70), "How many squares are there?")]


@pytest.fixture(scope="module")
def scaled(nano_checkpoint, tmp_path_factory):
    """Checkpoints by kind, and what their weights stand for."""

    @functools.cache
    def of(kind):
        directory = tmp_path_factory.mktemp("scaled") / "checkpoint"
        return directory, scaled_checkpoint.write(nano_checkpoint, directory, kind)

    return of


@pytest.fixture(scope="module")
def references(scaled, nano_checkpoint):
    """Hugging Face's models with the weights that codes stand for."""

    return functools.cache(lambda kind: requantised.reference(nano_checkpoint, scaled(kind)[1]))


@pytest.mark.parametrize("kind", scaled_checkpoint.CONFIGS)
def test_weights_are_what_they_stand_for(kind, scaled, nano_checkpoint, caplog):
    """To the last bit of float32; what is stored in plain types stays as it is."""
    directory, dense = scaled(kind)
    caplog.set_level(logging.INFO)
    with Checkpoint(directory) as checkpoint, Checkpoint(nano_checkpoint) as nano:
        assert len(dense) == 6 * 7
        for name, _ in checkpoint.meta_model().named_parameters():
            found, original = checkpoint.tensor(name), nano.tensor(name)
            if name in dense:
                np.testing.assert_array_equal(found.numpy(), dense[name].astype(np.float32))
                assert np.abs(dense[name] - original.double().numpy()).max() < 0.07 * original.abs().max()
            else:
                assert torch.equal(found, original)
    assert "their inputs are not rounded to 8 bits" in caplog.text


def test_weights_are_what_transformers_makes_of_them(scaled):
    directory, dense = scaled("fp8")
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    with Checkpoint(directory) as checkpoint:
        for name in dense:
            parts = {"weight": tensors[name], "weight_scale_inv": tensors[f"{name}_scale_inv"]}
            expected = Fp8Dequantize(None).convert(parts, full_layer_name=None)["weight"]
            assert expected.dtype == torch.float32
            assert torch.equal(checkpoint.tensor(name), expected)


def test_a_picture_question(scaled, references, tmp_path):
    """As Hugging Face's model with the same weights in float32."""
    export_checkpoint(scaled("fp8")[0], tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", "onnxruntime", CacheConfig.parse("f32"))
    model = VisionLanguageModel.open(tmp_path / "engine", context_length=256)
    expected = reference_answer(references("fp8"), model.prompt(PICTURE), 20)[0]
    assert answer(model, PICTURE, 20).token_ids == expected


def test_any_format_can_be_asked_for(scaled):
    """The weights are as good as floats; nothing is kept as it is stored."""
    with Checkpoint(scaled("int8 by output")[0]) as checkpoint:
        text = checkpoint.model_config().text
        assert stored_config(checkpoint, text) == FLOAT_WEIGHTS
        for weights in (WeightConfig.parse("w8"), WeightConfig.parse("w4,group=32")):
            check_stored(checkpoint, weights, text)
            assert not stored_values(checkpoint, weights, text)


@pytest.mark.parametrize("kind", ["fp8", "fp8 in partial blocks", "int8 by output"])
def test_the_reference_of_a_validation(kind, scaled, references, monkeypatch):
    """Transformers reads FP8 in whole blocks itself: a wrong reading of ours is none of the reference's."""
    with Checkpoint(scaled(kind)[0]) as checkpoint:
        assert checkpoint.is_read_by_transformers == (kind == "fp8")
    if kind == "fp8":
        monkeypatch.setattr(ScaledWeights, "read", lambda *_: pytest.fail("the reference shares our reading"))
    found = load_model(scaled(kind)[0]).state_dict()
    for name, expected in references(kind).state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


def test_validate_says_what_its_reference_is(scaled, tmp_path, capsys):
    for kind, sentence in (("fp8", "which read the weights itself"), ("int8 by output", "weights that PascalVL read")):
        checkpoint, engine = scaled(kind)[0], tmp_path / kind / "engine"
        export_checkpoint(checkpoint, tmp_path / kind / "model")
        build(tmp_path / kind / "model", engine, "onnxruntime", CacheConfig.parse("f32"))
        assert main(["validate", str(engine), "--reference", str(checkpoint), "--prompt", "Hello!"]) == 0
        assert sentence in " ".join(capsys.readouterr().out.split())


# What cannot be used --------------------------------------------------------------------------------------------------


def refused(phrase, checkpoint):
    with pytest.raises(UserError) as error, Checkpoint(checkpoint) as opened:
        opened.meta_model()
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)


def changed_config(original, tmp_path, change):
    checkpoint = shutil.copytree(original, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    change(config["quantization_config"])
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"activation_scheme": "static"}, "expected activation_scheme 'dynamic', found 'static'"),
        ({"fmt": "e5m2"}, "expected fmt 'e4m3', found 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "expected scale_fmt 'float'"),
        ({"weight_block_size": None}, "expected weight_block_size of at least 1, found None"),
        ({"weight_block_size": [128, 0]}, "expected weight_block_size of at least 1, found 0"),
        ({"weight_block_size": [64, 128]}, "expected [16, 2] for a weight of shape [1024, 256]"),
        ({"group_size": 128}, "has the field 'group_size', which is not known here"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "config sets 'kv_cache_scheme', which is not supported"),
        ({"quant_method": "mxfp4"}, "found 'mxfp4'"),
        ({"quant_method": "torchao"}, "found 'torchao'"),
    ],
)
def test_other_fp8(change, phrase, scaled, tmp_path):
    refused(phrase, changed_config(scaled("fp8")[0], tmp_path, lambda config: config.update(change)))


@pytest.mark.parametrize(
    ("part", "change", "phrase"),
    [
        ("weights", {"type": "float"}, "expected type 'int', found 'float'"),
        ("weights", {"num_bits": 4}, "expected bits 8, found 4"),
        ("weights", {"symmetric": False}, "expected symmetric True, found False"),
        ("weights", {"strategy": "tensor_group"}, "expected strategy 'tensor' or 'channel' or 'group' or 'block'"),
        ("weights", {"strategy": "group", "group_size": -1}, "expected group_size of at least 1, found -1"),
        ("weights", {"strategy": "block"}, "expected block_structure of at least 1, found None"),
        ("weights", {"strategy": "tensor"}, "expected [1, 1] for a weight of shape"),
        ("weights", {"rotation": "hadamard"}, "has the field 'rotation', which is not known here"),
        ("input_activations", {"dynamic": False}, "expected input_activations that are dynamic True, found False"),
        ("input_activations", {"rotation": "hadamard"}, "has the field 'rotation'"),
        (None, {"output_activations": {"num_bits": 8}}, "expected output_activations None"),
        (None, {"format": "float-quantized"}, "expected the layout of all groups 'int-quantized'"),
        (None, {"weights": None}, "expected groups of weights of at least 1, found 0"),
        (None, {"rotation": "hadamard"}, "has the field 'rotation'"),
    ],
)
def test_other_compressed_tensors(part, change, phrase, scaled, tmp_path):
    def apply(config):
        group = config["config_groups"]["group_0"]
        (group if part is None else group[part]).update(change)

    refused(phrase, changed_config(scaled("int8 by output")[0], tmp_path, apply))


def with_value(tensor, value):
    changed = tensor.clone()
    changed.view(-1)[-1] = value
    return changed


@pytest.mark.parametrize(
    ("name", "change", "phrase"),
    [
        ("_scale_inv", lambda x: None, f"lacks the tensor {WEIGHT}_scale_inv"),
        ("_scale_inv", lambda x: x.T, "has shape [6, 2], expected [2, 6] for a weight of shape [256, 768]"),
        ("_scale_inv", lambda x: x[:1, :1], "has shape [1, 1], expected [2, 6]"),
        ("_scale_inv", lambda x: with_value(x, torch.nan), "has scales that are not finite"),
        ("_scale_inv", lambda x: with_value(x, torch.inf), "has scales that are not finite"),
        ("_scale_inv", lambda x: x.double(), "has type F64, expected F32, F16, BF16"),
        ("", lambda x: x.float(), f"has no use for, such as {WEIGHT}_scale_inv"),
        ("", lambda x: x.float().to(torch.float8_e5m2), "has type F8_E5M2, expected F32, F16, BF16"),
        ("", lambda x: x.float().to(torch.int8), "has type I8, expected F32, F16, BF16"),
    ],
)
def test_damaged_weights(name, change, phrase, scaled, tmp_path):
    checkpoint = shutil.copytree(scaled("fp8")[0], tmp_path / "checkpoint")
    shard = next(path for path in checkpoint.glob("*.safetensors") if WEIGHT in load_file(path))
    tensors = load_file(shard)
    changed = change(tensors.pop(f"{WEIGHT}{name}"))
    save_file(tensors if changed is None else {**tensors, f"{WEIGHT}{name}": changed.contiguous()}, shard)
    refused(phrase, checkpoint)
