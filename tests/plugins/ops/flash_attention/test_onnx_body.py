"""The ONNX function bodies against the op's definition in float64."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from pascalvl.export.onnx_op import IR_VERSION
from pascalvl.plugins.kv_format import KVFormat, LayerLayout
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody, packed_body
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.ops.onnx_text import OPSET
from tests.plugins.ops.flash_attention import reference
from tests.plugins.ops.flash_attention.reference import CausalCase, causal_case, packed_case

# float32 dot products of up to 128 terms of size one, a softmax, and sums of some ten rows: a few units in the last
# place, of values up to 4. Between ways to cut a prompt likewise: only the order of sums differs.
TOLERANCE = 4e-6
CAPACITY = 11
LAYOUTS = [
    LayerLayout(kv_format, 2, *dims)
    for kv_format in KVFormat
    for dims in ((128, 128), (128, 96), (64, 64), *[(128, 112)] * (kv_format is KVFormat.K8V4))
]
BODIES = [
    *(CausalBody(kv_format) for kv_format in KVFormat),
    *(CausalBody(kv_format, is_rotated=True) for kv_format in KVFormat if kv_format.is_quantised),
]
Host = Callable[[onnx.ModelProto, dict[str, np.ndarray]], list[np.ndarray]]


def onnx_runtime(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return _session(model.SerializeToString(deterministic=True)).run(None, feeds)


@functools.cache
def _session(model: bytes) -> ort.InferenceSession:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def evaluator(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(model).run(None, feeds)


def run_node(
    text: str, feeds: dict[str, np.ndarray], outputs: Sequence[str], host: Host = onnx_runtime, **attributes: object
) -> dict[str, np.ndarray]:
    """Run a model that is the one node, with its body as a local function."""
    body = onnx.parser.parse_function(text)
    types = {"float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    floats = {"output", *(["new_key", "new_value"] if body.domain == OP_DOMAIN else [])}
    ranks = {"output": feeds["qkv"].ndim, "new_key": 4, "new_value": 4, "new_scale": 3}
    graph = helper.make_graph(
        [helper.make_node(OP_NAME, list(feeds), outputs, domain=body.domain, **attributes)],
        "node",
        [helper.make_tensor_value_info(n, types[x.dtype.name], [None] * x.ndim) for n, x in feeds.items()],
        [
            helper.make_tensor_value_info(n, types["float32" if n in floats else "int32"], [None] * ranks[n])
            for n in outputs
        ],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(body.domain, int(OP_VERSION))]
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return dict(zip(outputs, host(model, feeds), strict=True))


def run_causal(case: CausalCase, host: Host = onnx_runtime) -> dict[str, np.ndarray]:
    body = CausalBody.of(case.layout)
    assert list(case.arrays) == body.inputs
    return run_node(body.text, dict(case.arrays), body.outputs, host, **case.attributes)


def floats_of(case: CausalCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values in float32, to the bit as the body computes them: the rows of a cache in f32."""
    a, layout = case.arrays, dataclasses.replace(case.layout, kv_format=KVFormat.F32)
    floats = {name: x for name, x in a.items() if name != "past_scale"}
    floats["past_length"] = np.zeros_like(a["past_length"])

    def rows(qkv: np.ndarray, heads: int, **changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        past = {
            f"past_{name}": np.zeros((len(qkv), heads, 1, dim), np.float32)
            for name, dim in zip(("key", "value"), layout.dims, strict=True)
        }
        heads_of = dataclasses.replace(layout, num_kv_heads=heads)
        found = run_causal(CausalCase(heads_of, heads, {**floats, **past, **changes, "qkv": qkv}))
        return found["new_key"], found["new_value"]

    width = case.num_heads * layout.head_dim
    queries, rest = np.split(a["qkv"], [width], axis=-1)
    no_values = np.zeros((*queries.shape[:2], case.num_heads * layout.value_dim), np.float32)
    q, _ = rows(np.concatenate([queries, queries, no_values], -1), case.num_heads, k_norm=a["q_norm"])
    keys = rest[..., : layout.num_kv_heads * layout.head_dim]
    k, v = rows(np.concatenate([keys, rest], -1), layout.num_kv_heads)
    return q, k, v


def matches(found: dict[str, np.ndarray], case: CausalCase) -> None:
    """The rows to the bit, and the output, as of the body's own floats."""
    q, k, v = floats_of(case)
    for name, x in zip("qkv", reference.prologue(case), strict=True):
        np.testing.assert_allclose({"q": q, "k": k, "v": v}[name], x, atol=TOLERANCE, err_msg=name)
    rows = reference.new_rows(case, k, v)
    assert found.keys() == {"output", *rows}
    for name, expected in rows.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name].view(np.int32), expected.view(np.int32), err_msg=name)
    output = reference.causal_output(case, reference.met_queries(case, q), rows)
    np.testing.assert_allclose(found["output"], output, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("seq", "past_length", "visible"),
    [(1, [0, 0], "all"), (1, [9, 7], "some"), (3, [11, 0], "all"), (3, [9, 7], "some")],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
def test_causal_matches_float64(layout, seq, past_length, visible):
    case = causal_case(layout, seq, past_length, CAPACITY, visible=visible)
    matches(run_causal(case), case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
def test_onnxs_own_evaluator_gives_the_same(layout):
    case = causal_case(layout, 2, [4, 5], CAPACITY, num_heads=2)
    found, expected = run_causal(case, evaluator), run_causal(case)
    for name, x in expected.items():
        if x.dtype == np.float32:
            np.testing.assert_allclose(found[name], x, atol=TOLERANCE, err_msg=name)
        else:
            # A mean by another order of sums: few codes, if any, lie so near the middle of two that they change.
            assert (found[name] != x).mean() < 0.02, name


@pytest.mark.parametrize("value", [0.0, 1e-9, 3e-4, 1e7, np.inf])
@pytest.mark.parametrize("kv_format", [KVFormat.F16, KVFormat.K8V8, KVFormat.K8V4])
def test_values_at_the_ends_of_the_halves(kv_format, value):
    """Subnormal scales, and what is stored as 0 or infinity, to the bit, of either sign; a row too large is none."""
    layout = LayerLayout(kv_format, 1, 64, 64)
    case = causal_case(layout, 2, [0], 1, num_heads=1)
    values = value * np.where(np.arange(64) % 3, 1, -1).astype(np.float32)
    case.arrays["qkv"][..., 128:] = values
    case.arrays["qkv"][:, 1, 128:] *= -1
    found = run_causal(case)
    expected = reference.new_rows(case, floats_of(case)[1], case.arrays["qkv"][:, None, :, 128:])
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 5], [2, 6, 1]], ids=str)
def test_a_prompt_in_chunks_is_the_prompt_in_one_call(layout, chunks):
    """After a past: new rows equal to the bit, outputs up to the order of sums."""
    whole = causal_case(layout, sum(chunks), [3, 0], 12)
    expected = run_causal(whole)
    arrays = {name: x.copy() for name, x in whole.arrays.items()}
    parts, done = [], 0
    for size in chunks:
        tokens = slice(done, done + size)
        per_token = {name: np.ascontiguousarray(arrays[name][:, tokens]) for name in ("qkv", "rope_cos", "rope_sin")}
        found = run_causal(CausalCase(layout, whole.num_heads, {**arrays, **per_token}))
        parts.append(found)
        for name in (name for name in found if name != "output"):
            cache = arrays[name.replace("new", "past")]
            for b, length in enumerate(arrays["past_length"]):
                cache[b, :, length : length + size] = found[name][b]
        arrays["past_length"] = arrays["past_length"] + np.int32(size)
        done += size
    for name, x in expected.items():
        found = np.concatenate([part[name] for part in parts], 1 if name == "output" else 2)
        if name == "output":
            np.testing.assert_allclose(found, x, atol=TOLERANCE)
        else:
            np.testing.assert_array_equal(found, x, err_msg=name)


@pytest.mark.parametrize("host", [onnx_runtime, evaluator])
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 9, 12]], ids=str)
def test_packed_matches_float64(cu_seqlens, head_dim, host):
    case = packed_case(cu_seqlens, head_dim)
    found = run_node(packed_body(), dict(case.arrays), ["output"], host, **case.attributes)
    np.testing.assert_allclose(found["output"], reference.packed(case), atol=TOLERANCE)


def test_bodies_use_standard_operators_of_the_opset_alone():
    for body in map(onnx.parser.parse_function, [packed_body(), *(body.text for body in BODIES)]):
        assert [(o.domain, o.version) for o in body.opset_import] == [("", OPSET)]
        for node in body.node:
            assert node.domain == ""
            assert onnx.defs.has(node.op_type, OPSET)


def test_each_body_has_a_domain_of_its_own():
    assert {CausalBody.of(layout) for layout in LAYOUTS} == set(BODIES)
    domains = {body: body.domain for body in BODIES}
    assert len(set(domains.values())) == len(domains)
    assert domains[CausalBody()] == OP_DOMAIN
    assert all(domain.startswith(OP_DOMAIN) for domain in domains.values())
