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
from pascalvl.plugins.kv_format import KVFormat, LayerLayout
from pascalvl.plugins.kv_rows import compress
from pascalvl.plugins.ops.flash_attention import tiled
from pascalvl.plugins.ops.flash_attention.drop_in import ATTN_IMPLEMENTATION, attention
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.torch_op import flash_attention_2
from tests.export import reference

# float32 dot products of up to a few hundred terms of size one, and a softmax: a few units in the last place.
TOLERANCE = 2e-6


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


def make_call(kv_format: KVFormat, seq: int = 3, past: int = 5, batch: int = 2) -> tuple:
    """Arguments of `flash_attention_2`, causal, over a cache of random tokens; its options."""
    torch.manual_seed(5)
    options = AttentionOptions(True, 0.1, 4, 2, 128, 96, 1e-6, kv_format)
    layout = options.layout
    old = [torch.randn(batch, 2, past, dim).numpy() for dim in layout.dims]
    rows, scales = zip(
        *(compress(x, f, layout.is_rotated and x is old[0]) for x, f in zip(old, kv_format.rows, strict=True)),
        strict=True,
    )
    scale = None
    if kv_format.is_quantised:
        scale = torch.from_numpy(np.stack(scales, -1).view(np.int32)[..., 0].copy())
    angle = torch.randn(batch, seq, 64).repeat(1, 1, 2)
    tensors = [torch.randn(batch, seq, sum(options.widths)), torch.rand(128), torch.rand(128), angle.cos(), angle.sin()]
    cache = [torch.from_numpy(x) for x in rows] + [scale, torch.full((batch,), past, dtype=torch.int32), None]
    attributes = True, 0.1, 4, 2, 128, 96, 1e-6, kv_format.value
    return (*tensors, None, *cache, *attributes), options


@pytest.mark.parametrize("kv_format", KVFormat)
def test_the_exported_op_passes_torchs_own_checks(kv_format):
    arguments, _ = make_call(kv_format)
    checks = "test_schema", "test_faketensor"  # it has no gradients
    with torch_calls.emulated():
        torch.library.opcheck(torch.ops.pascalvl.flash_attention_2.default, arguments, test_utils=checks)


def test_without_kernels_pytorch_computes_the_same():
    arguments, _ = make_call(KVFormat.F32)
    for case in (arguments, (*arguments[:5], *[None] * 6, *arguments[11:])):
        with torch_calls.emulated():
            expected = flash_attention_2(*case)
        for found, wanted in zip(flash_attention_2(*case), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_both_ways_pytorch_computes_the_same():
    torch.manual_seed(6)
    angle = torch.randn(20, 36).repeat(1, 2)
    bounds = torch.tensor([0, 3, 20], dtype=torch.int32)
    sizes = 3, 3, 72, 72
    arguments = (torch.randn(20, 3 * 3 * 72), None, None, angle.cos(), angle.sin(), bounds, *[None] * 5, False, 0.1)
    with torch_calls.emulated():
        (expected,) = flash_attention_2(*arguments, *sizes, 0.0, "f32")
    (found,) = flash_attention_2(*arguments, *sizes, 0.0, "f32")
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_cache_without_kernels_is_refused():
    arguments, _ = make_call(KVFormat.K8V8)
    with pytest.raises(ValueError, match="a cache in k8v8 is for the kernels, on CUDA; found tensors on cpu"):
        flash_attention_2(*arguments)


@pytest.mark.parametrize("kv_format", KVFormat)
def test_kv_append_puts_new_rows_where_they_go_and_no_others(kv_format):
    arguments, options = make_call(kv_format, seq=4)
    kernels = torch_calls.library(torch.device("cpu"))
    with torch_calls.emulated():
        _, *new = flash_attention_2(*arguments)
    new = (*new, None)[:3]
    layouts = [options.layout] * 2
    caches = [torch_calls.new_rows(options.layout, 2, 9, torch.device("cpu")) for _ in layouts]
    for cache in caches:
        for rows in cache:
            if rows is not None:
                rows.view(torch.int32).fill_(7)
    slots = torch.tensor([[5, 2, -1, 3], [7, 8, 9, 10]], dtype=torch.int32)
    torch_calls.kv_append(kernels, layouts, [new] * 2, caches, slots)
    for cache in caches:
        for rows, source in zip(cache, new, strict=True):
            if rows is None:
                continue
            expected = torch.full_like(rows.view(torch.int32), 7)
            expected[0, :, [5, 2, 3]] = source[0, :, [0, 1, 3]].view(torch.int32)
            expected[1, :, 7:] = source[1, :, :2].view(torch.int32)
            assert torch.equal(rows.view(torch.int32), expected)


def test_kv_append_refuses_a_cache_that_it_could_not_write_in_place():
    kernels = torch_calls.library(torch.device("cpu"))
    new = torch.zeros(1, 2, 1, 64)
    cache = torch.zeros(1, 4, 2, 64).transpose(1, 2)
    layouts = [LayerLayout(KVFormat.F32, 2, 64, 64)]
    with pytest.raises(ValueError, match="the cache must be contiguous; found strides"):
        torch_calls.kv_append(kernels, layouts, [(new, new, None)], [(cache, cache, None)], torch.zeros(1, 1).int())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cache": torch.zeros(1, 2, 4, 64)}, r"the cache of keys as torch.float32 \[2, 2, 4, 64\] .* \[1, 2, 4, 64\]"),
        ({"key": torch.zeros(2, 1, 1, 64)}, r"the cache of keys as torch.float32 .* torch.float32 \[2, 1, 1, 64\]"),
        ({"value": torch.zeros(2, 2, 1, 64).half()}, r"the cache of values as torch.float32 .* found torch.float16"),
        ({"value": torch.zeros(2, 2, 2, 64)}, r"the cache of values as torch.float32 .* found .* \[2, 2, 2, 64\]"),
        ({"key": torch.zeros(2, 2, 2, 64)}, "expected 1 slots in each layer's keys; found 2"),
    ],
)
def test_kv_append_refuses_tensors_of_other_shapes(change, told):
    """Memory that is not there would be read or written."""
    tensors = dict.fromkeys(("key", "value"), torch.zeros(2, 2, 1, 64)) | {"cache": torch.zeros(2, 2, 4, 64)} | change
    kernels, layouts = torch_calls.library(torch.device("cpu")), [LayerLayout(KVFormat.F32, 2, 64, 64)]
    new, caches = [(tensors["key"], tensors["value"], None)], [(tensors["cache"], tensors["cache"], None)]
    with pytest.raises(ValueError, match=told):
        torch_calls.kv_append(kernels, layouts, new, caches, torch.zeros(2, 1).int())


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_past_of_fewer_sequences_is_refused():
    case = reference.causal_case(4, 2, 3, [2, 4], capacity=4, head_dim=64)
    of_one = {name: case.floats[name][:1] for name in ("past_key", "past_value")}
    arguments = dataclasses.replace(case, **of_one).arguments
    with (
        torch_calls.emulated(),
        pytest.raises(ValueError, match=r"the cache of keys as torch.float32 \[2, 2, 4, 64\]"),
    ):
        attention(*arguments)


REFUSED = {
    "head_dim is 16; expected 64, 96, 112 or 128": reference.causal_case(4, 2, 3, [2], capacity=2, head_dim=16),
    "Packed attention has head sizes 64, 72 and 128": reference.packed_case([0, 3], head_dim=80),
    "Decode has 1, 2, 4 or 8 query heads a kv head; found 3": reference.causal_case(6, 2, 1, [2], 2, head_dim=64),
    r"take qkv as torch.float32 \[3, 576\] on cpu; found torch.float64": reference.converted(
        reference.packed_case([0, 3], head_dim=64), torch.float64
    ),
    r"take the cache of keys as torch.float32 .* found torch.bfloat16": reference.causal_case(
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
