"""Whether TensorRT 8.6.1 and 9.x read a graph as it is meant, decided without TensorRT.

The rules are what the source of their ONNX importers does (onnx-tensorrt, branches 8.6-GA and 9.0-GA to 9.3) with the
operators that exports consist of; where versions differ, the stricter holds. An operator without rules is refused, so
are further attributes, and values of unknown type or rank. Importers ignore domains, and look up a plugin for an
operator that they do not know; local functions are stripped before a build and not looked at here.

Only float32 and int32 pass between nodes: the builder hands plugins no halves without its FP16 flag. int64 is for
constants that tell axes, indices and shapes: 8.6 reads it as int32, and 9.x does not take int32 everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN
from pascalvl.plugins.ops.onnx_text import OPSET
from pascalvl.plugins.ops.quant_linear import op as quant_linear

MAX_DIMS = 8
"""Of TensorRT's ``Dims``."""
_OLDEST_OPSET = 13
"""From which on axes are inputs, as the rules expect."""
_FLOAT, _INT32, _INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
_INT32_RANGE = np.iinfo(np.int32)
_MOST_NODES_NAMED = 8
_REMARKS = {
    "LayerNormalization": "8.6 hands it to Myelin, for which no report on SM61 exists",
    "Shape": "its start and end are ignored before 10.1",
}
"""Why operators that one might expect have no rules."""


@dataclasses.dataclass(frozen=True)
class _Node:
    """A node with what the graph tells of its inputs."""

    proto: onnx.NodeProto
    types: Mapping[str, int]
    shapes: Mapping[str, tuple[int | None, ...]]
    constants: Mapping[str, TensorProto]

    @property
    def attributes(self) -> dict[str, AttributeProto]:
        return {attribute.name: attribute for attribute in self.proto.attribute}

    def get(self, name: str, default: object = None) -> Any:
        """An attribute's value."""
        found = self.attributes.get(name)
        return default if found is None else helper.get_attribute_value(found)

    def shape(self, index: int = 0) -> tuple[int | None, ...]:
        """Of an input; None: a size that varies."""
        return self.shapes[self.proto.input[index]]

    def constant(self, index: int) -> np.ndarray | None:
        """Values of an input that is a constant, else None."""
        tensor = self.constants.get(self.proto.input[index]) if index < len(self.proto.input) else None
        return None if tensor is None else numpy_helper.to_array(tensor)


Rule = Callable[[_Node], Iterator[str]]
"""Yields a phrase for each thing about a node that is against it."""


@dataclasses.dataclass(frozen=True)
class _Rules:
    """What holds for an operator.

    Attributes:
        inputs: accepted types, by the inputs' order; the last stands for all that follow.
        attributes: those that importers read as ONNX means them.
        required: of them, those whose absence means something else to an importer, or less than is meant.
        rules: further ones, where the types are right.
    """

    inputs: tuple[tuple[int, ...], ...]
    attributes: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()


# Rules ----------------------------------------------------------------------------------------------------------------


def _operands_are_alike(node: _Node) -> Iterator[str]:
    """No importer converts types."""
    types = sorted({TensorProto.DataType.Name(node.types[name]) for name in node.proto.input})
    if len(types) > 1:
        yield f"its operands have the types {' and '.join(types)}, expected one"


def _has_an_axis(node: _Node) -> Iterator[str]:
    """Importers take an axis just beyond the last for one."""
    axis, rank = node.get("axis", 0), len(node.shape())
    if not -rank <= axis < rank:
        yield f"axis {axis} is none of a tensor of {rank} dimensions"


def _concatenates_the_same_ranks(node: _Node) -> Iterator[str]:
    ranks = {len(node.shapes[name]) for name in node.proto.input}
    if len(ranks) > 1:
        yield f"it concatenates tensors of {', '.join(map(str, sorted(ranks)))} dimensions"


def _indices_are_not_negative(node: _Node) -> Iterator[str]:
    """They are handed on as they are, and undefined on an axis that varies."""
    indices = node.constant(1)
    if node.types[node.proto.input[1]] == _INT64 and indices is None:
        yield "its indices are of type INT64, expected INT32 or a constant"
    elif indices is not None and (indices < 0).any():
        yield f"index {indices.min()} is negative"


def _is_a_product_of_matrices(node: _Node) -> Iterator[str]:
    """Gemm takes no more dimensions; products of vectors are squeezed and unsqueezed by the importer."""
    ranks = [len(node.shape(index)) for index in range(2)]
    if node.proto.op_type == "Gemm" and ranks != [2, 2]:
        yield f"its factors have {ranks[0]} and {ranks[1]} dimensions, expected 2"
    elif min(ranks) < 2:
        yield "a factor has fewer than 2 dimensions"


def _axes_are_an_attribute(node: _Node) -> Iterator[str]:
    """An importer that knows no input of axes reduces all of them."""
    if len(node.proto.input) > 1:
        yield "axes must be an attribute"
        return
    yield from _are_axes(node.get("axes", ()), len(node.shape()))


def _axes_are_a_constant(node: _Node) -> Iterator[str]:
    """Squeeze and the reductions want an initializer; without axes, what is meant depends on sizes that vary.

    9.x reads the axes of Squeeze as int64 whatever they are.
    """
    axes = node.constant(1)
    if axes is None or axes.ndim != 1:
        yield "axes must be an initializer of 1 dimension"
        return
    rank = len(node.shape())
    if node.proto.op_type == "Unsqueeze":
        rank += len(axes)
        if rank > MAX_DIMS:
            yield f"the result has {rank} dimensions, at most {MAX_DIMS} are read"
    yield from _are_axes(axes.tolist(), rank)
    if node.proto.op_type == "Squeeze":
        sizes = [node.shape()[axis] for axis in axes.tolist() if -rank <= axis < rank]
        if any(size not in (1, None) for size in sizes):
            yield f"it squeezes axes of sizes {sizes}"


def _are_axes(axes: Sequence[int], rank: int) -> Iterator[str]:
    wrong = [axis for axis in axes if not -rank <= axis < rank]
    if wrong or len({axis % rank for axis in axes}) < len(axes):
        yield f"axes {list(axes)} are not those of a tensor of {rank} dimensions"


def _target_is_constant(node: _Node) -> Iterator[str]:
    """A target that is computed is put together of Shape nodes; a size of 0 is that of the same axis before."""
    target = node.constant(1)
    if target is None or target.ndim != 1:
        yield "its target must be an initializer of 1 dimension"
    elif len(target) > MAX_DIMS:
        yield f"the result has {len(target)} dimensions, at most {MAX_DIMS} are read"
    elif (target < -1).any() or (target == -1).sum() > 1 or (target[len(node.shape()) :] == 0).any():
        yield f"target {target.tolist()} of {len(node.shape())} dimensions means nothing"


def _slices_are_constant(node: _Node) -> Iterator[str]:
    """Axes must be; the rest would be computed of shapes. Negative starts and ends are counted from the end."""
    if len(node.proto.input) < 4:
        yield "expected starts, ends and axes"
        return
    constants = [node.constant(index) for index in range(1, len(node.proto.input))]
    operands = [constant for constant in constants if constant is not None and constant.ndim == 1]
    if len(operands) < len(constants):
        yield "starts, ends, axes and steps must be initializers of 1 dimension"
        return
    if len({len(operand) for operand in operands}) > 1:
        yield "starts, ends, axes and steps are not equally many"
    if len(operands) > 3 and (operands[3] < 1).any():
        yield f"steps {operands[3].tolist()} are not positive"
    yield from _are_axes(operands[2].tolist(), len(node.shape()))


def _is_a_permutation(node: _Node) -> Iterator[str]:
    permutation, rank = list(node.get("perm", ())), len(node.shape())
    if sorted(permutation) != list(range(rank)):
        yield f"perm {permutation} does not permute {rank} dimensions"


def _fields_reach_the_plugin(node: _Node) -> Iterator[str]:
    """Attributes become fields of float32, int32 or characters; an integer is cut to 32 bits, other kinds are lost."""
    for name, attribute in node.attributes.items():
        if attribute.type not in (AttributeProto.FLOAT, AttributeProto.INT, AttributeProto.STRING):
            kind = AttributeProto.AttributeType.Name(attribute.type)
            yield f"attribute {name} is of kind {kind}, expected FLOAT, INT or STRING"
        elif attribute.type == AttributeProto.INT and not _INT32_RANGE.min <= attribute.i <= _INT32_RANGE.max:
            yield f"attribute {name} is {attribute.i}, beyond int32"


def _has_the_plugins_outputs(node: _Node) -> Iterator[str]:
    """Importers give all outputs of a plugin the names of the node's, one by one, however many it has."""
    kv_format = node.get(flash_attention.ATTR_KV_FORMAT, b"").decode()
    body = next((CausalBody(known) for known in KVFormat if known.value == kv_format), CausalBody())
    expected = len(body.outputs) if node.get(flash_attention.ATTR_CAUSAL) else 1
    found = sum(map(bool, node.proto.output))
    if not found == len(node.proto.output) == expected:
        yield f"it has {found} outputs, expected {expected}"


def _names(op: object) -> tuple[str, ...]:
    """The attributes of one of the ops."""
    return tuple(value for name, value in vars(op).items() if name.startswith("ATTR_"))


_FLOATS, _ANY, _INDICES = (_FLOAT,), (_FLOAT, _INT32), (_INT64,)
_ELEMENTWISE = _Rules((_FLOATS,), rules=(_operands_are_alike,))
_UNARY = _Rules((_FLOATS,))
_PLUGINS = {
    flash_attention.OP_NAME: _Rules(
        (_ANY,), _names(flash_attention), rules=(_fields_reach_the_plugin, _has_the_plugins_outputs)
    ),
    quant_linear.OP_NAME: _Rules((_ANY,), _names(quant_linear), rules=(_fields_reach_the_plugin,)),
}
_RULES = {
    **dict.fromkeys(("Add", "Div", "Mul", "Pow", "Sub"), _ELEMENTWISE),
    **dict.fromkeys(("Erf", "Neg", "Reciprocal", "Relu", "Sigmoid", "Sqrt", "Tanh"), _UNARY),
    "Concat": _Rules((_ANY,), ("axis",), ("axis",), (_operands_are_alike, _has_an_axis, _concatenates_the_same_ranks)),
    "Gather": _Rules((_ANY, (_INT32, _INT64)), ("axis",), rules=(_has_an_axis, _indices_are_not_negative)),
    "Gemm": _Rules((_FLOATS,), ("alpha", "beta", "transA", "transB"), rules=(_is_a_product_of_matrices,)),
    "MatMul": _Rules((_FLOATS,), rules=(_is_a_product_of_matrices,)),
    "ReduceMean": _Rules((_FLOATS, _INDICES), ("axes", "keepdims"), ("axes",), (_axes_are_an_attribute,)),
    "ReduceSum": _Rules((_FLOATS, _INDICES), ("keepdims",), rules=(_axes_are_a_constant,)),
    "Reshape": _Rules((_ANY, _INDICES), rules=(_target_is_constant,)),
    "Slice": _Rules((_ANY, _INDICES), rules=(_slices_are_constant,)),
    "Squeeze": _Rules((_ANY, _INDICES), rules=(_axes_are_a_constant,)),
    "Transpose": _Rules((_ANY,), ("perm",), ("perm",), (_is_a_permutation,)),
    "Unsqueeze": _Rules((_ANY, _INDICES), rules=(_axes_are_a_constant,)),
    **_PLUGINS,
}


# The check ------------------------------------------------------------------------------------------------------------


def check(proto: onnx.ModelProto, name: str) -> None:
    """Raise `UserError` naming the nodes of graph ``name`` that TensorRT 8.6.1 or 9.x would not take as meant."""
    found = list(violations(proto))
    if found:
        more = f" and {len(found) - _MOST_NODES_NAMED} more" if len(found) > _MOST_NODES_NAMED else ""
        raise UserError(
            f"the {name} graph does not fit TensorRT 8.6's parser: {'; '.join(found[:_MOST_NODES_NAMED])}{more}. "
            "This model, or this version of torch or transformers, needs a lowering that export does not have."
        )


def violations(proto: onnx.ModelProto) -> Iterator[str]:
    """Yield one phrase for each thing in the model that is against a rule."""
    if proto.ir_version > IR_VERSION:
        yield f"IR version {proto.ir_version}, at most {IR_VERSION} is read"
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx") and not _OLDEST_OPSET <= opset.version <= OPSET:
            yield f"opset {opset.version}, expected {_OLDEST_OPSET} to {OPSET}"
    if proto.producer_name == "TensorRT":
        yield "producer TensorRT, by which importers know what it wrote itself"
    graph = proto.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for tensor in graph.initializer:
        yield from _of_constant(tensor)
    types = {name: tensor.data_type for name, tensor in constants.items()}
    shapes = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
    computed = {name for node in graph.node for name in node.output}
    for value in graph.output:
        if value.name not in computed:  # an input would get another name
            yield f"output {value.name!r} is computed by no node"
    for value in (*graph.input, *graph.output):
        if types[value.name] not in _ANY:
            yield f"{value.name!r} has type {TensorProto.DataType.Name(types[value.name])}, expected FLOAT or INT32"
    for node in graph.node:
        for reason in _of_node(_Node(node, types, shapes, constants)):
            yield f"node {node.name or node.output[0]!r} ({node.op_type}): {reason}"


def _of_constant(tensor: TensorProto) -> Iterator[str]:
    """Importers read some types as others, and clip what is beyond int32 to it."""
    if tensor.data_type not in (_FLOAT, _INT32, _INT64):
        yield (
            f"constant {tensor.name!r} has type {TensorProto.DataType.Name(tensor.data_type)}, expected FLOAT or INT32"
        )
    elif tensor.data_type == _INT64:
        values = numpy_helper.to_array(tensor)
        if values.size and not _INT32_RANGE.min <= values.min() <= values.max() <= _INT32_RANGE.max:
            yield f"constant {tensor.name!r} has values beyond int32"


def _of_node(node: _Node) -> Iterator[str]:
    proto = node.proto
    rules = _RULES.get(proto.op_type)
    # Importers ignore domains: a foreign operator of a known name would be taken for the known one.
    is_own = proto.domain.split(".")[0] == OP_DOMAIN if proto.op_type in _PLUGINS else proto.domain in ("", "ai.onnx")
    if rules is None or not is_own:
        remark = f", {_REMARKS[proto.op_type]}" if proto.op_type in _REMARKS else ""
        yield f"operator {proto.domain + '.' if proto.domain else ''}{proto.op_type} is not supported{remark}"
        return
    for name in node.attributes:
        if name not in rules.attributes:
            yield f"attribute {name} has no meaning to importers"
    for name in rules.required:
        if name not in node.attributes:
            yield f"attribute {name} is missing"
    unsound = False
    for index, name in enumerate(proto.input):
        accepted = rules.inputs[min(index, len(rules.inputs) - 1)]
        for reason in _of_input(node, name, accepted):
            unsound = True
            yield reason
    for name in proto.output:
        if len(node.shapes.get(name, ())) > MAX_DIMS:
            yield f"{name} has {len(node.shapes[name])} dimensions, at most {MAX_DIMS} are read"
    if not unsound:
        for rule in rules.rules:
            yield from rule(node)


def _of_input(node: _Node, name: str, accepted: tuple[int, ...]) -> Iterator[str]:
    if not name:
        yield "an input is left out, for which importers have no tensor"
        return
    kind = node.types.get(name, TensorProto.UNDEFINED)
    if kind not in accepted:
        expected = " or ".join(TensorProto.DataType.Name(each) for each in accepted)
        yield f"{name} has type {TensorProto.DataType.Name(kind)}, expected {expected}"
    if name not in node.shapes:
        yield f"{name} has an unknown number of dimensions"
    elif len(node.shapes[name]) > MAX_DIMS:
        yield f"{name} has {len(node.shapes[name])} dimensions, at most {MAX_DIMS} are read"
