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
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody
from pascalvl.plugins.ops.flash_attention.op import ATTR_KV_FORMAT, OP_DOMAIN, OP_NAME, OP_VERSION


def reading(path: Path, remedy: str) -> contextlib.AbstractContextManager[None]:
    """`pascalvl.plugins.errors.reading` of a graph."""
    return errors.reading(path, remedy, ProtobufError, ValidationError)


def set_cache(decoder: onnx.ModelProto, model: ModelConfig, cache: CacheConfig) -> None:
    """Make an exported decoder graph read a cache as asked for: its inputs, its nodes, and the op's bodies."""
    del decoder.graph.input[:]
    decoder.graph.input.extend(
        helper.make_tensor_value_info(binding.name, helper.np_dtype_to_tensor_dtype(binding.dtype), binding.shape)
        for binding in bindings.decoder_inputs(model, cache)
    )
    layouts, bodies = cache.layers(model.text), set()
    for node in decoder.graph.node:
        if node.op_type != OP_NAME:
            continue
        layer = next(layer for layer in range(len(layouts)) if bindings.past_key(layer) in node.input)
        body = CausalBody.of(layouts[layer])
        bodies.add(body)
        names = {
            binding.name.rpartition(".")[0]: binding.name for binding in bindings.cache_inputs(model, cache, layer)
        }
        del node.input[3:]
        node.input.extend(names.get(name, name) for name in body.inputs[3:])
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
        shape = ("batch", "seq", model.text.hidden_size)
        value = helper.make_tensor_value_info(bindings.hidden_states(layer), onnx.TensorProto.FLOAT, shape)
        decoder.graph.output.append(value)


def strip_functions(graph: onnx.ModelProto) -> None:
    """Leave the ops to plugins: TensorRT 10's parser would take their bodies in their place."""
    del graph.functions[:]
