"""An exported graph as a plan. Needs onnx, which the runtime does without."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import onnx

from pascalvl.engines.cuda.plan import Matrix, Node, Plan, laid_out
from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.ops.quant_linear.onnx_body import LinearBody

_TABLES = ("rope_cos", "rope_sin", "cu_seqlens")
_CAUSAL_INPUTS = (
    *("qkv", "q_norm", "k_norm", *_TABLES),
    *("past_length", "page_table", "past_visible", "past_key", "past_value", "past_scale"),
)
_CAUSAL_OUTPUTS = ("out", "new_key", "new_value", "new_scale")


def lower(graph: onnx.ModelProto, inputs: list[Binding], outputs: list[Binding]) -> Plan:
    """Turn an exported graph, whose weights need not be loaded, into a plan.

    Args:
        graph: of nodes of the two ops, and of views, additions and gathers of rows between them.
        inputs: what is given to it, as `bindings` tells.
        outputs: what it gives.

    Raises:
        ValueError: a node that is none of these.
    """
    return _Lowering(graph, inputs, outputs).plan()


class _Lowering:
    def __init__(self, graph: onnx.ModelProto, inputs: list[Binding], outputs: list[Binding]) -> None:
        self._graph = graph.graph
        self._dimension = str(inputs[0].shape[0])
        self._given = {binding.name for binding in (*inputs, *outputs)}
        self._weights, self._constants = {}, {}
        for tensor in self._graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                places = {entry.key: entry.value for entry in tensor.external_data}
                self._weights[tensor.name] = int(places["offset"])
            else:
                self._constants[tensor.name] = onnx.numpy_helper.to_array(tensor)
        self._matrices: dict[str, Matrix] = {}
        for binding in inputs:
            if binding.dtype == np.float32 and len(binding.shape) == 2:
                self._matrices[binding.name] = Matrix(str(binding.shape[0]), 1, int(binding.shape[1]))
        self._stacks = {b.name: Matrix(str(b.shape[1]), 1, int(b.shape[2])) for b in inputs if len(b.shape) == 3}
        """Tensors ``[n, rows, width]``, of which parts are read."""
        self._same: dict[str, str] = {}
        """By the name of a view: the tensor that lies there."""
        self._nodes: list[Node] = []
        self._readers = Counter(name for node in self._graph.node for name in node.input)

    def plan(self) -> Plan:
        for node in self._graph.node:
            lowering = getattr(self, f"_{node.op_type.lower()}", None)
            if lowering is None:
                raise ValueError(f"there is no kernel for a node {node.op_type} ({node.name or node.output[0]})")
            lowering(node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
        nodes = [dataclasses.replace(n, tensors={k: self._place(v) for k, v in n.tensors.items()}) for n in self._nodes]
        used = {name for node in nodes for name in node.tensors.values()}
        matrices = {name: matrix for name, matrix in self._matrices.items() if name in used}
        between = [name for name, matrix in matrices.items() if name not in self._given and not matrix.part_of]
        lives = {name: [i for i, node in enumerate(nodes) if name in node.tensors.values()] for name in between}
        offsets, unit = laid_out(
            [matrices[name].unit for name in between], [(lives[name][0], lives[name][-1]) for name in between]
        )
        for name, offset in zip(between, offsets, strict=True):
            matrices[name] = dataclasses.replace(matrices[name], offset=offset)
        weights = {name: offset for name, offset in self._weights.items() if name in used}
        return Plan(self._dimension, unit, nodes, matrices, weights)

    def _place(self, name: str) -> str:
        while name in self._same:
            name = self._same[name]
        return name

    def _quantlinear(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        tensors = dict(zip(LinearBody.of(attributes).inputs, node.input, strict=True))
        x, width = self._matrices[tensors["x"]], attributes[quant_linear.ATTR_OUT_FEATURES]
        if attributes[quant_linear.ATTR_ACTIVATION] == quant_linear.Activation.SILU_GATED:
            width //= 2
        kept = [name for name in attributes if not name.startswith("has_")]
        self._matrices[node.output[0]] = Matrix(x.dimension, x.per_row, width)
        self._nodes.append(
            Node("linear", {**tensors, "out": node.output[0]}, {name: attributes[name] for name in kept})
        )

    def _flashattention2(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        is_causal = attributes[flash_attention.ATTR_CAUSAL]
        names = _CAUSAL_INPUTS if is_causal else ("qkv", *_TABLES)
        tensors = dict(zip(names, node.input, strict=False)) | dict(zip(_CAUSAL_OUTPUTS, node.output, strict=False))
        qkv = self._matrices[tensors["qkv"]]
        width = attributes[flash_attention.ATTR_NUM_HEADS] * attributes[flash_attention.ATTR_VALUE_DIM]
        self._matrices[tensors["out"]] = Matrix(qkv.dimension, qkv.per_row, width)
        values = {name: v.decode() if isinstance(v, bytes) else v for name, v in attributes.items()}
        self._nodes.append(Node("attention", tensors, values))

    def _reshape(self, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        data, (lead, width) = node.input[0], self._constants[node.input[1]].tolist()
        matrix = self._matrices[data]
        if lead != -1 or width * matrix.per_row % matrix.width:
            raise ValueError(f"there is no way to take {data}'s rows of {matrix.width} as rows of {width}")
        per_row = matrix.per_row * width // matrix.width
        self._matrices[node.output[0]] = dataclasses.replace(matrix, per_row=per_row, width=width)
        self._same[node.output[0]] = data

    def _unsqueeze(self, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        self._same[node.output[0]] = node.input[0]

    def _concat(self, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        """One level behind the other: who makes a level writes it there."""
        for number, name in enumerate(node.input):
            level = self._place(name)
            self._matrices[level] = dataclasses.replace(self._matrices[level], part_of=(node.output[0], number))

    def _gather(self, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        data, index = node.input
        if data in self._stacks:
            part = dataclasses.replace(self._stacks[data], part_of=(data, int(self._constants[index])))
            self._matrices[node.output[0]] = part
        else:
            self._matrices[node.output[0]] = Matrix("rows", 1, self._matrices[data].width)
            self._nodes.append(Node("gather_rows", {"matrix": data, "rows": index, "out": node.output[0]}))

    def _add(self, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        """In place: who makes the first writes it to where the sum will be."""
        x, y = node.input
        if self._readers[x] > 1 or x in self._given:
            raise ValueError(f"there is no addition to {x}, which others read")
        self._matrices[node.output[0]] = self._matrices.pop(x)
        self._same[x] = node.output[0]
        self._nodes.append(Node("add_to", {"x": node.output[0], "y": y}))
