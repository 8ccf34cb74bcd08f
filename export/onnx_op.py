"""The ONNX face of the two ops: schemas, nodes, and bodies in standard operators."""

from __future__ import annotations

import onnx
import onnx.parser
from onnx import helper
from onnx.defs import OpSchema
from onnxscript import values

from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.ops.flash_attention.onnx_body import PACKED_INPUTS, CausalBody, packed_body
from pascalvl.plugins.ops.flash_attention.op import (
    ATTR_CAUSAL,
    ATTR_EPSILON,
    ATTR_HEAD_DIM,
    ATTR_KV_FORMAT,
    ATTR_NUM_HEADS,
    ATTR_NUM_KV_HEADS,
    ATTR_SOFTMAX_SCALE,
    ATTR_VALUE_DIM,
    OP_DOMAIN,
    OP_NAME,
    OP_VERSION,
)
from pascalvl.plugins.ops.onnx_text import OPSET
from pascalvl.plugins.ops.quant_linear.onnx_body import LinearBody
from pascalvl.plugins.ops.quant_linear.op import (
    ATTR_ACTIVATION,
    ATTR_BITS,
    ATTR_GROUP,
    ATTR_HAS_BIAS,
    ATTR_HAS_RESIDUAL,
    ATTR_HAS_ZERO,
    ATTR_IN_FEATURES,
    ATTR_NORM,
    ATTR_NORM_SIZE,
    ATTR_OUT_FEATURES,
)
from pascalvl.plugins.ops.quant_linear.op import ATTR_EPSILON as LINEAR_EPSILON
from pascalvl.plugins.ops.quant_linear.op import OP_NAME as LINEAR
from pascalvl.plugins.ops.quant_linear.op import OP_VERSION as LINEAR_VERSION

IR_VERSION = 8
"""The last that TensorRT 8.6's parser reads."""

_SIZES = (ATTR_NUM_HEADS, ATTR_NUM_KV_HEADS, ATTR_HEAD_DIM, ATTR_VALUE_DIM)
_DOMAIN = values.Opset(OP_DOMAIN, int(OP_VERSION))
_LINEAR_DOMAIN = values.Opset(OP_DOMAIN, int(LINEAR_VERSION))

_SCHEMA = OpSchema(
    OP_NAME,
    OP_DOMAIN,
    int(OP_VERSION),
    doc="See pascalvl.plugins.ops.flash_attention.op.",
    inputs=[
        OpSchema.FormalParameter(
            "operands",
            "T",
            "those of the mode",
            param_option=OpSchema.FormalParameterOption.Variadic,
            is_homogeneous=False,
            min_arity=len(PACKED_INPUTS),
        )
    ],
    outputs=[
        OpSchema.FormalParameter("output", "F"),
        *(
            OpSchema.FormalParameter(name, "F", param_option=OpSchema.FormalParameterOption.Optional)
            for name in CausalBody().outputs[1:]
        ),
    ],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(int32)"], ""),
        ("F", ["tensor(float)"], ""),
    ],
    attributes=[
        *(OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in (ATTR_CAUSAL, *_SIZES)),
        *(OpSchema.Attribute(name, OpSchema.AttrType.FLOAT, "") for name in (ATTR_SOFTMAX_SCALE, ATTR_EPSILON)),
        OpSchema.Attribute(ATTR_KV_FORMAT, helper.make_attribute(ATTR_KV_FORMAT, ""), "cache format, where causal"),
    ],
)
_LINEAR_SCHEMA = OpSchema(
    LINEAR,
    OP_DOMAIN,
    int(LINEAR_VERSION),
    doc="See pascalvl.plugins.quant_linear.",
    inputs=[
        OpSchema.FormalParameter(
            "operands",
            "T",
            "x, weight, and what the attributes say",
            param_option=OpSchema.FormalParameterOption.Variadic,
            is_homogeneous=False,
            min_arity=2,
        )
    ],
    outputs=[OpSchema.FormalParameter("output", "F")],
    type_constraints=[
        ("T", ["tensor(float)", "tensor(int32)"], ""),
        ("F", ["tensor(float)"], ""),
    ],
    attributes=[
        *(
            OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
            for name in (
                *(ATTR_IN_FEATURES, ATTR_OUT_FEATURES, ATTR_BITS, ATTR_GROUP, ATTR_ACTIVATION),
                *(ATTR_HAS_ZERO, ATTR_HAS_BIAS, ATTR_HAS_RESIDUAL, ATTR_NORM, ATTR_NORM_SIZE),
            )
        ),
        OpSchema.Attribute(LINEAR_EPSILON, OpSchema.AttrType.FLOAT, ""),
    ],
)
for _schema in (_SCHEMA, _LINEAR_SCHEMA):
    if not onnx.defs.has(_schema.name, OP_DOMAIN):
        onnx.defs.register_schema(_schema)


# The exporter reads these functions' annotations: what has one is an attribute.
def translate(  # type: ignore[no-untyped-def]
    qkv,
    q_norm,
    k_norm,
    rope_cos,
    rope_sin,
    cu_seqlens,
    past_length,
    page_table,
    past_visible,
    past_key,
    past_value,
    past_scale,
    causal: bool,
    softmax_scale: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    epsilon: float,
    kv_format: str,
):
    """Write a node for torch's `pascalvl::flash_attention_2`; an entry of the exporter's translation table.

    Returns its outputs, a list: where causal three, for the cache is in f32 as exported.
    """
    attributes = {ATTR_CAUSAL: int(causal), ATTR_SOFTMAX_SCALE: softmax_scale, ATTR_EPSILON: epsilon}
    sizes = num_heads, num_kv_heads, head_dim, value_dim
    attributes |= dict(zip(_SIZES, sizes, strict=True))
    node = getattr(_DOMAIN, OP_NAME)
    if not causal:
        return node(qkv, rope_cos, rope_sin, cu_seqlens, **attributes)[:1]
    tokens = qkv, q_norm, k_norm, rope_cos, rope_sin, cu_seqlens
    past = past_length, page_table, past_visible, past_key, past_value
    return node(*tokens, *past, **attributes, **{ATTR_KV_FORMAT: KVFormat.F32.value})


def translate_linear(  # type: ignore[no-untyped-def]
    x,
    weight,
    scale,
    zero,
    bias,
    residual,
    norm_weight,
    norm_bias,
    bits: int,
    group: int,
    activation: int,
    norm: int,
    epsilon: float,
):
    """Write a node for torch's `pascalvl::quant_linear`; an entry of the exporter's translation table."""
    optional = scale, zero, bias, residual, norm_weight, norm_bias
    given = [operand for operand in optional if operand is not None]
    attributes: dict[str, int | float] = {ATTR_IN_FEATURES: int(x.shape[-1]), ATTR_OUT_FEATURES: int(weight.shape[0])}
    attributes |= {ATTR_BITS: bits, ATTR_GROUP: group, ATTR_ACTIVATION: activation}
    for name, operand in ((ATTR_HAS_ZERO, zero), (ATTR_HAS_BIAS, bias), (ATTR_HAS_RESIDUAL, residual)):
        attributes[name] = int(operand is not None)
    norm_size = 0 if norm_weight is None else int(norm_weight.shape[0])
    attributes |= {ATTR_NORM: norm, ATTR_NORM_SIZE: norm_size, LINEAR_EPSILON: float(epsilon)}
    return getattr(_LINEAR_DOMAIN, LINEAR)(x, weight, *given, **attributes)


def add_bodies(model: onnx.ModelProto) -> None:
    """Give a traced graph's nodes their bodies, stored in the model as local functions, and the bodies' domains."""
    bodies = {}
    for node in model.graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == OP_NAME:
            is_causal = attributes[ATTR_CAUSAL]
            bodies[OP_DOMAIN] = CausalBody().text if is_causal else packed_body()
            if not is_causal:  # the exporter gives a node all outputs that the schema has
                del node.output[1:]
        elif node.op_type == LINEAR:
            body = LinearBody.of(attributes)
            node.domain = body.domain
            bodies[body.domain] = body.text
    del model.functions[:]
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", OPSET))
    for domain, text in sorted(bodies.items()):
        model.functions.append(onnx.parser.parse_function(text))
        version = OP_VERSION if domain == OP_DOMAIN else LINEAR_VERSION
        model.opset_import.append(helper.make_opsetid(domain, int(version)))
