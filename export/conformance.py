"""Whether TensorRT 8.6's ONNX parser can read a graph, decided without TensorRT.

The table and the restrictions are those of the parser's support matrix (onnx-tensorrt, release 8.6, operators.md). The
parser reads INT64 as INT32, ignores node domains, looks an unknown operator up among the plugins, and knows no local
functions: a build strips them.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, numpy_helper

from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.flash_attention import OP_DOMAIN, OP_NAME
from pascalvl.plugins.onnx_body import OPSET
from pascalvl.plugins.quant_linear import OP_NAME as LINEAR

_SUPPORTED = {
    "FP32 FP16 INT32": (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod "
        "Mul Neg Range SpaceToDepth Sub Sum TopK"
    ),
    "FP32 FP16": (
        "Acos Acosh Asin Asinh Atan Atanh BatchNormalization Ceil Celu Cos Cosh CumSum Einsum Erf Exp Floor GridSample "
        "InstanceNormalization IsInf LayerNormalization Log LogSoftmax MatMul Pow QuantizeLinear Reciprocal ReduceL1 "
        "ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
        "Resize Sin Sinh Softmax Sqrt Tan"
    ),
    "BOOL": "And Not Or Xor",
    "FP32 FP16 INT8 INT32": "AveragePool Pad ScatterElements ScatterND Sign",
    "FP32 FP16 INT32 INT8 UINT8 BOOL": "Cast",
    "FP32 FP16 INT8": (
        "Clip Conv ConvTranspose Elu Gemm GlobalAveragePool GlobalMaxPool HardSwish HardSigmoid LeakyRelu MaxPool "
        "PRelu Relu Round Selu Sigmoid Softplus Softsign Tanh"
    ),
    "FP32 FP16 INT32 INT8 BOOL": (
        "Concat Constant Gather GatherElements GatherND Identity Reshape Shape Size Slice Squeeze Transpose Trilu "
        "Unsqueeze"
    ),
    "FP32": f"ConstantOfShape {OP_NAME} {LINEAR}",
    "INT8": "DequantizeLinear",
    "FP32 FP16 INT32 BOOL": "Expand EyeLike Flatten OneHot Split Tile Where",
}
_TYPES_OF = {op: set(types.split()) for types, ops in _SUPPORTED.items() for op in ops.split()}
_TENSORRT_TYPE = {
    TensorProto.FLOAT: "FP32",
    TensorProto.FLOAT16: "FP16",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT32",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
}
_TYPED_BY_INPUT = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Shape", "Size", "IsInf", "IsNaN"}
"""Operators whose result has a type of its own; the table speaks of what goes in."""
_CONSTANT_INPUTS = {
    "Slice": {"axes": 3, "steps": 4},
    "Squeeze": {"axes": 1},
    "Unsqueeze": {"axes": 1},
    "ReduceSum": {"axes": 1},
    "CumSum": {"axis": 1},
    "DequantizeLinear": {"x_zero_point": 2},
    "QuantizeLinear": {"y_zero_point": 2},
}
_MOST_NODES_NAMED = 8


def check(proto: onnx.ModelProto, name: str) -> None:
    """Raise `UserError` naming the nodes of graph ``name`` that TensorRT 8.6 would refuse, and why."""
    found = list(violations(proto))
    if found:
        more = f" and {len(found) - _MOST_NODES_NAMED} more" if len(found) > _MOST_NODES_NAMED else ""
        raise UserError(
            f"the {name} graph does not fit TensorRT 8.6's parser: {'; '.join(found[:_MOST_NODES_NAMED])}{more}. "
            "This model, or this version of torch or transformers, needs a lowering that export does not have."
        )


def violations(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield one phrase for each thing in the model that TensorRT 8.6 would refuse."""
    if proto.ir_version > IR_VERSION:
        yield f"IR version {proto.ir_version}, at most {IR_VERSION} is read"
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > OPSET:
            yield f"opset {opset.version}, at most {OPSET} is read"
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    for node in graph.node:
        for reason in _node_violations(node, types, constants):
            yield f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}"


def _node_violations(node: onnx.NodeProto, types: dict[str, int], constants: dict[str, TensorProto]) -> Iterator[str]:
    is_plugin = node.op_type in (OP_NAME, LINEAR) and node.domain.split(".")[0] == OP_DOMAIN
    if not is_plugin and (node.domain not in ("", "ai.onnx") or node.op_type not in _TYPES_OF):
        yield f"operator {node.domain + '.' if node.domain else ''}{node.op_type} is not supported"
        return
    if any(attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for attribute in node.attribute):
        yield "subgraphs are not supported"

    value = node.input[0] if node.op_type in _TYPED_BY_INPUT else node.output[0]
    known = types.get(value, TensorProto.UNDEFINED)
    if _TENSORRT_TYPE.get(known) not in _TYPES_OF[node.op_type]:
        allowed = ", ".join(sorted(_TYPES_OF[node.op_type]))
        yield f"{value} has type {TensorProto.DataType.Name(known)}, expected one of {allowed}"

    schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain) if not is_plugin else None
    for attribute in node.attribute if schema else ():
        if attribute.name not in schema.attributes:
            yield f"attribute {attribute.name} is not of opset {OPSET}"
        elif attribute.name == "allowzero" and attribute.i:
            yield "allowzero is not supported"
    if schema and len(node.input) > schema.max_input:
        yield f"{len(node.input)} inputs, opset {OPSET} has {schema.max_input}: axes must be an attribute"
    for name, index in _CONSTANT_INPUTS.get(node.op_type, {}).items():
        if index >= len(node.input) or not node.input[index]:
            continue
        constant = constants.get(node.input[index])
        if constant is None:
            yield f"{name} must be an initializer"
        elif name.endswith("zero_point") and numpy_helper.to_array(constant).any():
            yield f"{name} must be zero"
