"""Checkpoints that cannot be exported end in one sentence, and leave nothing behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pascalvl.export import export_checkpoint
from pascalvl.export.checkpoint import Checkpoint
from pascalvl.plugins.errors import UserError


@pytest.fixture
def copy(nano_checkpoint, tmp_path):
    return shutil.copytree(nano_checkpoint, tmp_path / "checkpoint")


def refused(checkpoint, phrase):
    output = checkpoint.parent / "out" / "bundle"
    with pytest.raises(UserError) as error:
        export_checkpoint(checkpoint, output)
    message = str(error.value)
    assert phrase in message
    assert "\n" not in message
    assert not output.parent.exists() or not list(output.parent.iterdir())


def shards(checkpoint):
    return sorted(checkpoint.glob("*.safetensors"))


def test_missing_directory(tmp_path):
    refused(tmp_path / "nowhere", "no checkpoint directory at")


def test_directory_without_a_config(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "lacks config.json")


@pytest.mark.parametrize("model_type", ["llama", "qwen3_vl_moe", None])
def test_another_architecture(copy, model_type):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    refused(copy, f"found {model_type!r}")


@pytest.mark.parametrize("quantization", [{"quant_method": "awq"}, "awq", ["awq"]])
def test_quantised_checkpoint(copy, quantization):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    refused(copy, "'awq'")


@pytest.mark.parametrize(
    ("part", "change", "phrase"),
    [
        ("text", {"hidden_act": "zelu"}, "zelu"),
        ("text", {"rope_scaling": {"rope_type": "magic"}}, "rope type 'magic' is not supported"),
        ("text", {"rope_theta": "hot"}, "is not a valid Qwen3-VL config"),
        ("text", {"rope_theta": 0}, "rope_inv_freq"),
        ("text", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("text", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("text", {"vocab_size": -1}, "vocab_size is -1"),
        ("text", {"intermediate_size": -1}, "negative dimension"),
        ("vision", {"num_heads": 0}, "is not a valid Qwen3-VL config"),
        ("vision", {"deepstack_visual_indexes": []}, "deepstack_visual_indexes is ()"),
    ],
)
def test_configs_that_no_model_has(copy, part, change, phrase):
    config = json.loads((copy / "config.json").read_text())
    config[f"{part}_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, phrase)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_config_that_is_no_json(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, "config.json cannot be read")


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "preprocessor_config.json"])
def test_missing_processor_file(copy, name):
    (copy / name).unlink()
    refused(copy, f"lacks {name}")


def test_missing_chat_template(copy):
    (copy / "chat_template.jinja").unlink()
    refused(copy, "no chat template")


@pytest.mark.parametrize("holder", ["chat_template.json", "tokenizer_config.json"])
def test_chat_template_in_its_older_places(copy, holder, tmp_path):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    (copy / holder).write_text(json.dumps({"chat_template": template}))
    with Checkpoint(copy) as checkpoint:
        checkpoint.copy_host_files(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == template


def test_missing_shard(copy):
    shards(copy)[-1].unlink()
    refused(copy, f"lacks its weight file {shards(copy)[0].name.replace('-00001-', '-00002-')}")


def test_truncated_shard(copy):
    path = shards(copy)[0]
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, "truncated or damaged")


def test_tensor_missing_from_its_shard(copy):
    path = shards(copy)[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    refused(copy, f"lacks the tensor {name}")


def test_tensor_of_another_model(copy):
    path = shards(copy)[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: torch.zeros(3, 5)}, path)
    refused(copy, f"tensor {name}")


def test_rope_that_depends_on_the_length(copy):
    config = json.loads((copy / "config.json").read_text())
    text = config["text_config"]
    key = "rope_parameters" if "rope_parameters" in text else "rope_scaling"
    text[key] = {**text[key], "rope_type": "dynamic", "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, "rope type 'dynamic'")


def test_output_that_is_not_a_bundle_is_not_overwritten(nano_checkpoint, tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(UserError, match="exists and is no model bundle"):
        export_checkpoint(nano_checkpoint, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]
