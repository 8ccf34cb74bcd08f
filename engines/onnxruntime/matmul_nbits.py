"""QuantLinear as ONNX Runtime's own MatMulNBits, which rounds inputs to int8 by group too and keeps weights in codes.

Codes lie there as unsigned bytes, or two in a byte, those of a group together; scales are float32. Weights in halves
become float16 tensors again, which it widens once, when it loads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, parser

from pascalvl.plugins.ops.quant_linear.onnx_body import LinearBody, product_of_floats
from pascalvl.plugins.ops.quant_linear.op import (
    ATTR_BITS,
    ATTR_GROUP,
    ATTR_IN_FEATURES,
    ATTR_OUT_FEATURES,
    OP_NAME,
    OP_VERSION,
)
from pascalvl.plugins.weight_format import WeightFormat
from pascalvl.plugins.weight_rows import QuantisedWeight

_DOMAIN = "com.microsoft"
_INT8_INPUTS = 4
"""Of MatMulNBits' accuracy levels."""
_ALIGNMENT = 4096


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A node's initializers, by the names of its inputs, and what is in them."""

    names: Mapping[str, str]
    in_features: int
    form: WeightFormat

    def arrays(self, read: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
        """What ONNX Runtime takes in their place, by their own names."""
        if not self.form.is_quantised:
            return {self.names["weight"]: read(self.names["weight"]).view(np.float16)}
        packed = {name: read(self.names[name]) for name in ("weight", "scale", "zero") if name in self.names}
        weight = QuantisedWeight.unpacked(packed, self.in_features, self.form)
        arrays = {"weight": self._unsigned(weight.codes).reshape(len(weight.codes), weight.scale.shape[1], -1)}
        arrays["scale"] = np.ascontiguousarray(weight.scale, np.float32)
        if weight.zero is not None:
            arrays["zero"] = self._unsigned(weight.zero.astype(np.int8))
        return {self.names[name]: array for name, array in arrays.items()}

    def _unsigned(self, codes: np.ndarray) -> np.ndarray:
        """Rows of codes in bytes."""
        if self.form.bits == 8:
            return codes.view(np.uint8) ^ np.uint8(128)
        codes = (codes + 8).view(np.uint8)
        if codes.shape[1] % 2:
            codes = np.pad(codes, ((0, 0), (0, 1)))
        return codes[:, ::2] | codes[:, 1::2] << 4


def lower(proto: onnx.ModelProto, data: Path, to: Path) -> None:
    """Make a graph's linear layers those of ONNX Runtime, and write its weights, from ``data``, to ``to``."""
    layers, bodies = [], {}
    for node, body, layer in _layers(proto):
        layers.append(layer)
        node.domain = f"{body.domain}.onnxruntime"
        bodies[node.domain] = body
    for domain, body in bodies.items():
        proto.functions.append(parser.parse_function(_function(domain, body)))
        proto.opset_import.append(helper.make_opsetid(domain, int(OP_VERSION)))
    if _DOMAIN not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
    _write(proto, layers, data, to)


def _layers(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, LinearBody, _Layer]]:
    """Nodes of linear layers whose weight ONNX Runtime takes in another form: floats of 32 bits are its own."""
    for node in proto.graph.node:
        if node.op_type != OP_NAME:
            continue
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if attributes[ATTR_BITS] == 32:
            continue
        body = LinearBody.of(attributes)
        names = dict(zip(body.inputs, node.input, strict=True))
        form = WeightFormat(body.bits, attributes[ATTR_GROUP])
        yield node, body, _Layer(names, attributes[ATTR_IN_FEATURES], form)


def _function(domain: str, body: LinearBody) -> str:
    if body.bits == 16:
        return body.function([f"wide = Cast <to = {TensorProto.FLOAT}> (weight)", *product_of_floats("wide")], domain)
    sizes = f"K : int = @{ATTR_IN_FEATURES}, N : int = @{ATTR_OUT_FEATURES}, bits : int = @{ATTR_BITS}"
    operands = ", ".join(["x2", "weight", "scale", *["zero"] * body.has_zero])
    product = (
        f"product = {_DOMAIN}.MatMulNBits <{sizes}, block_size : int = @{ATTR_GROUP}, "
        f"accuracy_level : int = {_INT8_INPUTS}> ({operands})"
    )
    return body.function([product], domain, f', "{_DOMAIN}" : 1')


def _write(proto: onnx.ModelProto, layers: list[_Layer], data: Path, to: Path) -> None:
    """Write all weights anew, one layer at a time."""
    layer_of = {layer.names[n]: layer for layer in layers for n in ("weight", "scale", "zero") if n in layer.names}
    tensors = {t.name: t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL}

    def read(name: str) -> np.ndarray:
        tensor = tensors[name]
        offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
        return np.memmap(data, helper.tensor_dtype_to_np_dtype(tensor.data_type), "r", offset, tuple(tensor.dims))

    written: set[str] = set()
    with to.open("wb") as file:
        for name in tensors:
            if name in written:
                continue
            arrays = layer_of[name].arrays(read) if name in layer_of else {name: read(name)}
            for of, array in arrays.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                place = {"location": to.name, "offset": file.tell(), "length": array.nbytes}
                file.write(np.ascontiguousarray(array).data)
                tensor = tensors[of]
                del tensor.external_data[:]
                for key, value in place.items():
                    tensor.external_data.add(key=key, value=str(value))
                tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
                tensor.dims[:] = array.shape
            written.update(arrays)
