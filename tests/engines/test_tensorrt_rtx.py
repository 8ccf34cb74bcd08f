"""A real NVIDIA ONNX parser and ahead-of-time compiler take the exported graphs, on the CPU.

TensorRT-RTX has no plugin layers, so the attention nodes are replaced by their function bodies first.
"""

import onnx
import onnx.inliner
import pytest
import tensorrt_rtx as trt

from pascalvl.export import export_checkpoint, published_sizes
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, KVFormat

RANGES = {
    "tokens": (1, 16, 64),
    "batch": (1, 1, 4),
    "batch_plus_1": (2, 2, 5),
    "rows": (1, 1, 4),
    "visible_slots": (1, 1, 3 * PAGE_SLOTS),
    bindings.SEQUENCE_PAGES: (1, 1, 3),
    bindings.PAGES: (1, 1, 12),
    "patches": (4, 64, 256),
    "segments_plus_1": (2, 2, 3),
}


@pytest.fixture(scope="module")
def wide_model_bundle(random_checkpoint, tmp_path_factory):
    """Two layers of either part at the width and with the vocabulary of the 2B model."""
    folder = tmp_path_factory.mktemp("wide")
    vision = {"depth": 2, "deepstack_visual_indexes": [0, 1]}
    random_checkpoint(folder / "checkpoint", published_sizes.config("2B", {"num_hidden_layers": 2}, vision))
    export_checkpoint(folder / "checkpoint", folder / "model")
    return folder / "model"


@pytest.mark.parametrize("bundle", ["nano_model_bundle", "wide_model_bundle"])
@pytest.mark.parametrize("graph", [bindings.VISION, bindings.DECODER])
def test_parses_and_compiles(bundle, graph, request, tmp_path):
    bundle = request.getfixturevalue(bundle)
    config = Manifest.read(bundle, "model").model
    inputs = {
        bindings.VISION: bindings.vision_inputs(config),
        bindings.DECODER: bindings.decoder_inputs(config, CacheConfig(KVFormat.F32)),
    }[graph]
    proto = onnx.load(bundle / f"{graph}.onnx", load_external_data=False)
    path = tmp_path / "inlined.onnx"
    onnx.save(onnx.inliner.inline_local_functions(proto), path)
    (tmp_path / f"{graph}.onnx.data").symlink_to(bundle / f"{graph}.onnx.data")

    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    assert [network.get_input(i).name for i in range(network.num_inputs)] == [binding.name for binding in inputs]

    profile = builder.create_optimization_profile()
    for binding in inputs:
        smallest, usual, largest = (tuple(RANGES[d][i] if d in RANGES else d for d in binding.shape) for i in range(3))
        profile.set_shape(binding.name, smallest, usual, largest)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
