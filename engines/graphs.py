"""What builds change in the exported graphs. Needs onnx, which the runtime does without: for builds and validation."""

from __future__ import annotations

import contextlib
from pathlib import Path

import onnx
import onnx.parser
from google.protobuf.message import Error as ProtobufError
from onnx import helper
from onnx.checker import ValidationError

from pascalvl.plugins import bindings, errors
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody
from pascalvl.plugins.ops.flash_attention.op import ATTR_KV_FORMAT, OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.ops.quant_linear import op as quant_linear

OP_VERSIONS = {op.OP_NAME: op.OP_VERSION for op in (flash_attention, quant_linear)}
"""Of the ops that are left to plugins."""
PLUGIN_VERSION = "plugin_version"
"""The attribute by which TensorRT's parser is told a plugin's version; without it, it takes 1."""


def reading(path: Path, remedy: str) -> contextlib.AbstractContextManager[None]:
    """`pascalvl.plugins.errors.reading` of a graph."""
    return errors.reading(path, remedy, ProtobufError, ValidationError)


def set_cache(decoder: onnx.ModelProto, model: ModelConfig, cache: CacheConfig) -> None:
    """Make an exported decoder graph read and write a cache as asked for.

    That changes its inputs and outputs, its nodes of the op, and their bodies.
    """
    for values, found in (
        (decoder.graph.input, bindings.decoder_inputs(model, cache)),
        (decoder.graph.output, bindings.decoder_outputs(model, cache)),
    ):
        del values[:]
        values.extend(
            helper.make_tensor_value_info(binding.name, helper.np_dtype_to_tensor_dtype(binding.dtype), binding.shape)
            for binding in found
        )
    layouts, bodies = cache.layers(model.text), set()
    for node in decoder.graph.node:
        if node.op_type != OP_NAME:
            continue
        layer = next(layer for layer in range(len(layouts)) if bindings.past_key(layer) in node.input)
        body = CausalBody.of(layouts[layer])
        bodies.add(body)
        for names, found in (
            (node.input, bindings.cache_inputs(model, cache, layer)),
            (node.output, bindings.new_rows(model, cache, layer)),
        ):
            kept = [name for name in names if name not in {binding.name for binding in found}]
            del names[:]
            names.extend([*kept, *(binding.name for binding in found)])
        node.domain = body.domain
        attribute = next(a for a in node.attribute if a.name == ATTR_KV_FORMAT)
        attribute.s = body.kv_format.value.encode()
    for rest in (decoder.functions, decoder.opset_import):
        kept = [x for x in rest if x.domain not in (OP_DOMAIN, *(body.domain for body in bodies))]
        del rest[:]
        rest.extend(kept)
    for body in sorted(bodies, key=lambda body: body.domain):
        decoder.functions.append(onnx.parser.parse_function(body.text))
        decoder.opset_import.append(helper.make_opsetid(body.domain, int(OP_VERSION)))


def mark_layers(decoder: onnx.ModelProto, model: ModelConfig) -> None:
    """Make a decoder graph return `bindings.hidden_states` of every layer as well."""
    for layer in range(model.text.num_hidden_layers):
        shape = ("tokens", model.text.hidden_size)
        value = helper.make_tensor_value_info(bindings.hidden_states(layer), onnx.TensorProto.FLOAT, shape)
        decoder.graph.output.append(value)


def leave_ops_to_plugins(graph: onnx.ModelProto) -> None:
    """Make TensorRT's parser look for the ops among the plugins, in the version that they have.

    TensorRT 10's would take their bodies in their place.
    """
    del graph.functions[:]
    for node in graph.graph.node:
        if node.op_type in OP_VERSIONS:
            node.attribute.append(helper.make_attribute(PLUGIN_VERSION, OP_VERSIONS[node.op_type]))
