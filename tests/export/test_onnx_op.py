"""The ONNX function bodies, run by ONNX Runtime, against float64 softmax attention."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from pascalvl.export.onnx_op import IR_VERSION, OPSET, function_body
from pascalvl.plugins.flash_attention import OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.kv_format import KVFormat
from tests.export import reference

TOLERANCE = 2e-6  # as for the torch op


def run_node(feeds: dict[str, np.ndarray], **attributes: object) -> np.ndarray:
    """Run a model that is the one node, with its body as a local function."""
    types = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
    graph = helper.make_graph(
        [helper.make_node(OP_NAME, list(feeds), ["output"], domain=OP_DOMAIN, **attributes)],
        "node",
        [helper.make_tensor_value_info(n, types[x.dtype.name], [None] * x.ndim) for n, x in feeds.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 4)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, int(OP_VERSION))]
    body = function_body(bool(attributes["causal"]))
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("kv_format", list(KVFormat))
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("seq", "past_length"), [(1, [0, 0]), (1, [0, 5]), (7, [9, 0]), (5, [3, 9])])
def test_causal_matches_float64(heads, kv_heads, seq, past_length, kv_format):
    dtype = {KVFormat.F32: torch.float32, KVFormat.F16: torch.float16}[kv_format]
    case = reference.causal_case(heads, kv_heads, seq, past_length, capacity=9, past_dtype=dtype)
    names = ("q", "k", "v", "past_length", "past_key", "past_value")
    feeds = {name: getattr(case, name).numpy() for name in names}
    output = run_node(feeds, causal=1, softmax_scale=case.scale, kv_format=kv_format.value)
    np.testing.assert_allclose(output, case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 9, 12]])
def test_packed_matches_float64(cu_seqlens):
    case = reference.packed_case(cu_seqlens)
    feeds = {name: getattr(case, name).numpy() for name in ("q", "k", "v", "cu_seqlens")}
    output = run_node(feeds, causal=0, softmax_scale=case.scale)
    np.testing.assert_allclose(output, case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("causal", [False, True])
def test_body_uses_standard_operators_of_the_opset_alone(causal):
    body = function_body(causal)
    assert [(o.domain, o.version) for o in body.opset_import] == [("", OPSET)]
    for node in body.node:
        assert node.domain == ""
        assert onnx.defs.has(node.op_type, OPSET)
