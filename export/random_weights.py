"""Random weights for model bundles, whose speed is that of trained ones: ``python -m pascalvl.export.random_weights``.

A bundle of `pascalvl.export.random_export` holds graphs that say of each weight its name, type and shape, and by their
QuantLinear nodes which are codes and which scales. From a name's hash follow its numbers, the same on every machine: so
a bundle can be carried without its weights and embeddings, some MB of gigabytes, and this module, which needs NumPy and
onnx alone, makes them again where it is to run.

Weights have the standard deviation that Qwen3-VL is initialised with, norms are one and biases zero: activations stay
ordinary numbers through all layers.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx.external_data_helper import ExternalDataInfo

from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest, table_shapes
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.quant_linear.op import ATTR_BITS, ATTR_IN_FEATURES, OP_NAME

STANDARD_DEVIATION = 0.02
"""`initializer_range` of the published configs."""
SOURCE = "random weights"
"""What the names of such bundles' sources end with."""
_BLOCK_BYTES = 64 << 20
_GRAPHS = bindings.VISION, bindings.DECODER

_Draw = Callable[[np.ndarray], np.ndarray]
"""Makes of random bytes ``[rows, n]`` the bytes of a weight's rows, of any type but as many."""


def write_weights(directory: Path, model: ModelConfig) -> None:
    """Write what a bundle lacks of its graphs' weights, and of the model's tables of embeddings, in bfloat16."""
    for graph in _GRAPHS:
        path = directory / f"{graph}.onnx"
        _write_missing(path.with_name(f"{path.name}.data"), _graph_weights(path))
    for name, shape in table_shapes(model).items():
        _write_missing(directory / name, ((0, block) for block in _drawn(name, shape, 2, _bfloats)))


def _write_missing(path: Path, blocks: Iterator[tuple[int, np.ndarray]]) -> None:
    """Write a file of blocks, each behind the last, with zeros between where its weight begins later."""
    if path.exists():
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for offset, block in blocks:
                file.write(bytes(max(0, offset - file.tell())))
                file.write(block.data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _graph_weights(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """A graph's weights in blocks, each with its weight's place in the file."""
    proto = onnx.load(path, load_external_data=False)
    in_nodes = _quantised(proto)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            name, itemsize = tensor.doc_string, onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            draw = in_nodes.get(tensor.name) or _of_name(name, len(tensor.dims))
            for block in _drawn(name, tensor.dims, itemsize, draw):
                yield cast(int, ExternalDataInfo(tensor).offset), block


def _quantised(proto: onnx.ModelProto) -> dict[str, _Draw]:
    """How linear layers' weights and scales are drawn, by the names of initializers."""
    draws: dict[str, _Draw] = {}
    for node in proto.graph.node:
        if node.op_type == OP_NAME:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            bits, in_features = attributes[ATTR_BITS], attributes[ATTR_IN_FEATURES]
            draws[node.input[1]] = functools.partial(_packed, bits=bits, in_features=in_features)
            if bits < 16:
                draws[node.input[2]] = functools.partial(_scales, bits=bits)
    return draws


def _of_name(name: str, dims: int) -> _Draw:
    """How a float32 weight is drawn: only norms and biases have one dimension."""
    if dims > 1:
        return _floats
    value = np.float32(1 if name.endswith(".weight") else 0)
    return lambda raw: np.full(raw.size // value.itemsize, value)


def _drawn(name: str, shape: Sequence[int], itemsize: int, draw: _Draw) -> Iterator[np.ndarray]:
    """A weight's rows, block by block."""
    random = np.random.SFC64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    row = math.prod(shape[1:]) * itemsize
    step = max(1, _BLOCK_BYTES // row)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        raw = random.random_raw(-(-rows * row // 8)).view(np.uint8)[: rows * row]
        yield draw(raw.reshape(rows, row))


def _uniform(integers: np.ndarray) -> np.ndarray:
    """Float32 of `STANDARD_DEVIATION`, of signed integers of all their type's range."""
    return integers.astype(np.float32) * np.float32(STANDARD_DEVIATION * 3**0.5 / 2 ** (8 * integers.itemsize - 1))


def _floats(raw: np.ndarray) -> np.ndarray:
    return _uniform(raw.view(np.int32))


def _bfloats(raw: np.ndarray) -> np.ndarray:
    return (_uniform(raw.view(np.int16)).view(np.uint32) >> 16).astype(np.uint16)


def _packed(raw: np.ndarray, bits: int, in_features: int) -> np.ndarray:
    """Codes of both signs alike, which are the odd ones, or floats; zeros beyond the inputs."""
    if bits < 16:
        rows = raw | (1 if bits == 8 else 0x11)
    else:
        rows = (_floats(raw) if bits == 32 else _uniform(raw.view(np.int16)).astype(np.float16)).view(np.uint8)
    rows[:, in_features * bits // 8 :] = 0
    return rows


def _scales(raw: np.ndarray, bits: int) -> np.ndarray:
    """Halves, from half to one and a half of what gives codes the standard deviation."""
    of_codes = ((4 ** (bits - 1) - 1) / 3) ** 0.5
    factor = raw.view(np.uint16).astype(np.float32) / 65536 + np.float32(0.5)
    return (factor * np.float32(STANDARD_DEVIATION / of_codes)).astype(np.float16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the weights again that a bundle was carried without.")
    parser.add_argument("bundle", type=Path, help="folder written by 'pascalvl export --random'")
    bundle = parser.parse_args(arguments).bundle
    try:
        manifest = Manifest.read(bundle, "model")
        if not manifest.source["name"].endswith(SOURCE):
            raise UserError(f"{bundle} is of {manifest.source['name']}: expected one of 'pascalvl export --random'.")
        write_weights(bundle, manifest.model)
        manifest.verify(bundle)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
