"""What builds change in the exported graphs. Needs onnx, which the runtime does without: for builds and validation."""

from __future__ import annotations

import onnx
from onnx import helper

from pascalvl.plugins import bindings
from pascalvl.plugins.flash_attention import ATTR_KV_FORMAT, OP_NAME
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.model_config import ModelConfig


def set_kv_format(decoder: onnx.ModelProto, model: ModelConfig, kv_format: KVFormat) -> None:
    """Make a decoder graph read a cache of ``kv_format``."""
    inputs = {value.name: value for value in decoder.graph.input}
    for binding in bindings.decoder_inputs(model, kv_format):
        inputs[binding.name].type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(binding.dtype)
    for node in decoder.graph.node:
        if node.op_type == OP_NAME:
            attribute = next(a for a in node.attribute if a.name == ATTR_KV_FORMAT)
            attribute.s = kv_format.value.encode()


def mark_layers(decoder: onnx.ModelProto, model: ModelConfig) -> None:
    """Make a decoder graph return `bindings.hidden_states` of every layer as well."""
    for layer in range(model.text.num_hidden_layers):
        shape = ("batch", "seq", model.text.hidden_size)
        value = helper.make_tensor_value_info(bindings.hidden_states(layer), onnx.TensorProto.FLOAT, shape)
        decoder.graph.output.append(value)


def strip_functions(graph: onnx.ModelProto) -> None:
    """Leave FlashAttention2 to a plugin: TensorRT 10's parser would take the op's body in its place."""
    del graph.functions[:]
