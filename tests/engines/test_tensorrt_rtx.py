"""A real NVIDIA ONNX parser and ahead-of-time compiler take the exported graphs, on the CPU.

TensorRT-RTX has no plugin layers, so the attention nodes are replaced by their function bodies first.
"""

import onnx
import onnx.inliner
import pytest
import tensorrt_rtx as trt

from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.kv_format import KVFormat

RANGES = {
    "batch": (1, 1, 1),
    "seq": (1, 16, 64),
    "capacity": (128, 128, 128),
    "patches": (4, 64, 256),
    "segments_plus_1": (2, 2, 3),
}


@pytest.mark.parametrize("graph", [bindings.VISION, bindings.DECODER])
def test_parses_and_compiles(graph, nano_model_bundle, tmp_path):
    config = Manifest.read(nano_model_bundle, "model").model
    inputs = {
        bindings.VISION: bindings.vision_inputs(config),
        bindings.DECODER: bindings.decoder_inputs(config, KVFormat.F32),
    }[graph]
    proto = onnx.inliner.inline_local_functions(onnx.load(nano_model_bundle / f"{graph}.onnx"))
    path = tmp_path / "inlined.onnx"
    onnx.save(proto, path)

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
