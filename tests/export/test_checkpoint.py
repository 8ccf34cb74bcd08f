"""Checkpoints that cannot be exported end in one sentence, and leave nothing behind."""

import json
import re
import resource
import shutil
import time
from copy import deepcopy as copy_of

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from pascalvl.engines import build, open_engine
from pascalvl.export import export_checkpoint
from pascalvl.export.checkpoint import Checkpoint, load_model
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime.tokenizer import Tokenizer
from tests.conftest import NANO
from tests.engines.decoder import decoder_feeds
from tests.manifests import FILE_NAMES, OUT_OF_RANGE, SPECIAL, integers, make_special, put


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
        ("text", {"hidden_act": "gelu"}, "hidden_act 'gelu' of the text_config is not supported: expected silu."),
        (
            "vision",
            {"hidden_act": "silu"},
            "of the vision_config is not supported: expected gelu_pytorch_tanh or gelu.",
        ),
        ("text", {"rope_scaling": {"rope_type": "magic"}}, "rope type 'magic' is not supported"),
        ("text", {"rope_theta": "hot"}, "is not a valid Qwen3-VL config"),
        ("text", {"rope_theta": 0}, "rope_inv_freq"),
        ("text", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("text", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("text", {"vocab_size": -1}, "vocab_size is -1"),
        ("text", {"intermediate_size": -1}, "intermediate_size is -1, expected a whole number from 1 to 1048576"),
        ("vision", {"num_heads": 0}, "is not a valid Qwen3-VL config"),
        ("vision", {"deepstack_visual_indexes": []}, "deepstack_visual_indexes is ()"),
    ],
)
def test_configs_that_no_model_has(copy, part, change, phrase):
    config = json.loads((copy / "config.json").read_text())
    config[f"{part}_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, phrase)


NANO_CONFIG = json.loads((NANO / "checkpoint" / "config.json").read_text())


@pytest.mark.parametrize("field", [*integers(NANO_CONFIG), ("num_labels",)], ids=".".join)
def test_numbers_out_of_range(nano_checkpoint, tmp_path, field):
    """In every field that counts, in a sentence and at once, without memory."""
    for path in nano_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").unlink()
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = []
    for value in OUT_OF_RANGE:
        config = copy_of(NANO_CONFIG)
        put(config, field, value)
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            with Checkpoint(tmp_path):
                accepted.append(value)
        except UserError as error:
            found = str(error)
            assert re.search(r"config.json is not a valid Qwen3-VL config \(\w+: .+\): download", found)
    if field[-1] not in ("bos_token_id", "eos_token_id", "rope_theta"):
        # Without a number of KV heads, transformers takes that of heads.
        assert accepted == {"num_key_value_heads": [None]}.get(field[-1], [0] * field[-1].endswith("_token_id"))
    assert time.monotonic() - start < len(OUT_OF_RANGE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [None, [], 3, "x"])
def test_configs_whose_parts_are_none(copy, part, value):
    (copy / "config.json").write_text(json.dumps(NANO_CONFIG | {part: value}))
    refused(copy, "text_config or vision_config is")


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_config_that_is_no_json(copy, text):
    (copy / "config.json").write_text(text)
    refused(copy, "config.json cannot be read")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
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


# Tensors that no model uses -------------------------------------------------------------------------------------------


def add_tensor(checkpoint, name, tensor):
    """Put one more into a checkpoint's last shard, and its index."""
    path = shards(checkpoint)[-1]
    save_file({**load_file(path), name: tensor}, path)
    index = checkpoint / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][name] = path.name
    index.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "name", ["model.language_model.layers.0.mlp.down_proj.weight_scale", "model.language_model.layers.6.mlp.x"]
)
def test_a_tensor_that_no_model_uses(copy, name):
    add_tensor(copy, name, torch.ones(1))
    refused(copy, f"holds 1 tensors that Qwen3-VL has no use for, such as {name}")


def test_tensors_that_a_model_computes_itself_are_harmless(copy):
    add_tensor(copy, "model.language_model.rotary_emb.inv_freq", torch.ones(64))
    with Checkpoint(copy) as checkpoint:
        checkpoint.meta_model()


def test_an_adapter_beside_the_model_is_left_out_with_a_warning(copy, caplog):
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    add_tensor(copy, name, torch.ones(8, 256))
    with Checkpoint(copy) as checkpoint:
        checkpoint.meta_model()
    assert f"holds the weights of an adapter, such as {name}, which are left out" in caplog.text


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.float64])
def test_weights_of_other_types(copy, kind):
    path = shards(copy)[0]
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("proj.weight"))
    save_file({**tensors, name: tensors[name].to(kind)}, path)
    refused(copy, f"tensor {name}")


def test_quantisation_that_only_modelopts_file_tells(copy):
    (copy / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    refused(copy, "quantised with ModelOpt's 'FP8', by its hf_quant_config.json")
    (copy / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    with Checkpoint(copy):
        pass


@pytest.mark.parametrize("stored", ["another", "the same", "none"])
def test_an_lm_head_beside_a_config_that_ties_it(copy, stored, tmp_path):
    """Transformers takes a stored one that is not the embeddings, whatever the config says."""
    with Checkpoint(copy) as checkpoint:
        embeddings = checkpoint.tensor("model.language_model.embed_tokens.weight")
    torch.manual_seed(0)
    head = torch.randn_like(embeddings) / 16 if stored == "another" else embeddings.clone()
    if stored != "none":
        add_tensor(copy, "lm_head.weight", head)
    expected = Qwen3VLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    assert torch.equal(expected.lm_head.weight, head.float())
    (tmp_path / "files").mkdir()
    with Checkpoint(copy) as checkpoint:
        assert checkpoint.meta_model().config.tie_word_embeddings == (stored != "another")
        checkpoint.copy_host_files(tmp_path / "files")
    config = json.loads((tmp_path / "files" / "config.json").read_text())
    assert config["tie_word_embeddings"] == config["text_config"]["tie_word_embeddings"] == (stored != "another")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_another_lm_head_gives_its_own_logits(copy, backend, tmp_path):
    torch.manual_seed(0)
    add_tensor(copy, "lm_head.weight", torch.randn(2048, 256) / 16)
    export_checkpoint(copy, tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", backend, CacheConfig.parse("f32"))
    engine = open_engine(tmp_path / "engine")
    hf = Qwen3VLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    token_ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = hf(input_ids=token_ids).logits[0, -1].numpy()
    feeds = decoder_feeds(engine.manifest, seq=3, capacity=2, past=0)
    embeds = hf.model.language_model.embed_tokens(token_ids).detach()
    cos, sin = hf.model.language_model.rotary_emb(embeds, torch.arange(3).expand(3, 1, 3))
    feeds |= {"inputs_embeds": embeds[0].numpy(), "rope_cos": cos[0].numpy(), "rope_sin": sin[0].numpy()}
    feeds["deepstack_embeds"][:] = 0
    found = engine.run("decoder", feeds)["logits"][0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


# Files that are none, or elsewhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "tokenizer.json", "model-00002-of-00002.safetensors"]
)
def test_what_is_no_regular_file(copy, name, kind):
    make_special(copy / name, kind)
    refused(copy, "(it is no regular file): download")


@pytest.mark.parametrize("name", [*FILE_NAMES, None, 3, ["x"]])
def test_weight_files_outside_the_folder(copy, name):
    index = copy / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.language_model.norm.weight"] = name
    index.write_text(json.dumps(data))
    refused(copy, "expected weight files in the same folder; download the model again.")


def test_an_index_without_names(copy):
    for weights in (None, 3, ["x"], "model.safetensors"):
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
        refused(copy, "expected weight files in the same folder; download the model again.")


# Which file counts ----------------------------------------------------------------------------------------------------


def as_one_file(checkpoint):
    tensors = {name: tensor for path in shards(checkpoint) for name, tensor in load_file(path).items()}
    save_file(tensors, checkpoint / "model.safetensors")
    return tensors


def test_one_file_beside_old_shards_is_what_counts(copy, caplog):
    """As for transformers; the shards here have other weights."""
    tensors = as_one_file(copy)
    name = "model.language_model.norm.weight"
    path = next(path for path in shards(copy) if path.name != "model.safetensors" and name in load_file(path))
    save_file({**load_file(path), name: torch.zeros_like(tensors[name])}, path)
    with Checkpoint(copy) as checkpoint:
        assert torch.equal(checkpoint.tensor(name), tensors[name])
        digest = checkpoint.digest()
    assert "model.safetensors is read, and model.safetensors.index.json with its files is not" in caplog.text
    hf = Qwen3VLForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    assert torch.equal(hf.model.language_model.norm.weight, tensors[name].float())
    path.unlink()  # an index whose shards are gone
    with Checkpoint(copy) as checkpoint:
        assert checkpoint.digest() == digest


@pytest.mark.parametrize(
    ("name", "is_advised"),
    [
        ("pytorch_model.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("model.pt", True),
        ("training_args.bin", False),
        ("optimizer.pt", False),
    ],
)
def test_weights_in_pytorchs_own_format(copy, name, is_advised):
    """Beside what a trainer leaves; what is advised then works, where transformers reads the file."""
    as_one_file(copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    for path in [*shards(copy), copy / "model.safetensors.index.json"]:
        path.unlink()
    torch.save(tensors, copy / name)
    if not is_advised:
        refused(copy, "lacks its weight file model.safetensors")
        return
    refused(copy, f"holds its weights as {name}, in PyTorch's own format, expected model.safetensors: load them with")
    if name == "pytorch_model.bin":
        Qwen3VLForConditionalGeneration.from_pretrained(copy).save_pretrained(copy)
        with Checkpoint(copy) as checkpoint:
            checkpoint.meta_model()
            assert all(torch.equal(checkpoint.tensor(key), tensor) for key, tensor in tensors.items())


# Names of tensors -----------------------------------------------------------------------------------------------------


def renamed(checkpoint, rename, **more):
    """Write the weights as one file, under other names."""
    tensors = as_one_file(checkpoint)
    stored = {rename(name): tensor for name, tensor in tensors.items()}
    save_file({**stored, **more}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return tensors


def as_vllm(name):
    name = name.replace("model.visual.", "visual.").replace("model.language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


RENAMES = {
    "the inner model's": lambda name: name.removeprefix("model."),
    "of a model in a model": lambda name: f"model.{name}",
    "DataParallel": lambda name: f"module.{name}",
    "PEFT": lambda name: f"base_model.model.{name}",
    "PEFT in DDP": lambda name: f"module.base_model.model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: name.replace("layers.3.", "layers.3._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "of Qwen2-VL": lambda name: name.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
    "vLLM": as_vllm,
}


@pytest.mark.parametrize("kind", RENAMES)
def test_names_that_tools_write(copy, kind):
    """Of which transformers reads the first two itself, and then is the reference of a validation."""
    head = {RENAMES[kind]("lm_head.weight"): torch.randn(2048, 256)}
    tensors = renamed(copy, RENAMES[kind], **head)
    with Checkpoint(copy) as checkpoint:
        checkpoint.meta_model()
        assert all(torch.equal(checkpoint.tensor(name), tensor) for name, tensor in tensors.items())
        assert torch.equal(checkpoint.tensor("lm_head.weight"), *head.values())
        is_read = checkpoint.is_read_by_transformers
    _, loading = Qwen3VLForConditionalGeneration.from_pretrained(copy, output_loading_info=True)
    assert is_read == (not loading["missing_keys"]) == (kind in list(RENAMES)[:2])
    state = load_model(copy).state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
    assert torch.equal(state["lm_head.weight"], *head.values())


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("visual.pos_embed.weight", "which are the same tensor of Qwen3-VL"),
        ("module.model.language_model.norm.weight", "which are the same tensor of Qwen3-VL"),
        ("model.language_model.layers.0.mlp.up_proj.base_layer.weight", "merge it (merge_and_unload of PEFT)"),
        ("visual.layers.0.mlp.up_proj.weight", "has no use for, such as visual.layers.0"),
        ("transformer.model.language_model.norm.weight", "has no use for, such as transformer.model"),
    ],
)
def test_names_that_are_not_clear(copy, name, phrase):
    renamed(copy, str, **{name: torch.zeros(2)})
    refused(copy, phrase)


# Added tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_that_only_the_tokenizers_config_adds(copy, tmp_path):
    """Ids are those of transformers, which reads both files."""
    config = json.loads((copy / "tokenizer_config.json").read_text())
    size = Tokenizer(copy / "tokenizer.json")._tokenizer.get_vocab_size()
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config["added_tokens_decoder"] = {
        **config.get("added_tokens_decoder", {}),
        str(size): {"content": "<think>", "special": False, **plain},
        str(size + 1): {"content": "</think>", "special": False, **plain},
        str(size + 2): {"content": "<|extra|>", "special": True, **plain},
    }
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "files").mkdir()
    with Checkpoint(copy) as checkpoint:
        checkpoint.copy_host_files(tmp_path / "files")
    found = Tokenizer(tmp_path / "files" / "tokenizer.json")
    expected = AutoTokenizer.from_pretrained(copy)
    for text in ("<think>Hello</think> <|extra|>!", "<|im_start|>user\nHi<|im_end|>", "< think > </think", "plain"):
        assert found.encode(text).tolist() == expected.encode(text, add_special_tokens=False)
        ids = found.encode(text)
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    assert len(found.encode("<think>")) == 1


@pytest.mark.parametrize("added", [{"x": {}}, {"5": {"special": True}}, {"5": 7}, [3]])
def test_added_tokens_that_are_none(copy, added):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": added}))
    refused(copy, "tokenizer_config.json adds cannot be read")
