"""Each kind of thing that TensorRT 8.6's parser refuses is found and named."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pascalvl.export import conformance
from pascalvl.plugins.errors import UserError

FLOAT, INT64, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.DOUBLE


def model(*nodes, constants=(), dtype=FLOAT, opset=17, ir_version=8, inputs=("x",)):
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, [2, 3]) for name in inputs],
        [helper.make_tensor_value_info("y", dtype, [None, None])],
        [numpy_helper.from_array(np.array(value), name) for name, value in constants],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def test_a_supported_graph_passes():
    conformance.check(model(helper.make_node("ReduceMean", ["x"], ["y"], axes=[1])), "decoder")


@pytest.mark.parametrize(
    ("refused", "phrase"),
    [
        (model(helper.make_node("Relu", ["x"], ["y"]), opset=18), "opset 18, at most 17"),
        (model(helper.make_node("Relu", ["x"], ["y"]), ir_version=10), "IR version 10, at most 8"),
        (model(helper.make_node("BitShift", ["x", "x"], ["y"], name="shift")), "'shift' (BitShift): operator BitShift"),
        (model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")), "com.microsoft.Gelu is not supported"),
        (model(helper.make_node("Other", ["x"], ["y"], domain="pascalvl")), "pascalvl.Other is not supported"),
        (model(helper.make_node("Relu", ["x"], ["y"]), dtype=DOUBLE), "type DOUBLE"),
        (model(helper.make_node("MatMul", ["x", "x"], ["y"]), dtype=INT64), "type INT64"),
        (
            model(helper.make_node("ReduceMean", ["x", "axes"], ["y"]), constants=[("axes", [1])]),
            "axes must be an attribute",
        ),
        (
            model(helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], noop_with_empty_axes=0)),
            "attribute noop_with_empty_axes",
        ),
        (model(helper.make_node("Unsqueeze", ["x", "x"], ["y"])), "axes must be an initializer"),
        (
            model(helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1), constants=[("shape", [3, 2])]),
            "allowzero",
        ),
        (
            model(
                helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"]),
                constants=[("scale", np.float32(1)), ("zero", np.int8(3))],
            ),
            "y_zero_point must be zero",
        ),
        (
            model(
                helper.make_node(
                    "If",
                    ["x"],
                    ["y"],
                    then_branch=onnx.GraphProto(name="then"),
                    else_branch=onnx.GraphProto(name="else"),
                )
            ),
            "operator If is not supported",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_graph_is_named(refused, phrase):
    with pytest.raises(UserError, match=r"the decoder graph does not fit TensorRT 8\.6's parser") as error:
        conformance.check(refused, "decoder")
    assert phrase in str(error.value)
