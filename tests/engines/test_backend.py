"""Engine bundles: built, loaded, cross-checked and refused."""

import json
import shutil

import onnx
import pytest
from onnx import TensorProto

from pascalvl.engines import build, open_engine
from pascalvl.plugins import bindings, bundle
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat


def test_build_sets_the_cache_format(nano_engine_bundle, nano_engine_bundle_f16):
    for directory, kv_format, dtype in (
        (nano_engine_bundle, KVFormat.F32, TensorProto.FLOAT),
        (nano_engine_bundle_f16, KVFormat.F16, TensorProto.FLOAT16),
    ):
        assert open_engine(directory).manifest.kv_format is kv_format
        graph = onnx.load(directory / "decoder.onnx", load_external_data=False).graph
        types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
        assert types[bindings.past_key(0)] == types[bindings.past_value(1)] == dtype


def test_unknown_backend(nano_model_bundle, nano_engine_bundle, tmp_path):
    with pytest.raises(UserError, match="unknown backend 'cuda': expected one of auto, onnxruntime"):
        build(nano_model_bundle, tmp_path / "engine", "cuda")
    with pytest.raises(UserError, match="unknown backend 'cuda'"):
        open_engine(nano_engine_bundle, "cuda")
    assert not list(tmp_path.iterdir())


def test_model_bundle_is_not_an_engine_bundle(nano_model_bundle, nano_engine_bundle, tmp_path):
    with pytest.raises(UserError, match="is a bundle of kind 'model': expected"):
        open_engine(nano_model_bundle)
    with pytest.raises(UserError, match="is a bundle of kind 'engine': expected"):
        build(nano_engine_bundle, tmp_path / "engine")


def _copy_with_manifest(directory, target, **changes):
    """A copy whose manifest says something else but still fits its files."""
    shutil.copytree(directory, target)
    path = target / bundle.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return target


def test_engine_for_another_model_is_found_before_it_runs(nano_engine_bundle, tmp_path):
    model = Manifest.read(nano_engine_bundle, "engine").model.to_json()
    model["text"]["num_key_value_heads"] *= 2
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "heads", model=model)
    with pytest.raises(UserError, match=r"decoder engine .* is for another model: expected input past_key\.0"):
        open_engine(other)
    model["text"]["num_key_value_heads"] //= 2
    model["text"]["num_hidden_layers"] -= 1
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
    other = _copy_with_manifest(nano_engine_bundle, tmp_path / "format", kv_format="f16")
    with pytest.raises(UserError, match=r"expected input past_key\.0 float16"):
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


def test_bundle_of_links(nano_engine_bundle, tmp_path):
    for path in nano_engine_bundle.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(UserError, match=r"cannot load the engine .* copy the files that its links point to"):
        open_engine(tmp_path)
