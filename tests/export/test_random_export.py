"""Bundles of random weights: of a small shape, in the place of a published size, exported, carried, built and run."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from pascalvl.engines import build, open_engine
from pascalvl.export import published_sizes, random_weights
from pascalvl.export.random_export import export_random
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import CHECKPOINT_CONFIG, EMBEDDINGS, GENERATION_CONFIG, POSITIONS, Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.ops.quant_linear.op import OP_NAME
from pascalvl.plugins.weight_format import WeightConfig
from pascalvl.plugins.weight_rows import QuantisedWeight
from pascalvl.runtime import VisionLanguageModel
from pascalvl.runtime.generation import GenerationConfig
from pascalvl.runtime.sampling import SamplingParams
from pascalvl.runtime.validation import trace
from tests.engines.decoder import decoder_feeds
from tests.manifests import edit_manifest

LAYERS = 4
TEXT = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 6,
        "num_attention_heads": 16}  # fmt: skip
VISION = {"hidden_size": 256, "intermediate_size": 200, "depth": 3, "deepstack_visual_indexes": [0, 1, 2],
          "num_position_embeddings": 16}  # fmt: skip
WEIGHTS = WeightConfig.parse("w4,layer.1=w8,layer.2=f16,layer.3=f32")
ONNX_DATA = [f"{graph}.onnx.data" for graph in (bindings.VISION, bindings.DECODER)]


@pytest.fixture(scope="module", autouse=True)
def small():
    """One more size, which tests have the time for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(published_sizes.SIZES, "small", (TEXT, VISION, True))
        yield


@pytest.fixture(scope="module")
def bundle(nano_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "model"
    cache = CacheConfig.parse("k8v4,rv=96")
    export_random("small", nano_checkpoint, path, cache=cache, weights=WEIGHTS, layers=LAYERS)
    return path


def initializers(bundle, graph):
    """A graph's nodes, and its weights by the names of checkpoint tensors, read from their places in the file."""
    proto = onnx.load(bundle / f"{graph}.onnx")
    return proto.graph.node, {tensor.name: tensor for tensor in proto.graph.initializer}


def test_manifest(bundle):
    manifest = Manifest.read(bundle, "model")
    manifest.verify(bundle)
    assert manifest.source["name"] == "Qwen3-VL-small, random weights"
    assert manifest.weights == WEIGHTS
    assert json.loads((bundle / CHECKPOINT_CONFIG).read_text())["text_config"]["num_hidden_layers"] == LAYERS
    assert manifest.model.text.value_dims == (96,) * LAYERS
    assert manifest.embeddings == {"dtype": "bfloat16", "shape": [2048, 256]}
    assert manifest.position_embeddings == {"dtype": "bfloat16", "shape": [16, 256]}
    assert manifest.graphs[bindings.DECODER]["ops"][OP_NAME] == 4 * LAYERS + 1


def test_tokens_are_chosen_as_published(bundle):
    config = GenerationConfig.from_file(bundle / GENERATION_CONFIG)
    assert config.sampling == SamplingParams(temperature=0.7, top_k=20, top_p=0.8)
    assert config.eos_token_ids == {2000, 2002}  # the checkpoint's


@pytest.mark.parametrize("graph", [bindings.VISION, bindings.DECODER])
def test_weights_are_spread_as_they_are_initialised(bundle, graph):
    nodes, tensors = initializers(bundle, graph)
    seen, counts = set(), dict.fromkeys(("w4", "w8", "f16", "f32"), 0)
    for node in nodes:
        if node.op_type != OP_NAME:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        form = WEIGHTS.form.parse({4: "w4", 8: "w8", 16: "f16", 32: "f32"}[attributes["bits"]])
        words = numpy_helper.to_array(tensors[node.input[1]])
        in_features = attributes["in_features"]
        if form.is_quantised:
            packed = {"weight": words, "scale": numpy_helper.to_array(tensors[node.input[2]])}
            weight = QuantisedWeight.unpacked(packed, in_features, form)
            assert not weight.codes[:, in_features:].any()
            dense = weight.dense()
        else:
            dense = (words.view(np.float16) if form.bits == 16 else words)[:, :in_features].astype(np.float32)
        assert dense.std() == pytest.approx(0.02, rel=0.06)  # scales vary
        assert abs(dense.mean()) < 5 * dense.std() / dense.size**0.5
        counts[form.name] += 1
        seen.update(node.input[1 : 2 + form.is_quantised])
    expected = {bindings.VISION: (0, 4 * 3 + 2 * 4, 1, 0), bindings.DECODER: (4, 4 + 1, 4, 4)}[graph]
    assert tuple(counts.values()) == expected
    for tensor in tensors.values():
        if tensor.name in seen or not tensor.doc_string:  # a constant of the graph
            continue
        array = numpy_helper.to_array(tensor)
        if array.ndim > 1:
            assert array.std() == pytest.approx(0.02, rel=0.06)
        else:
            assert (array == ("bias" not in tensor.doc_string)).all()


def test_activations_are_ordinary_numbers(bundle, tmp_path):
    build(bundle, tmp_path / "engine", "onnxruntime")
    model = VisionLanguageModel.open(tmp_path / "engine", marked_layers=True)
    noise = np.random.default_rng(0).integers(256, size=(96, 64, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(noise)}, {"type": "text", "text": "What is it?"}]
    traced = trace(model, [{"role": "user", "content": content}], [7])
    assert len(traced) >= LAYERS + 3
    for name, array in traced.items():
        assert np.isfinite(array).all(), name
        assert 0.01 < np.sqrt(np.square(array).mean()) < 100, name


def test_backends_agree(bundle, tmp_path):
    """Both read the codes and scales as they are."""
    outputs = {}
    for backend in ("onnxruntime", "torch"):
        build(bundle, tmp_path / backend, backend, CacheConfig.parse("k8v4"))
        engine = open_engine(tmp_path / backend)
        outputs[backend] = engine.run(bindings.DECODER, decoder_feeds(engine.manifest, seq=3, capacity=10, past=4))
    logits, expected = (outputs[backend][bindings.LOGITS] for backend in ("torch", "onnxruntime"))
    assert np.abs(logits - expected).max() < 2e-2 * np.sqrt(np.square(expected).mean())


def test_a_bundle_carried_without_its_weights_gets_them_again(bundle, tmp_path):
    shutil.copytree(bundle, tmp_path / "carried", ignore=shutil.ignore_patterns("*.data", EMBEDDINGS, POSITIONS))
    assert random_weights.main([str(tmp_path / "carried")]) == 0
    for name in (*ONNX_DATA, EMBEDDINGS, POSITIONS):
        assert (tmp_path / "carried" / name).read_bytes() == (bundle / name).read_bytes()


def test_other_bundles_get_none(bundle, tmp_path, capsys):
    shutil.copytree(bundle, tmp_path / "trained", ignore=shutil.ignore_patterns("*.data"))
    edit_manifest(tmp_path / "trained", lambda data: data["source"].update(name="Qwen3-VL-4B-Instruct"))
    assert random_weights.main([str(tmp_path / "trained")]) == 2
    assert "trained is of Qwen3-VL-4B-Instruct: expected one of 'pascalvl export --random'" in capsys.readouterr().err
    assert not list((tmp_path / "trained").glob("*.data"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": "3B"}, "unknown size '3B': expected one of 2B, 4B, 8B, 32B"),
        ({"layers": 0}, "0 layers are out of range: expected 1 to 6"),
        ({"layers": 7}, "7 layers are out of range: expected 1 to 6"),
        ({"cache": CacheConfig.parse("k8v4,rv=auto:0.01")}, "random weights tell no rank for an error of 0.01"),
    ],
)
def test_what_cannot_be_had(options, match, nano_checkpoint, tmp_path):
    with pytest.raises(UserError, match=match):
        export_random(**{"size": "small", **options}, host_files=nano_checkpoint, output=tmp_path / "model")
    assert not list(tmp_path.iterdir())
