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
from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, LayerLayout
from pascalvl.plugins.ops.flash_attention.onnx_body import CausalBody, packed_body
from pascalvl.plugins.ops.flash_attention.op import OP_DOMAIN, OP_NAME, OP_VERSION
from pascalvl.plugins.ops.onnx_text import OPSET
from tests.plugins.ops.flash_attention import reference
from tests.plugins.ops.flash_attention.reference import CausalCase, causal_case, packed_case

# float32 dot products of up to 128 terms of size one, a softmax, and means of up to some hundred rows: a few units in
# the last place, of values up to 4. Between ways to cut a prompt likewise: only the order of sums differs.
TOLERANCE = 4e-6
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
    ranks = {"output": 2, "new_key": 3, "new_value": 3, "new_scale": 2}
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
    floats["page_table"] = np.zeros((len(a["past_length"]), 1), np.int32)

    def rows(qkv: np.ndarray, heads: int, **changes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        past = {
            f"past_{name}": np.zeros((1, heads, PAGE_SLOTS, dim), np.float32)
            for name, dim in zip(("key", "value"), layout.dims, strict=True)
        }
        heads_of = dataclasses.replace(layout, num_kv_heads=heads)
        found = run_causal(CausalCase(heads_of, heads, {**floats, **past, **changes, "qkv": qkv}))
        return found["new_key"], found["new_value"]

    width = case.num_heads * layout.head_dim
    queries, rest = np.split(a["qkv"], [width], axis=-1)
    no_values = np.zeros((len(queries), case.num_heads * layout.value_dim), np.float32)
    q, _ = rows(np.concatenate([queries, queries, no_values], -1), case.num_heads, k_norm=a["q_norm"])
    keys = rest[..., : layout.num_kv_heads * layout.head_dim]
    k, v = rows(np.concatenate([keys, rest], -1), layout.num_kv_heads)
    return q, k, v


def matches(found: dict[str, np.ndarray], case: CausalCase) -> None:
    """The rows to the bit, and the output, as of the body's own floats; numbers of padding."""
    q, k, v = floats_of(case)
    for name, x in zip("qkv", reference.prologue(case), strict=True):
        np.testing.assert_allclose({"q": q, "k": k, "v": v}[name], x, atol=TOLERANCE, err_msg=name)
    rows = reference.new_rows(case, k, v)
    assert found.keys() == {"output", *rows}
    for name, expected in rows.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name].view(np.int32), expected.view(np.int32), err_msg=name)
    output = reference.causal_output(case, reference.met_queries(case, q), rows)
    np.testing.assert_allclose(found["output"][: case.tokens], output[: case.tokens], atol=TOLERANCE)
    assert found["output"].shape == output.shape
    assert np.isfinite(found["output"]).all()


CALLS = {
    "decode": ([1, 1, 1], [0, 9, 140], {}),
    "at-page-borders": ([1, 1, 1, 1], [127, 128, 129, 256], {}),
    "no-past": ([4, 1], [0, 0], {}),
    "one-sequence": ([3], [129], {}),
    "window": ([3], [129], {"visible": "some"}),
    "windows": ([2, 5, 1], [128, 7, 200], {"visible": "some"}),
    "some-without-tokens": ([0, 3, 0, 1, 0], [3, 130, 0, 9, 5], {"padding": 3}),
    "padding-of-a-decode-step": ([1, 1, 0, 0], [5, 127, 0, 130], {"padding": 2}),
    "shared-page": ([2, 1, 4], [128, 131, 300], {"shared": True}),
    "shared-page-seen-in-part": ([2, 3], [90, 60], {"shared": True, "visible": "some", "padding": 1}),
}
"""New tokens, pasts, and what else is special."""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
def test_causal_matches_float64(layout, call):
    new, past_length, options = call
    case = causal_case(layout, new, past_length, **options)
    matches(run_causal(case), case)


@pytest.mark.parametrize("kv_format", [KVFormat.F32, KVFormat.K8V4])
def test_all_is_padding(kv_format):
    case = causal_case(LayerLayout(kv_format, 2, 128, 128), [0, 0], [0, 130], padding=3)
    matches(run_causal(case), case)


@pytest.mark.parametrize("kv_format", [KVFormat.F32, KVFormat.F16, KVFormat.K8V4])
def test_a_sequence_without_numbers_and_padding_reach_no_other(kv_format):
    """Tokens, rows of the past and of the new tokens that are no numbers: outputs of others are the same to the bit."""
    case = causal_case(LayerLayout(kv_format, 2, 128, 128), [2, 3, 1], [130, 140, 150], padding=2)
    expected = run_causal(case)
    spoilt = case.arrays
    own, others = case.sequences[1], np.r_[case.sequences[0], case.sequences[2]]
    spoilt["qkv"][own] = spoilt["qkv"][case.tokens :] = np.nan
    for name in ("past_key", "past_value", "past_scale"):
        if name in spoilt:
            spoilt[name][spoilt["page_table"][1]] = np.array(np.nan, np.float32).view(spoilt[name].dtype)
    found = run_causal(case)["output"]
    assert np.isnan(found[own]).all()
    np.testing.assert_array_equal(found[others], expected["output"][others])


def test_pages_beyond_the_longest_past_are_not_read():
    """The cost follows the past and not the capacity: a page that there is not would be refused."""
    case = causal_case(LayerLayout(KVFormat.F32, 2, 64, 64), [1, 2], [128, 5], visible="some")
    expected = run_causal(case)
    case.arrays["page_table"][:, 1:] = 1000
    found = run_causal(case)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    case.arrays["past_length"][0] = 129
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="out of data bounds"):
        run_causal(case)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
def test_onnxs_own_evaluator_gives_the_same(layout):
    case = causal_case(layout, [2, 0, 3], [4, 0, 130], num_heads=2, visible="some", padding=1)
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
    case = causal_case(layout, [2], [0], num_heads=1)
    values = value * np.where(np.arange(64) % 3, 1, -1).astype(np.float32)
    case.arrays["qkv"][..., 128:] = values
    case.arrays["qkv"][1, 128:] *= -1
    found = run_causal(case)
    expected = reference.new_rows(case, floats_of(case)[1], case.arrays["qkv"][None, :, 128:])
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.kv_format.value}-{x.head_dim}-{x.value_dim}")
@pytest.mark.parametrize(
    "chunks",
    [[(1, 1)] * 6 + [(1, 0)] * 3, [(4, 5), (5, 1)], [(0, 6), (2, 0), (7, 0)]],
    ids=["token-by-token", "together", "in-turn"],
)
def test_a_prompt_in_chunks_is_the_prompt_in_one_call(layout, chunks):
    """After a past, over a page's border: new rows equal to the bit, outputs up to the order of sums."""
    whole = causal_case(layout, [9, 6], [123, 0])
    expected = run_causal(whole)
    arrays = dict(whole.arrays)
    done = np.array([each.start for each in whole.sequences])
    for sizes in chunks:
        tokens = np.concatenate([np.arange(start, start + size) for start, size in zip(done, sizes, strict=True)])
        per_token = {name: whole.arrays[name][tokens] for name in ("qkv", "rope_cos", "rope_sin")}
        bounds = np.cumsum([0, *sizes]).astype(np.int32)
        found = run_causal(CausalCase(layout, whole.num_heads, {**arrays, **per_token, "cu_seqlens": bounds}))
        np.testing.assert_allclose(found.pop("output"), expected["output"][tokens], atol=TOLERANCE)
        for name, rows in found.items():
            np.testing.assert_array_equal(rows, expected[name][:, tokens], err_msg=name)
            pool = arrays[name.replace("new", "past")]
            for b, size in enumerate(sizes):
                slots = arrays["past_length"][b] + np.arange(size)
                pages = arrays["page_table"][b, slots // PAGE_SLOTS]
                pool[pages, :, slots % PAGE_SLOTS] = rows[:, bounds[b] : bounds[b + 1]].swapaxes(0, 1)
        arrays["past_length"] = arrays["past_length"] + np.array(sizes, np.int32)
        done += sizes


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
