"""Checkpoints in codes of 4 bits, as AWQ, GPTQ and llm-compressor write them: read, exported and answering, exactly."""

import copy
import functools
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from pascalvl.engines import build, open_engine
from pascalvl.export import export_checkpoint
from pascalvl.export.checkpoint import Checkpoint, load_model
from pascalvl.export.quantised_weights import check_stored, gated, stored_config, stored_values
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.weight_format import WeightConfig, WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight
from pascalvl.runtime import VisionLanguageModel
from tests.engines.decoder import decoder_feeds
from tests.engines.torch_reference import answer, reference_answer, scene, user
from tests.export import coded_checkpoint, requantised

LAYER = "model.language_model.layers.3."
KINDS = list(coded_checkpoint.CONFIGS)
PICTURE = [user(scene(3, 100, 70), "How many squares are there?")]


@pytest.fixture(scope="module")
def coded(nano_checkpoint, tmp_path_factory):
    """Checkpoints by kind, and what their codes stand for."""

    @functools.cache
    def of(kind):
        directory = tmp_path_factory.mktemp("coded") / "checkpoint"
        return directory, coded_checkpoint.write(nano_checkpoint, directory, kind)

    return of


@pytest.fixture(scope="module")
def exported(coded, tmp_path_factory):
    """Model bundles by kind."""

    @functools.cache
    def of(kind):
        bundle = tmp_path_factory.mktemp("coded") / "model"
        export_checkpoint(coded(kind)[0], bundle)
        return bundle

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_read_exactly(kind, coded):
    directory, dense = coded(kind)
    with Checkpoint(directory) as checkpoint:
        assert len(dense) == 6 * 7
        for name, expected in dense.items():
            layer = name.removesuffix(".weight")
            weight = checkpoint.codes.read(layer)
            assert weight.form == WeightFormat(4, coded_checkpoint.group_of(kind))
            assert (weight.zero is None) == (kind in coded_checkpoint.SYMMETRIC)
            np.testing.assert_array_equal(weight.dense(np.float64), expected)
            assert checkpoint.shape(name) == list(expected.shape)
            np.testing.assert_array_equal(checkpoint.tensor(name).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("kind", ["awq", "gptq symmetric"])
def test_a_bundle_has_the_same_codes(kind, coded, exported):
    """Of layers that are one in the bundle too."""
    (_, dense), bundle, group = coded(kind), exported(kind), coded_checkpoint.group_of(kind)
    manifest = Manifest.read(bundle, "model")
    assert manifest.weights == WeightConfig.parse(f"w4,group={group}")
    proto = onnx.load(bundle / "decoder.onnx")
    stored = {tensor.doc_string or tensor.name: tensor for tensor in proto.graph.initializer}
    parts = {name.removeprefix(LAYER).removesuffix(".weight"): torch.from_numpy(x) for name, x in dense.items()}
    merged = {
        "self_attn.qkv_proj": torch.cat([parts[f"self_attn.{name}_proj"] for name in "qkv"]),
        "self_attn.o_proj": parts["self_attn.o_proj"],
        "mlp.gate_up_proj": gated(parts["mlp.gate_proj"], parts["mlp.up_proj"], 768),
        "mlp.down_proj": parts["mlp.down_proj"],
    }
    for layer, expected in merged.items():
        names = [name for name in ("weight", "scale", "zero") if f"{LAYER}{layer}.{name}" in stored]
        assert ("zero" in names) == (kind not in coded_checkpoint.SYMMETRIC)
        packed = {name: numpy_helper.to_array(stored[f"{LAYER}{layer}.{name}"]) for name in names}
        found = QuantisedWeight.unpacked(packed, expected.shape[1], WeightFormat(4, group)).dense(np.float64)
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.fixture(scope="module")
def references(coded, nano_checkpoint):
    """Hugging Face's models with the weights that codes stand for."""

    return functools.cache(lambda kind: requantised.reference(nano_checkpoint, coded(kind)[1]))


@pytest.mark.parametrize("backend", ["onnxruntime", "torch", "reference"])
def test_a_picture_question(backend, exported, references, tmp_path):
    """As Hugging Face's model with the same weights in float32."""
    build(exported("awq"), tmp_path / "engine", backend, CacheConfig.parse("k8v8"))
    model = VisionLanguageModel.open(tmp_path / "engine", context_length=256)
    expected = reference_answer(references("awq"), model.prompt(PICTURE), 20)[0]
    assert answer(model, PICTURE, 20).token_ids == expected


def test_backends_agree_about_zeros(exported, tmp_path):
    """Outputs within what ties in rounding inputs to int8 leave (see `test_quantised_bundles`)."""
    outputs = {}
    for backend in ("onnxruntime", "torch"):
        build(exported("awq"), tmp_path / backend, backend, CacheConfig.parse("f32"))
        engine = open_engine(tmp_path / backend)
        outputs[backend] = engine.run(bindings.DECODER, decoder_feeds(engine.manifest, seq=3, capacity=10, past=4))
    for name, value in outputs["onnxruntime"].items():
        rms = np.sqrt(np.square(value).mean())
        assert np.sqrt(np.square(outputs["torch"][name] - value).mean()) < 2e-2 * rms, name


def test_in_float32_the_model_is_the_same(coded, references, tmp_path):
    """To the tolerance of greedy parity, with keys balanced and values rotated."""
    export_checkpoint(coded("gptq v2")[0], tmp_path / "model", weights=WeightConfig.parse("f32"))
    build(tmp_path / "model", tmp_path / "engine", "onnxruntime", CacheConfig.parse("f32"))
    model = VisionLanguageModel.open(tmp_path / "engine", context_length=256)
    expected = reference_answer(references("gptq v2"), model.prompt(PICTURE), 20)[0]
    assert answer(model, PICTURE, 20).token_ids == expected


def test_the_reference_of_a_validation(coded, references):
    found = load_model(coded("packed")[0]).state_dict()
    for name, expected in references("packed").state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=0)


# What cannot be used --------------------------------------------------------------------------------------------------


def refused(phrase, checkpoint, output, **options):
    with pytest.raises(UserError) as error:
        export_checkpoint(checkpoint, output / "model", **options)
    assert phrase in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(output.glob("*model*"))


@pytest.mark.parametrize(
    ("kind", "change", "phrase"),
    [
        ("awq", {"quant_method": "bitsandbytes"}, "expected quant_method 'awq' or 'gptq'"),
        ("awq", {"version": "gemv"}, "expected the layout 'gemm', found 'gemv'"),
        ("awq", {"bits": 8}, "expected bits 4, found 8"),
        ("gptq", {"group_size": -1}, "expected group_size 32 or 64 or 128, found -1"),
        ("gptq", {"checkpoint_format": "marlin"}, "expected the layout 'gptq' or 'gptq_v2', found 'marlin'"),
        ("packed", {"format": "nvfp4-pack-quantized"}, "found 'nvfp4-pack-quantized'"),
        ("packed", {"config_groups": {}}, "groups of one size"),
        ("packed", {"config_groups": {"group_0": {"weights": "int4"}}}, "groups of one size"),
        ("packed", {"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}, "input_activations None"),
    ],
)
def test_other_quantisations(kind, change, phrase, nano_checkpoint, tmp_path):
    refused(phrase, configured(nano_checkpoint, tmp_path, kind, change), tmp_path)


def configured(nano_checkpoint, tmp_path, kind, change):
    """A folder whose config says that its weights are quantised; that is read before they are."""
    checkpoint = shutil.copytree(nano_checkpoint, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {**coded_checkpoint.CONFIGS[kind], **change}
    (checkpoint / "config.json").write_text(json.dumps(config))
    return checkpoint


@pytest.mark.parametrize("kind", ["awq", "gptq", "packed"])
@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"dynamic": {"+:.*down_proj": {"bits": 8}}}, "config sets 'dynamic', which is not supported"),
        ({"dynamic": {"-:.*down_proj": {}, "+:.*up_proj": {"bits": 8}}}, "config sets 'dynamic'"),
        ({"dynamic": ["-:.*down_proj"]}, "config sets 'dynamic'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "config sets 'kv_cache_scheme'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "config sets 'sparsity_config'"),
        ({"transform_config": {"config_groups": {"R4": {"type": "hadamard"}}}}, "config sets 'transform_config'"),
        ({"rotation": "hadamard"}, "config has the field 'rotation', which is not known here"),
    ],
)
def test_fields_that_ask_for_more(kind, change, phrase, nano_checkpoint, tmp_path):
    refused(phrase, configured(nano_checkpoint, tmp_path, kind, change), tmp_path)


@pytest.mark.parametrize(
    ("of_weights", "change", "phrase"),
    [
        (True, {"type": "float"}, "expected type 'int', found 'float'"),
        (True, {"rotation": "hadamard"}, "config has the field 'rotation', which is not known here"),
        (False, {"rotation": "hadamard"}, "config has the field 'rotation', which is not known here"),
        (False, {"input_activations": {"num_bits": 8, "dynamic": True}}, "expected input_activations None"),
        (False, {"output_activations": {"num_bits": 8}}, "expected output_activations None"),
    ],
)
def test_groups_that_ask_for_more(of_weights, change, phrase, nano_checkpoint, tmp_path):
    group = copy.deepcopy(coded_checkpoint.CONFIGS["packed"]["config_groups"]["group_0"])
    (group["weights"] if of_weights else group).update(change)
    change = {"config_groups": {"group_0": group}}
    refused(phrase, configured(nano_checkpoint, tmp_path, "packed", change), tmp_path)


def test_layers_that_gptqmodel_left_out(coded, tmp_path):
    """Its ``dynamic`` names them, and their weights are there as they were."""
    checkpoint = shutil.copytree(coded("gptq")[0], tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:.*visual.*": {}, "-:lm_head": {}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with Checkpoint(checkpoint) as opened:
        opened.meta_model()
        assert opened.codes.form == WeightFormat(4, 128)


@pytest.mark.parametrize(
    ("part", "change", "phrase"),
    [
        ("g_idx", lambda x: x.flip(0), "have an order of their own (desc_act or actorder)"),
        ("scales", lambda x: x[:1], "has shape [1, 256], expected [6, 256] for 4 bits in groups of 128 inputs"),
        ("qzeros", lambda x: x[:1], "has shape [1, 32], expected [6, 32] for 4 bits in groups of 128 inputs"),
        ("scales", lambda x: None, "lacks the tensor"),
        ("qweight", lambda x: None, "lacks the tensor"),
        ("qweight", lambda x: x[:-32], "has shape [256, 512], the config says [256, 768]"),
    ],
)
def test_damaged_layers(part, change, phrase, nano_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    coded_checkpoint.write(nano_checkpoint, checkpoint, "gptq")
    name = f"{LAYER}mlp.down_proj.{part}"
    shard = next(path for path in checkpoint.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    save_file(tensors if changed is None else {**tensors, name: changed.contiguous()}, shard)
    refused(phrase, checkpoint, tmp_path)


def test_a_layer_of_which_a_part_is_in_codes(coded, nano_checkpoint, tmp_path):
    """Is refused as it is; in another format, all of it is converted."""
    checkpoint = tmp_path / "checkpoint"
    dense = coded_checkpoint.write(nano_checkpoint, checkpoint, "awq")
    layer = f"{LAYER}self_attn.o_proj"
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        if f"{layer}.qweight" in tensors:
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(layer)}
            save_file({**tensors, f"{layer}.weight": torch.from_numpy(dense[f"{layer}.weight"]).half()}, shard)
    refused(f"and {layer} is not: expected all or none", checkpoint, tmp_path)
    with Checkpoint(checkpoint) as opened:
        weights, text = WeightConfig.parse("w8"), opened.model_config().text
        check_stored(opened, weights, text)
        assert not stored_values(opened, weights, text)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (
            {"weights": WeightConfig.parse("w4,group=64")},
            "in groups of 128 inputs: groups of 64 would round them again",
        ),
        ({"cache": CacheConfig.parse("k8v8,rv=96")}, "leave rv out, or give --weights w8"),
    ],
)
def test_what_would_change_the_codes(options, phrase, coded, tmp_path):
    refused(phrase, coded("awq")[0], tmp_path, **options)


def test_decoder_layers_in_float_stay_so(coded, nano_checkpoint, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    coded_checkpoint.write(nano_checkpoint, checkpoint, "awq")
    for shard in checkpoint.glob("*.safetensors"):
        kept = {name: x for name, x in load_file(shard).items() if not name.startswith(LAYER)}
        floats = {name: x for name, x in load_file(nano_checkpoint / shard.name).items() if name.startswith(LAYER)}
        save_file({**kept, **floats}, shard)
    with Checkpoint(checkpoint) as opened:
        text = opened.model_config().text
        weights = stored_config(opened, text)
        assert weights == WeightConfig.parse("w4,layer.3=f16")
        assert stored_values(opened, weights, text) == {0, 1, 2, 4, 5}
