"""Engine bundles: built, loaded, cross-checked and refused."""

import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto

from pascalvl.engines import build, open_engine
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from tests.manifests import edit_manifest


def test_build_sets_the_cache_format(nano_engine):
    for kv, *rows in (
        ("f32", (TensorProto.FLOAT, 128), (TensorProto.FLOAT, 128)),
        ("f16", (TensorProto.INT32, 64), (TensorProto.INT32, 64)),
        ("k8v4", (TensorProto.INT32, 32), (TensorProto.INT32, 16)),
    ):
        directory = nano_engine(kv)
        assert open_engine(directory).manifest.kv_cache == CacheConfig.parse(kv)
        graph = onnx.load(directory / "decoder.onnx", load_external_data=False).graph
        types = {value.name: value.type.tensor_type for value in graph.input}
        found = [types[name] for name in (bindings.past_key(0), bindings.past_value(1))]
        assert [(value.elem_type, value.shape.dim[3].dim_value) for value in found] == rows


def test_unknown_backend(nano_model_bundle, nano_engine_bundle, tmp_path):
    with pytest.raises(UserError, match="unknown backend 'metal': expected one of auto, tensorrt, cuda, onnxruntime"):
        build(nano_model_bundle, tmp_path / "engine", "metal")
    with pytest.raises(UserError, match="unknown backend 'metal'"):
        open_engine(nano_engine_bundle, "metal")
    assert not list(tmp_path.iterdir())


def test_model_bundle_is_not_an_engine_bundle(nano_model_bundle, nano_engine_bundle, tmp_path):
    with pytest.raises(UserError, match="is a bundle of kind 'model': expected"):
        open_engine(nano_model_bundle)
    with pytest.raises(UserError, match="is a bundle of kind 'engine': expected"):
        build(nano_engine_bundle, tmp_path / "engine")


def _copy_with_manifest(directory, target, **changes):
    """A copy whose manifest says something else but still fits its files."""
    shutil.copytree(directory, target)
    edit_manifest(target, lambda data: data.update(changes))
    return target


def test_engine_for_another_model_is_found_before_it_runs(nano_engine_bundle, tmp_path):
    model = Manifest.read(nano_engine_bundle, "engine").model.to_json()
    model["text"]["num_key_value_heads"] *= 2
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "heads", model=model)
    with pytest.raises(UserError, match=r"decoder engine .* is for another model: expected input past_key\.0"):
        open_engine(other)
    model["text"]["num_key_value_heads"] //= 2
    model["text"]["num_hidden_layers"] -= 1
    model["text"]["value_dims"] = model["text"]["value_dims"][1:]
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "layers", model=model)
    with pytest.raises(UserError, match="it has the further inputs"):
        open_engine(other)


def test_engine_bundle_that_does_not_list_a_graph(nano_engine_bundle, tmp_path):
    files = Manifest.read(nano_engine_bundle, "engine").files
    del files["vision.onnx"]
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "files", files=files)
    with pytest.raises(UserError, match=r"does not list the file vision\.onnx"):
        open_engine(other)


def test_engine_for_another_cache_format_is_found_before_it_runs(nano_engine_bundle, tmp_path):
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "format", kv_cache="f16")
    with pytest.raises(UserError, match=r"expected input past_key\.0 int32"):
        open_engine(other)


def test_engine_bundle_of_an_absent_backend(nano_engine_bundle, tmp_path):
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "backend", backend={"name": "tensorrt9000"})
    with pytest.raises(UserError, match="unknown backend 'tensorrt9000'"):
        open_engine(other)


def test_damaged_graph_whose_hash_was_renewed(nano_engine_bundle, tmp_path):
    other = tmp_path / "damaged"
    shutil.copytree(nano_engine_bundle, other)
    (other / "vision.onnx").write_bytes(b"not a graph")
    Manifest.read(other, "engine").write(other)
    with pytest.raises(UserError, match="cannot load the engine"):
        open_engine(other)


def _replace(directory, kind, graph, old, new):
    """Alter a graph, so that messages about it are no UTF-8, and renew its hash."""
    path = directory / f"{graph}.onnx"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    Manifest.read(directory, kind).write(directory)


@pytest.mark.parametrize(
    ("graph", "old", "new"), [("vision", b"Reshape", b"Resh\xffpe"), ("decoder", b"Gather", b"G\xffther")]
)
@pytest.mark.parametrize(
    ("backend", "options"), [("onnxruntime", {}), ("onnxruntime", {"marked_layers": True}), ("reference", {})]
)
def test_graphs_whose_operators_names_are_no_text(nano_engine, tmp_path, capfd, graph, old, new, backend, options):
    """Of nodes outside the ops' bodies, which the reference leaves out."""
    other = shutil.copytree(nano_engine("f32", backend), tmp_path / "garbled")
    _replace(other, "engine", graph, old, new)
    with pytest.raises(UserError, match=r"write the bundle again with 'pascalvl build'\.$") as error:
        open_engine(other, **options)
    assert str(error.value).isprintable()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("backend", "old", "new"),
    [
        ("onnxruntime", b"pascalvl", b""),
        ("onnxruntime", b"Reshape", b"Resh\xffpe"),
        ("cuda", b"pascalvl", b""),
        ("cuda", b"Reshape", b"Softmax"),
        ("cuda", b"Reshape", b"Resh\xffpe"),
        ("torch", b"pascalvl", b""),
        ("torch", b"model.visual.blocks.0.attn.qkv.bias", b"model.visual.blocks.0.attn.qkv.bia\xff"),
    ],
)
def test_builds_from_altered_graphs(nano_model_bundle, tmp_path, backend, old, new):
    other = shutil.copytree(nano_model_bundle, tmp_path / "model")
    _replace(other, "model", "vision", old, new)
    with pytest.raises(UserError, match=r"write the bundle again with 'pascalvl export'\.$") as error:
        build(other, tmp_path / "engine", backend)
    assert str(error.value).isprintable()
    assert str(other) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bundle_of_links(nano_engine_bundle, tmp_path):
    for path in nano_engine_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"cannot load the engine .* copy the files that its links point to"):
        open_engine(tmp_path)


def _vision_feeds(model, patches, cu_seqlens):
    random = np.random.default_rng(0)
    feeds = {}
    for binding in bindings.vision_inputs(model):
        shape = [patches if isinstance(size, str) else size for size in binding.shape]
        feeds[binding.name] = (random.standard_normal(shape) / 2).astype(binding.dtype)
    return feeds | {bindings.CU_SEQLENS: np.array(cu_seqlens, np.int32)}


@pytest.mark.parametrize("cu_seqlens", [[0, 96], [0, 4, 40, 96]])
def test_blocked_vision_attention_equals_the_exported_body(nano_model_bundle, nano_engine_bundle, cu_seqlens):
    feeds = _vision_feeds(Manifest.read(nano_model_bundle, "model").model, 96, cu_seqlens)
    expected, found = (
        ort.InferenceSession(bundle / "vision.onnx").run(None, feeds)
        for bundle in (nano_model_bundle, nano_engine_bundle)
    )
    for x, y in zip(expected, found, strict=True):
        # Sums of float32 in another order, through six layers.
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-5 * np.abs(x).max())


MEMORY_OF_VISION = """
import resource, sys
import numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1])
sizes = {"patches": 6144, "segments_plus_1": 2}
types = {"tensor(float)": np.float32, "tensor(int32)": np.int32}
feeds = {i.name: np.zeros([sizes.get(s, s) for s in i.shape], types[i.type]) for i in session.get_inputs()}
feeds["cu_seqlens"][1] = 6144
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.run(None, feeds)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_vision_attention_materialises_no_scores(nano_engine_bundle):
    num_heads = Manifest.read(nano_engine_bundle, "engine").model.vision.num_heads
    command = [sys.executable, "-c", MEMORY_OF_VISION, str(nano_engine_bundle / "vision.onnx")]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert used < 4 * num_heads * 6144**2
