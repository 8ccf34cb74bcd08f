"""The ONNX face of FlashAttention2: its schema, its node, and its body in standard operators."""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import helper
from onnx.defs import OpSchema
from onnxscript import values

from pascalvl.plugins.flash_attention import (
    ATTR_CAUSAL,
    ATTR_KV_FORMAT,
    ATTR_SOFTMAX_SCALE,
    OP_DOMAIN,
    OP_NAME,
    OP_VERSION,
)
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.onnx_body import CausalBody, packed_body

IR_VERSION = 8
"""The last that TensorRT 8.6's parser reads."""

_DOMAIN = values.Opset(OP_DOMAIN, int(OP_VERSION))

_SCHEMA = OpSchema(
    OP_NAME,
    OP_DOMAIN,
    int(OP_VERSION),
    doc="See pascalvl.plugins.flash_attention.",
    inputs=[
        OpSchema.FormalParameter("q", "T"),
        OpSchema.FormalParameter("k", "T"),
        OpSchema.FormalParameter("v", "T"),
        OpSchema.FormalParameter("lengths", "L", "cu_seqlens, or past_length where causal"),
        OpSchema.FormalParameter("past_visible", "L", param_option=OpSchema.FormalParameterOption.Optional),
        OpSchema.FormalParameter("past_key", "C", param_option=OpSchema.FormalParameterOption.Optional),
        OpSchema.FormalParameter("past_value", "C", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[OpSchema.FormalParameter("output", "T")],
    type_constraints=[
        ("T", ["tensor(float)"], ""),
        ("C", ["tensor(float)"], "as exported; builds choose other formats"),
        ("L", ["tensor(int32)"], ""),
    ],
    attributes=[
        OpSchema.Attribute(ATTR_CAUSAL, OpSchema.AttrType.INT, "which of the two modes"),
        OpSchema.Attribute(ATTR_SOFTMAX_SCALE, OpSchema.AttrType.FLOAT, "factor on q k^T"),
        OpSchema.Attribute(ATTR_KV_FORMAT, helper.make_attribute(ATTR_KV_FORMAT, ""), "cache format, where causal"),
    ],
)
if not onnx.defs.has(OP_NAME, OP_DOMAIN):
    onnx.defs.register_schema(_SCHEMA)


def translate(
    q,
    k,
    v,
    cu_seqlens,
    past_key,
    past_value,
    past_length,
    past_visible,
    past_scale,
    recent_key,
    recent_value,
    recent_length,
    causal: bool,
    softmax_scale: float,
    kv_format: str,
):
    """Write a node for torch's `pascalvl::flash_attention_2`; an entry of the exporter's translation table."""
    node = getattr(_DOMAIN, OP_NAME)
    if not causal:
        return node(q, k, v, cu_seqlens, causal=0, softmax_scale=softmax_scale)
    cache = past_length, past_visible, past_key, past_value
    return node(q, k, v, *cache, causal=1, softmax_scale=softmax_scale, kv_format=KVFormat.F32.value)


def function_body(causal: bool) -> onnx.FunctionProto:
    """The op's body for exported graphs of one mode, to be stored in a model as a local function."""
    return onnx.parser.parse_function(CausalBody().text if causal else packed_body())
