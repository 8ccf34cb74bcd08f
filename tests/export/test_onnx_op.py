"""The ONNX function bodies, run by ONNX Runtime, against float64 softmax attention."""

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.kv_format import KVFormat, LayerLayout
from pascalvl.plugins.kv_rows import compress, expand, hadamard
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody, packed_body
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.ops.onnx_text import OPSET, half_table, halves
from tests.export import reference

TOLERANCE = 2e-6  # as for the torch op
CAPACITY = 10
SCALE = 0.09
LAYOUTS = [LayerLayout(kv_format, 2, *dims) for kv_format in KVFormat for dims in ((128, 128), (112, 96))]


def run_node(body: onnx.FunctionProto, feeds: dict[str, np.ndarray], **attributes: object) -> np.ndarray:
    """Run a model that is the one node, with its body as a local function."""
    types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    graph = helper.make_graph(
        [helper.make_node(OP_NAME, list(feeds), ["output"], domain=body.domain, **attributes)],
        "node",
        [helper.make_tensor_value_info(n, types[x.dtype.name], [None] * x.ndim) for n, x in feeds.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 4)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(body.domain, int(OP_VERSION))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def causal_feeds(layout: LayerLayout, seq: int, visible: str) -> dict[str, np.ndarray]:
    """Two sequences; what lies beyond their lengths would show if it were read."""
    rng = np.random.default_rng(seq)
    batch, heads = 2, 4 * layout.num_kv_heads

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    past = [draw(batch, layout.num_kv_heads, CAPACITY, dim) for dim in layout.dims]
    past[0][1, :, 7:] = 100
    rotated = layout.is_rotated, False
    rows = [compress(*arguments) for arguments in zip(past, layout.kv_format.rows, rotated, strict=True)]
    feeds = {
        "q": draw(batch, heads, seq, layout.key_dim),
        "k": draw(batch, layout.num_kv_heads, seq, layout.key_dim),
        "v": draw(batch, layout.num_kv_heads, seq, layout.value_dim),
        "past_length": np.array([9, 7] if visible != "nothing" else [0, 0], np.int32),
        "past_visible": np.full((batch, 1), 5, np.int32),
        "past_key": rows[0][0],
        "past_value": rows[1][0],
    }
    if visible == "some":
        feeds["past_visible"] = rng.integers(0, seq + 1, (batch, CAPACITY)).astype(np.int32)
    if layout.kv_format.is_quantised:
        feeds["past_scale"] = np.stack([scale for _, scale in rows]).view(np.int32)
    return feeds


def expected_causal(layout: LayerLayout, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By the op's definition in float64, token by token."""
    q, k, v = (feeds[name].astype(np.float64) for name in "qkv")
    scales = feeds["past_scale"].view(np.float16) if "past_scale" in feeds else [None, None]
    past_k, past_v = (
        expand(feeds[name], scale, row, dim).astype(np.float64)
        for name, scale, row, dim in zip(
            ("past_key", "past_value"), scales, layout.kv_format.rows, layout.dims, strict=True
        )
    )
    past_q = q
    if layout.kv_format.is_quantised:
        turned = hadamard(q) if layout.is_rotated else q
        step = np.abs(turned).max(-1, keepdims=True) / 127
        past_q = np.rint(turned / step) * step
    out = np.zeros((q.shape[0], q.shape[2], q.shape[1], layout.value_dim))
    for b, i, h in np.ndindex(out.shape[:3]):
        kv = h // (q.shape[1] // layout.num_kv_heads)
        slots = np.arange(feeds["past_length"][b])
        slots = slots[i < np.broadcast_to(feeds["past_visible"][b], CAPACITY)[slots]]
        scores = [past_k[b, kv, slots] @ past_q[b, h, i], k[b, kv, : i + 1] @ q[b, h, i]]
        values = [past_v[b, kv, slots], v[b, kv, : i + 1]]
        weights = np.exp(SCALE * np.concatenate(scores))
        out[b, i, h] = weights / weights.sum() @ np.concatenate(values)
    return out


@pytest.mark.parametrize(("seq", "visible"), [(1, "nothing"), (1, "all"), (3, "all"), (3, "some")])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.kv_format.value)
def test_causal_matches_float64(layout, seq, visible):
    feeds = causal_feeds(layout, seq, visible)
    body = CausalBody.of(layout)
    assert list(feeds) == body.inputs
    attributes = {"causal": 1, "softmax_scale": SCALE, "kv_format": layout.kv_format.value}
    output = run_node(onnx.parser.parse_function(body.text), feeds, **attributes)
    np.testing.assert_allclose(output, expected_causal(layout, feeds), atol=2 * TOLERANCE)


def test_halves_are_read_from_words_exactly():
    """All 65,536 of them: signs, subnormal numbers, infinities, and what is no number."""
    words = np.arange(1 << 16, dtype=np.uint16).view(np.int32).reshape(4, -1)
    text = f'<ir_version: {IR_VERSION}, opset_import: ["" : {OPSET}]> graph (int32[n, m] words) => (float[n, k] floats)'
    model = onnx.parser.parse_model("\n".join([text, "{", *half_table(), *halves("words", "floats"), "}"]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"words": words})
    expected = words.view(np.float16)
    np.testing.assert_array_equal(found, expected.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(found[expected == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 9, 12]])
def test_packed_matches_float64(cu_seqlens):
    case = reference.packed_case(cu_seqlens)
    feeds = {name: getattr(case, name).numpy() for name in ("q", "k", "v", "cu_seqlens")}
    output = run_node(onnx.parser.parse_function(packed_body()), feeds, causal=0, softmax_scale=case.scale)
    np.testing.assert_allclose(output, case.expected(), atol=TOLERANCE)


def test_bodies_use_standard_operators_of_the_opset_alone():
    texts = [packed_body(), CausalBody().text, *(CausalBody.of(layout).text for layout in LAYOUTS)]
    for body in map(onnx.parser.parse_function, texts):
        assert [(o.domain, o.version) for o in body.opset_import] == [("", OPSET)]
        for node in body.node:
            assert node.domain == ""
            assert onnx.defs.has(node.op_type, OPSET)


def test_each_body_has_a_domain_of_its_own():
    domains = {body: body.domain for body in map(CausalBody.of, LAYOUTS)}
    assert len(set(domains.values())) == len(domains)
    assert domains[CausalBody()] == OP_DOMAIN
    assert all(domain.startswith(OP_DOMAIN) for domain in domains.values())
