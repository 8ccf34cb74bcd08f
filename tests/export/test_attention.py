"""The torch op against float64 softmax attention, and as a drop-in attention implementation of transformers."""

import contextlib
import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, LayerLayout
from pascalvl.plugins.ops.flash_attention import tiled
from pascalvl.plugins.ops.flash_attention.drop_in import ATTN_IMPLEMENTATION, attention
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.torch_op import flash_attention_2
from tests.export import reference
from tests.plugins.ops.flash_attention import reference as op_reference

# float32 dot products of up to a few hundred terms of size one, and a softmax: a few units in the last place.
TOLERANCE = 2e-6
# Of values up to 4, and with norms and RoPE before.
CACHED_TOLERANCE = 4e-6


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("seq", "past_length"), [(1, [0, 5]), (7, [9, 0]), (5, [3, 9])])
def test_causal_matches_float64(heads, kv_heads, seq, past_length):
    case = reference.causal_case(heads, kv_heads, seq, past_length, capacity=9)
    output = attention(*case.arguments)
    assert output.shape == (2, seq, heads, case.q.shape[-1])
    np.testing.assert_allclose(output.numpy(), case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 9, 12]])
def test_packed_matches_float64(cu_seqlens):
    case = reference.packed_case(cu_seqlens)
    output = attention(*case.arguments)
    np.testing.assert_allclose(output.numpy(), case.expected(), atol=TOLERANCE)


def test_registration_passes_torchs_own_checks():
    case = reference.causal_case(4, 2, 3, [2, 5], capacity=6)
    torch.library.opcheck(torch.ops.pascalvl.attention.default, case.arguments)
    for x in (case.q, case.k, case.v, case.past_key, case.past_value):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.pascalvl.attention.default, case.arguments)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short sequences have several, with borders of queries and keys that do not coincide."""
    monkeypatch.setattr(tiled, "QUERY_TILE", 4)
    monkeypatch.setattr(tiled, "KEY_TILE", 3)


CASES = [
    reference.causal_case(4, 2, 11, [7, 0], capacity=8),
    reference.causal_case(3, 3, 1, [4, 2], capacity=4),
    reference.packed_case([0, 4, 4, 5, 14]),
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_tiles_of_any_head_size_match_float64(case):
    case = reference.sliced(case, 5)
    np.testing.assert_allclose(attention(*case.arguments).numpy(), case.expected(), atol=TOLERANCE)


def test_sequences_of_several_whole_tiles_match_float64():
    case = reference.causal_case(4, 2, 300, [600, 256], capacity=600)
    np.testing.assert_allclose(attention(*case.arguments).numpy(), case.expected(), atol=TOLERANCE)


def test_no_past_equals_an_empty_one():
    case = reference.causal_case(4, 2, 6, [0, 0], capacity=3)
    without = attention(case.q, case.k, case.v, *[None] * 5, True, case.scale)
    assert torch.equal(without, attention(*case.arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32(dtype):
    case = reference.converted(reference.causal_case(4, 2, 9, [5], capacity=5), dtype)
    found = attention(*case.arguments)
    assert found.dtype == dtype
    # The result's own rounding, half a unit in the last place, and float32's.
    np.testing.assert_allclose(found.double(), case.expected(), rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=TOLERANCE)


def test_keys_of_other_tokens_are_refused():
    case = CASES[0]
    with pytest.raises(ValueError, match=r"k and v have q's tokens; found q \[2, 4, 11, 32\], k \[2, 2, 10, 32\]"):
        attention(*dataclasses.replace(case, k=case.k[:, :, 1:]).arguments)


def test_bounds_that_miss_tokens_are_refused():
    case = reference.packed_case([0, 4, 9])
    with pytest.raises(ValueError, match=r"cu_seqlens from 0 to 9; found 1, \[0, 4\]"):
        attention(case.q, case.k, case.v, case.cu_seqlens[:2], *[None] * 4, False, case.scale)


# Gradients ------------------------------------------------------------------------------------------------------------


def differentiable(case, dtype=torch.float32):
    """The case with floating tensors that require gradients, and these by name."""
    case = reference.converted(case, dtype)
    return case, {name: x.requires_grad_() for name, x in case.floats.items()}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    case, leaves = differentiable(reference.sliced(case, 2), torch.float64)

    def op(*tensors):
        return attention(*dataclasses.replace(case, **dict(zip(leaves, tensors, strict=True))).arguments)

    # Its finite differences of 1e-6 in float64 are good to 1e-7 or so; torch's default tolerances are 1e-5 and 1e-3.
    assert torch.autograd.gradcheck(op, tuple(leaves.values()))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("case", CASES)
def test_gradients_match_those_of_dense_float64(case):
    case, leaves = differentiable(case)
    out = attention(*case.arguments)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, list(leaves.values()), grad)
    for (name, expected), tensor in zip(reference.gradients(case, grad).items(), found, strict=True):
        torch.testing.assert_close(tensor.double(), expected, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_second_derivatives_are_refused():
    case, leaves = differentiable(CASES[0])
    (dq,) = torch.autograd.grad(attention(*case.arguments).sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        dq.sum().backward()


def test_no_tensor_grows_faster_than_the_length():
    seq, heads, dim = 2048, 2, 8
    q, k, v = (torch.randn(1, heads, seq, dim, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        attention(q, k, v, *[None] * 5, True, 0.3).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    tile = heads * tiled.QUERY_TILE * tiled.KEY_TILE * 4
    assert q.nbytes <= largest <= max(q.nbytes, tile) < seq * seq / 8


def twice(q, k, v, *rest):
    """Something with the op inside that makes its inputs intermediate results."""
    return attention(q * 2, k, v.sin(), *rest).cos().sum()


def test_checkpointing_gives_the_same_gradients():
    case, leaves = differentiable(CASES[0])
    expected = torch.autograd.grad(twice(*case.arguments), list(leaves.values()))
    again = checkpoint(twice, *case.arguments, use_reentrant=False)
    for found, gradient in zip(torch.autograd.grad(again, list(leaves.values())), expected, strict=True):
        assert torch.equal(found, gradient)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]])
def test_compiles_as_one_graph(case):
    case, leaves = differentiable(case)
    expected = torch.autograd.grad(twice(*case.arguments), list(leaves.values()))
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    for found, gradient in zip(
        torch.autograd.grad(compiled(*case.arguments), list(leaves.values())), expected, strict=True
    ):
        assert torch.equal(found, gradient)


# The kernels, by the emulator -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seq", [1, 20])
def test_emulated_causal_matches_float64(seq, head_dim):
    case = reference.causal_case(8, 2, seq, [70, 3], capacity=71, head_dim=head_dim)
    with torch_calls.emulated():
        found = attention(*case.arguments)
    np.testing.assert_allclose(found.numpy(), case.expected(), atol=TOLERANCE)


def test_emulated_decode_of_groups_that_have_no_kernels_of_their_own():
    case = reference.causal_case(6, 2, 1, [70, 3], capacity=71, head_dim=64)
    with torch_calls.emulated():
        found = attention(*case.arguments)
    np.testing.assert_allclose(found.numpy(), case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_emulated_packed_matches_float64(head_dim):
    case = reference.packed_case([0, 4, 70], head_dim=head_dim)
    with torch_calls.emulated():
        found = attention(*case.arguments)
    np.testing.assert_allclose(found.numpy(), case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("emulated", [False, True])
def test_slots_that_some_tokens_do_not_see(emulated):
    """As a sliding window has them, in a cache that is a ring."""
    case = reference.causal_case(4, 2, 3, [9], capacity=11, head_dim=64)
    visible = torch.tensor([[9, 9, 2, 3, 0, 1, 2, 9, 1, 9, 9]], dtype=torch.int32)
    arguments = (*case.arguments[:7], visible, *case.arguments[8:])
    with torch_calls.emulated() if emulated else contextlib.nullcontext():
        found = attention(*arguments)
    pairs = ((case.past_key[:, :, :9], case.k), (case.past_value[:, :, :9], case.v))
    keys, values = (torch.cat(pair, dim=2)[0] for pair in pairs)
    numbers = torch.arange(3)[:, None]
    sees = torch.cat([numbers < visible[0, :9], torch.arange(3) <= numbers], dim=1)
    expected = reference.attend(case.q[0], keys, values, sees, case.scale)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=TOLERANCE)
    everyone = (*case.arguments[:7], torch.tensor([[3]], dtype=torch.int32), *case.arguments[8:])
    np.testing.assert_allclose(attention(*everyone).numpy(), case.expected(), atol=TOLERANCE)


def test_non_contiguous_tensors_go_to_the_kernels_too():
    case = reference.causal_case(4, 2, 6, [5], capacity=8, head_dim=64)
    strided = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in case.floats.items()}
    with torch_calls.emulated():
        found = attention(*dataclasses.replace(case, **strided).arguments)
        assert torch.equal(found, attention(*case.arguments))


# The exported op ------------------------------------------------------------------------------------------------------


def make_call(kv_format: KVFormat, **changes: object) -> tuple[op_reference.CausalCase, tuple]:
    """A case, and the arguments of `flash_attention_2` that it is."""
    layout = LayerLayout(kv_format, 2, 128, 96)
    options = {"new": [3, 0, 2], "past_length": [5, 9, 130], "num_heads": 4, "padding": 1, **changes}
    case = op_reference.causal_case(layout, **options)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in case.arrays.items()}
    attributes = AttentionOptions(True, op_reference.SCALE, 4, 2, 128, 96, op_reference.EPSILON, kv_format).flat
    return case, (*tensors.values(), *[None] * (not kv_format.is_quantised), *attributes)


@pytest.mark.parametrize("kv_format", KVFormat)
def test_the_exported_op_passes_torchs_own_checks(kv_format):
    _, arguments = make_call(kv_format)
    checks = "test_schema", "test_faketensor"  # it has no gradients
    with torch_calls.emulated():
        torch.library.opcheck(torch.ops.pascalvl.flash_attention_2.default, arguments, test_utils=checks)


CALLS = {
    "prefill": {},
    "windows": {"visible": "some"},
    "shared-page": {"new": [3, 4], "past_length": [128, 300], "shared": True},
    "decode": {"new": [1, 1, 1, 0], "past_length": [0, 127, 129, 3], "padding": 0},
    "padding-of-a-decode-step": {"new": [1, 1, 0, 0], "past_length": [0, 128, 9, 9], "padding": 2},
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("emulated", [False, True])
def test_the_exported_op_matches_float64(call, emulated):
    """By the kernels and by PyTorch."""
    case, arguments = make_call(KVFormat.F32, **call)
    with torch_calls.emulated() if emulated else contextlib.nullcontext():
        found = flash_attention_2(*arguments)
    output, key, value = op_reference.causal(case).values()
    np.testing.assert_allclose(found[0][: case.tokens], output[: case.tokens], atol=CACHED_TOLERANCE)
    for rows, expected in zip(found[1:], (key, value), strict=True):
        np.testing.assert_allclose(rows[:, : case.tokens], expected[:, : case.tokens], atol=CACHED_TOLERANCE)
    assert all(rows.isfinite().all() for rows in found)


def test_one_bound_for_all_slots_hides_the_past_from_some_tokens():
    """Without kernels, which take it that all see them."""
    case, arguments = make_call(KVFormat.F32)
    case.arrays["past_visible"][:] = [[1], [0], [0]]
    found = flash_attention_2(*arguments[:8], torch.from_numpy(case.arrays["past_visible"]), *arguments[9:])
    expected = op_reference.causal(case)["output"]
    np.testing.assert_allclose(found[0][: case.tokens], expected[: case.tokens], atol=CACHED_TOLERANCE)


def test_without_a_past_pytorch_computes_what_the_kernels_do():
    _, arguments = make_call(KVFormat.F32, padding=0)
    arguments = (*arguments[:6], *[None] * 6, *arguments[12:])
    with torch_calls.emulated():
        expected = flash_attention_2(*arguments)
    for found, wanted in zip(flash_attention_2(*arguments), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_both_ways_pytorch_computes_the_same():
    torch.manual_seed(6)
    angle = torch.randn(20, 36).repeat(1, 2)
    bounds = torch.tensor([0, 3, 20], dtype=torch.int32)
    sizes = 3, 3, 72, 72
    arguments = (torch.randn(20, 3 * 3 * 72), None, None, angle.cos(), angle.sin(), bounds, *[None] * 6, False, 0.1)
    with torch_calls.emulated():
        (expected,) = flash_attention_2(*arguments, *sizes, 0.0, "f32")
    (found,) = flash_attention_2(*arguments, *sizes, 0.0, "f32")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_cache_without_kernels_is_refused():
    _, arguments = make_call(KVFormat.K8V8)
    with pytest.raises(ValueError, match="a cache in k8v8 is for the kernels, on CUDA; found tensors on cpu"):
        flash_attention_2(*arguments)


@pytest.mark.parametrize("kv_format", KVFormat)
def test_kv_append_puts_new_rows_where_they_go_and_no_others(kv_format):
    case, arguments = make_call(kv_format)
    layouts, (pages, tokens) = [case.layout] * 2, (3, 6)
    with torch_calls.emulated():
        _, *new = flash_attention_2(*arguments)
    new = (*new, None)[:3]
    pools = []
    for _ in layouts:
        rows = torch_calls.new_rows(case.layout, pages * PAGE_SLOTS, torch.device("cpu"))
        lead = pages, case.layout.num_kv_heads, PAGE_SLOTS
        pools.append([x if x is None else x.view(torch.int32).fill_(7).view(*lead, *x.shape[2:]) for x in rows])
        pools[-1] = [x if x is None else x.view(y.dtype) for x, y in zip(pools[-1], rows, strict=True)]
    last = pages * PAGE_SLOTS - 1
    slots = torch.tensor([PAGE_SLOTS + 5, 2, -1, last, PAGE_SLOTS - 1, last + 1], dtype=torch.int32)
    assert len(slots) == tokens
    torch_calls.kv_append(torch_calls.library(torch.device("cpu")), layouts, [new] * 2, pools, slots)
    for pool in pools:
        for rows, source in zip(pool, new, strict=True):
            if rows is None:
                continue
            expected = torch.full_like(rows.view(torch.int32), 7)
            for token, (page, slot) in {0: (1, 5), 1: (0, 2), 3: (2, 127), 4: (0, 127)}.items():
                expected[page, :, slot] = source[:, token].view(torch.int32)
            assert torch.equal(rows.view(torch.int32), expected)


def test_kv_append_refuses_a_pool_that_it_could_not_write_in_place():
    kernels = torch_calls.library(torch.device("cpu"))
    new = torch.zeros(2, 1, 64)
    pool = torch.zeros(1, PAGE_SLOTS, 2, 64).transpose(1, 2)
    layouts = [LayerLayout(KVFormat.F32, 2, 64, 64)]
    with pytest.raises(ValueError, match="the pool's rows must be contiguous; found strides"):
        torch_calls.kv_append(kernels, layouts, [(new, new, None)], [(pool, pool, None)], torch.zeros(1).int())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pool": torch.zeros(1, 2, 4, 64)}, r"the pool's keys as torch.float32 \[1, 2, 128, 64\] .* \[1, 2, 4, 64\]"),
        (
            {"pool": torch.zeros(1, 1, 128, 64)},
            r"the pool's keys as torch.float32 \[1, 2, 128, 64\] .* \[1, 1, 128, 64",
        ),
        ({"more": torch.zeros(2, 2, 128, 64)}, "expected 1 pages in each layer's pool; found 2"),
        ({"key": torch.zeros(1, 1, 64)}, r"take new keys as torch.float32 \[2, 1, 64\] .* torch.float32 \[1, 1, 64\]"),
        ({"key": torch.zeros(2, 2, 64)}, r"take new keys as torch.float32 \[2, 1, 64\] .* torch.float32 \[2, 2, 64\]"),
        ({"value": torch.zeros(2, 1, 64).half()}, r"take new values as torch.float32 .* found torch.float16"),
        ({"value": torch.zeros(2, 2, 64)}, r"take new values as torch.float32 .* found .* \[2, 2, 64\]"),
        ({"slots": torch.zeros(1)}, r"slots as torch.int32 \[1\] .* found torch.float32"),
        ({"slots": torch.zeros(1, 1).int()}, r"slots as torch.int32 \[1\] .* found .* \[1, 1\]"),
    ],
)
def test_kv_append_refuses_tensors_of_other_shapes(change, told):
    """Memory that is not there would be read or written."""
    tensors = dict.fromkeys(("key", "value"), torch.zeros(2, 1, 64))
    tensors |= {"slots": torch.zeros(1).int(), **dict.fromkeys(("pool", "more"), torch.zeros(1, 2, 128, 64)), **change}
    kernels, layouts = torch_calls.library(torch.device("cpu")), [LayerLayout(KVFormat.F32, 2, 64, 64)] * 2
    new = [(tensors["key"], tensors["value"], None)] * 2
    pools = [(tensors[name], tensors[name], None) for name in ("pool", "more")]
    with pytest.raises(ValueError, match=told):
        torch_calls.kv_append(kernels, layouts, new, pools, tensors["slots"])


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_past_of_fewer_sequences_is_refused():
    case = reference.causal_case(4, 2, 3, [2, 4], capacity=4, head_dim=64)
    of_one = {name: case.floats[name][:1] for name in ("past_key", "past_value")}
    arguments = dataclasses.replace(case, **of_one).arguments
    told = r"the past has k's sequences and heads; found k \[2, 2, 3, 64\], past_key \[1, 2, 4, 64\]"
    with torch_calls.emulated(), pytest.raises(ValueError, match=told):
        attention(*arguments)


PAST = {
    "page_table": (torch.zeros(2, 3).int(), r"page_table as torch.int32 \[3, 3\] on cpu; found .* \[2, 3\]"),
    "past_length": (torch.zeros(2).int(), r"past_length as torch.int32 \[3\] on cpu; found .* \[2\]"),
    "past_visible": (torch.zeros(3, 200).int(), r"past_visible as torch.int32 \[3, 384\] on cpu; found .* \[3, 200\]"),
    "past_key": (
        torch.zeros(4, 2, 64, 128),
        r"the pool's keys as .* \[4, 2, 128, 128\] on cpu; found .* \[4, 2, 64, 128\]",
    ),
    "past_value": (
        torch.zeros(4, 2, 128, 96),
        r"the pool's values as .* \[11, 2, 128, 96\] .* found .* \[4, 2, 128, 96\]",
    ),
}


@pytest.mark.parametrize("name", PAST)
def test_a_past_of_other_shapes_is_refused(name):
    case, arguments = make_call(KVFormat.F32)
    wrong, told = PAST[name]
    changed = [wrong if n == name else x for n, x in zip([*case.arrays, "past_scale"], arguments, strict=False)]
    with torch_calls.emulated(), pytest.raises(ValueError, match=told):
        flash_attention_2(*changed, *arguments[len(changed) :])


REFUSED = {
    "head_dim is 16; expected 64, 96, 112 or 128": reference.causal_case(4, 2, 3, [2], capacity=2, head_dim=16),
    "Packed attention has head sizes 64, 72 and 128": reference.packed_case([0, 3], head_dim=80),
    r"take qkv as torch.float32 \[3, 576\] on cpu; found torch.float64": reference.converted(
        reference.packed_case([0, 3], head_dim=64), torch.float64
    ),
    r"take the pool's keys as torch.float32 .* found torch.bfloat16": reference.causal_case(
        4, 2, 3, [2], capacity=2, head_dim=64, past_dtype=torch.bfloat16
    ),
}


@pytest.mark.parametrize("told", REFUSED)
def test_what_the_kernels_do_not_support_is_refused_and_tiled_otherwise(told):
    arguments = REFUSED[told].arguments
    with torch_calls.emulated(), pytest.raises(ValueError, match=told):
        attention(*arguments)
    np.testing.assert_allclose(attention(*arguments).numpy(), REFUSED[told].expected(), atol=TOLERANCE)


def test_other_devices_have_no_kernels():
    with pytest.raises(ValueError, match="run on cuda and cpu tensors; found meta"):
        torch_calls.library(torch.device("meta"))


# Transformers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(nano_checkpoint):
    load = Qwen3VLForConditionalGeneration.from_pretrained
    return (
        load(nano_checkpoint, dtype=torch.float32, attn_implementation="eager").eval(),
        load(nano_checkpoint, dtype=torch.float32, attn_implementation=ATTN_IMPLEMENTATION).eval(),
    )


def test_drop_in_answers_like_eager_attention_with_padding_on_either_side(models):
    torch.manual_seed(1)
    token_ids = torch.randint(0, 400, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 8:] = 0
    with torch.no_grad():
        expected, found = (m(input_ids=token_ids, attention_mask=mask).logits[mask.bool()] for m in models)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    mask[1] = 1
    generated = [
        m.generate(input_ids=token_ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in models
    ]
    assert torch.equal(*generated)


def test_drop_in_sees_pictures_like_eager_attention(models):
    torch.manual_seed(2)
    grid = torch.tensor([[1, 4, 6], [2, 2, 4]])
    pixels = torch.randn(int(grid.prod(1).sum()), 1536)
    with torch.no_grad():
        expected, found = (m.model.visual(pixels, grid) for m in models)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.deepstack_features, expected.deepstack_features, atol=1e-4, rtol=1e-4)


def test_a_training_step_is_that_of_eager_attention(models):
    torch.manual_seed(4)
    config = models[0].config
    grid = torch.tensor([[1, 4, 6]])
    token_ids = torch.randint(0, 400, (2, 20))
    token_ids[0, 3:9] = config.image_token_id
    inputs = {
        "input_ids": token_ids,
        "mm_token_type_ids": (token_ids == config.image_token_id).int(),
        "labels": token_ids.where(token_ids < 400, -100),
        "pixel_values": torch.randn(24, 1536),
        "image_grid_thw": grid,
    }
    steps = []
    for model in map(copy.deepcopy, models):
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
        before = model(**inputs).loss
        before.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        steps.append(torch.stack([before, norm, model(**inputs).loss]).detach())
    assert steps[0][2] < steps[0][0]
    # float32 through the layers and back: measured 6e-7.
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-5, atol=0)


def test_dropout_is_refused():
    config = Qwen3VLConfig(
        text_config={"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "attention_dropout": 0.1},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "deepstack_visual_indexes": [0]},
    )  # fmt: skip
    config._attn_implementation = ATTN_IMPLEMENTATION
    model = Qwen3VLForConditionalGeneration(config).model.language_model.train()
    with pytest.raises(ValueError, match="dropout"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))
