"""PyTorch module to ONNX graph in the operator set that TensorRT 8.6 reads, without touching a weight.

Modules are traced on the meta device; the graph comes out with its weights as names and shapes only (`Weight` says how
each is called in the model), so that a model larger than memory can be exported.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Mapping
from typing import cast

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import optimizer
from torch import nn

from pascalvl.export import onnx_op
from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.ops.onnx_text import OPSET

_EXPORTER_OPSET = 18
"""The oldest that torch's exporter writes."""
_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of a graph, the model's tensor ``source``."""

    source: str
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass
class TracedGraph:
    """A graph without weight data: ``proto`` lists the weights among its inputs, ``weights`` says what they are."""

    proto: onnx.ModelProto
    weights: dict[str, Weight]


def example_inputs(bindings: list[Binding], sizes: Mapping[str, int]) -> list[torch.Tensor]:
    """Meta tensors for tracing, one a binding, with the varying dimensions set to ``sizes``."""
    types = {"float32": torch.float32, "int32": torch.int32}
    return [
        torch.empty([d if isinstance(d, int) else sizes[d] for d in b.shape], dtype=types[b.dtype.name], device="meta")
        for b in bindings
    ]


def trace(
    module: nn.Module,
    arguments: Mapping[str, torch.Tensor | list[torch.Tensor]],
    dynamic_shapes: Mapping[str, object],
    inputs: list[Binding],
    outputs: list[Binding],
    marks: list[str],
    sources: Mapping[str, str],
) -> TracedGraph:
    """Trace ``module`` and lower it to opset 17.

    Args:
        module: on the meta device.
        arguments: example arguments by name, and their ``dynamic_shapes`` as `torch.export.export` takes them.
        inputs, outputs: bindings in the module's order; they name the graph's.
        marks: names for the module's further outputs, which stay inside the graph (for bisection).
        sources: the model's name of each of the module's parameters.
    """
    model = _trace(module, arguments, dynamic_shapes)
    graph = model.graph
    weights = {}
    for name, value in list(graph.initializers.items()):
        if name in sources:
            shape, dtype = cast(ir.Shape, value.shape).numpy(), cast(ir.DataType, value.dtype).numpy()
            weights[name] = Weight(sources[name], tuple(shape), dtype)
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)
    optimizer.optimize(model)
    _make_reshape_targets_constant(graph)
    _clip_to_int32(graph)
    RemoveUnusedNodesPass()(model)

    for value, binding in zip(graph.inputs, inputs, strict=False):
        value.name, value.shape = binding.name, ir.Shape(binding.shape)
    for value, binding in zip(graph.outputs, outputs, strict=False):
        value.name, value.shape = binding.name, ir.Shape(binding.shape)
    marked_shapes = {}
    for value, mark in zip(graph.outputs[len(outputs) :], marks, strict=True):
        value.name = mark
        marked_shapes[mark] = [size if isinstance(size, int) else size.value for size in cast(ir.Shape, value.shape)]
    del graph.outputs[len(outputs) :]

    proto = onnx.version_converter.convert_version(ir.to_proto(model), OPSET)
    proto.ir_version = onnx_op.IR_VERSION
    proto.producer_name, proto.producer_version = "pascalvl", ""
    _use_old_attribute_forms(proto.graph)
    _declare_weights(proto.graph, weights)
    onnx_op.add_bodies(proto)
    known = {value.name for value in proto.graph.value_info}
    proto.graph.value_info.extend(
        onnx.helper.make_tensor_value_info(mark, onnx.TensorProto.FLOAT, shape)
        for mark, shape in marked_shapes.items()
        if mark not in known
    )
    return TracedGraph(proto, weights)


def _trace(module: nn.Module, arguments: Mapping[str, object], dynamic_shapes: Mapping[str, object]) -> ir.Model:
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module.eval(),
                (),
                kwargs=dict(arguments),
                dynamic_shapes=dict(dynamic_shapes),
                custom_translation_table={
                    torch.ops.pascalvl.flash_attention_2.default: onnx_op.translate,
                    torch.ops.pascalvl.quant_linear.default: onnx_op.translate_linear,
                },
                dynamo=True,
                opset_version=_EXPORTER_OPSET,
                # Both would read the weights: optimisation is done once they are plain inputs.
                optimize=False,
                verify=False,
                verbose=False,
            )
            return cast(torch.onnx.ONNXProgram, program).model
    finally:
        exporter_log.setLevel(level)


def _make_reshape_targets_constant(graph: ir.Graph) -> None:
    """Write reshape targets as numbers, 0 for a size that stays on its axis and -1 for one other that varies.

    The exporter puts them together of Shape nodes with ``start`` and ``end``, which TensorRT's importers up to 9.3
    ignore: they take the whole shape.
    """
    for node in graph:
        if node.op_type != "Reshape":
            continue
        before, after = (cast(ir.Shape, cast(ir.Value, value).shape) for value in (node.inputs[0], node.outputs[0]))
        target = [
            size if isinstance(size, int) else 0 if axis < len(before) and size == before[axis] else -1
            for axis, size in enumerate(after)
        ]
        if target.count(-1) > 1:
            raise NotImplementedError(f"a reshape from {before} to {after}")
        name = "shape_" + "_".join(map(str, target)).replace("-1", "rest")
        if name not in graph.initializers:
            constant = ir.tensor(np.array(target, np.int64), name=name)
            graph.register_initializer(ir.Value(name=name, const_value=constant))
        node.replace_input_with(1, graph.initializers[name])
        node.attributes.pop("allowzero", None)


def _clip_to_int32(graph: ir.Graph) -> None:
    """Bring constants into the range of int32, as which TensorRT reads int64; ends of slices exceed it."""
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.INT64:
            clipped = np.clip(cast(ir.TensorProtocol, value.const_value).numpy(), _INT32.min, _INT32.max)
            value.const_value = ir.tensor(clipped, name=value.name)


def _use_old_attribute_forms(graph: onnx.GraphProto) -> None:
    """Take out what the version converter leaves of opset 18."""
    for node in graph.node:
        for attribute in [attribute for attribute in node.attribute if attribute.name == "noop_with_empty_axes"]:
            node.attribute.remove(attribute)


def _declare_weights(graph: onnx.GraphProto, weights: dict[str, Weight]) -> None:
    """Let a graph's inputs end with those weights that it uses, the others of which are forgotten."""
    used = {name for node in graph.node for name in node.input}
    for name in [name for name in weights if name not in used]:
        del weights[name]
    others = [value for value in graph.input if value.name in used and value.name not in weights]
    del graph.input[:]
    graph.input.extend(others)
    graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(weight.dtype), weight.shape)
        for name, weight in weights.items()
    )
