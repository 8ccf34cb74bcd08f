"""The ONNX face of FlashAttention2: its schema, its node, and its bodies in standard operators.

The body makes every exported graph runnable anywhere and says exactly what the kernels must compute. It materialises
the scores; only an engine that replaces the node does not.
"""

from __future__ import annotations

import onnx
from onnx import helper
from onnx.defs import OpSchema
from onnxscript import script, values
from onnxscript.onnx_opset import opset17 as op

from pascalvl.plugins.flash_attention import (
    ATTR_CAUSAL,
    ATTR_KV_FORMAT,
    ATTR_SOFTMAX_SCALE,
    OP_DOMAIN,
    OP_NAME,
    OP_VERSION,
)
from pascalvl.plugins.kv_format import KVFormat

OPSET = 17
IR_VERSION = 8
"""The last that TensorRT 8.6's parser reads, as is opset 17."""

_DOMAIN = values.Opset(OP_DOMAIN, int(OP_VERSION))
_LOWEST = -3.4028234663852886e38

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
        OpSchema.FormalParameter("past_key", "C", param_option=OpSchema.FormalParameterOption.Optional),
        OpSchema.FormalParameter("past_value", "C", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[OpSchema.FormalParameter("output", "T")],
    type_constraints=[
        ("T", ["tensor(float)"], ""),
        ("C", ["tensor(float)", "tensor(float16)"], ""),
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


def translate(q, k, v, cu_seqlens, past_key, past_value, past_length, causal: bool, softmax_scale: float):
    """Write a node for torch's `pascalvl::flash_attention_2`; an entry of the exporter's translation table."""
    node = getattr(_DOMAIN, OP_NAME)
    if not causal:
        return node(q, k, v, cu_seqlens, causal=0, softmax_scale=softmax_scale)
    cache = past_length, past_key, past_value
    return node(q, k, v, *cache, causal=1, softmax_scale=softmax_scale, kv_format=KVFormat.F32.value)


@script(_DOMAIN, default_opset=op)
def packed_attention(q, k, v, cu_seqlens, softmax_scale: float, causal: int):
    total = op.Squeeze(op.Shape(q, start=2, end=3), [0])
    tokens = op.Unsqueeze(op.Cast(op.Range(0, total, 1), to=6), [1])
    bounds_passed = op.Cast(op.GreaterOrEqual(tokens, cu_seqlens), to=6)
    segment = op.ReduceSum(bounds_passed, [1], keepdims=1)
    visible = op.Equal(segment, op.Transpose(segment, perm=[1, 0]))
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])) * op.Constant(value_float=softmax_scale)
    weights = op.Softmax(op.Where(visible, scores, _LOWEST), axis=-1)
    return op.Transpose(op.MatMul(weights, v), perm=[0, 2, 1, 3])


@script(_DOMAIN, default_opset=op)
def causal_attention(q, k, v, past_length, past_key, past_value, softmax_scale: float, causal: int, kv_format: str):
    # Of the capacity, take what the longest sequence fills: the cost follows the past, not the capacity.
    most = op.ReduceMax(past_length, keepdims=1)
    keys = op.Concat(op.Cast(op.Slice(past_key, [0], most, [2]), to=1), k, axis=2)
    rows = op.Concat(op.Cast(op.Slice(past_value, [0], most, [2]), to=1), v, axis=2)

    slots = op.Cast(op.Range(0, op.Squeeze(op.Shape(keys, start=2, end=3), [0]), 1), to=6)
    queries = op.Cast(op.Range(0, op.Squeeze(op.Shape(q, start=2, end=3), [0]), 1), to=6)
    of_past = op.Less(slots, op.Unsqueeze(past_length, [1]))
    of_new = op.And(
        op.GreaterOrEqual(slots, most),
        op.LessOrEqual(op.Sub(slots, most), op.Unsqueeze(queries, [1])),
    )
    visible = op.Unsqueeze(op.Or(op.Unsqueeze(of_past, [1]), of_new), [1, 2])

    # The queries of a group stay folded on one axis, so that its keys and values are not repeated in memory.
    kv_heads = op.Shape(k, start=0, end=2)
    folded = op.Reshape(q, op.Concat(kv_heads, [-1], op.Shape(q, start=3, end=4), axis=0))
    scores = op.MatMul(folded, op.Transpose(keys, perm=[0, 1, 3, 2])) * op.Constant(value_float=softmax_scale)
    unfolded = op.Concat(kv_heads, [-1], op.Shape(q, start=2, end=3), op.Shape(keys, start=2, end=3), axis=0)
    weights = op.Softmax(op.Where(visible, op.Reshape(scores, unfolded), _LOWEST), axis=-1)
    output = op.MatMul(op.Reshape(weights, op.Shape(scores)), rows)
    return op.Transpose(op.Reshape(output, op.Concat(op.Shape(q, start=0, end=3), [-1], axis=0)), perm=[0, 2, 1, 3])


def function_body(causal: bool) -> onnx.FunctionProto:
    """The op's body for graphs of one mode, to be stored in a model as a local function."""
    function = (causal_attention if causal else packed_attention).to_function_proto()
    function.name = OP_NAME
    return function
