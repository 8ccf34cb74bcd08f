"""The torch op and its kernels on a GPU, against float64.

The kernels must be in the cache already where NVRTC is missing. Run alone, with ``--noconftest``, this needs no package
but torch, transformers and NumPy.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, LayerLayout
from pascalvl.plugins.ops.flash_attention.drop_in import ATTN_IMPLEMENTATION, attention
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from tests.export import reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
NANO = Path(__file__).parents[1] / "nano" / "checkpoint"
# float32 sums of some hundred terms, relative to the largest result; the emulator measures up to 1.5e-6.
TOLERANCE = 3e-6
# Gradients sum as many terms again, over a group's queries; the same sums on the CPU measure up to 1.3e-6.
GRADIENT_TOLERANCE = 6e-6


def on_gpu(case):
    tensors = {name: x.to(DEVICE) for name, x in vars(case).items() if torch.is_tensor(x)}
    return dataclasses.replace(case, **tensors)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach().double().cpu() - expected).abs().max() / expected.abs().max())


def causal_cases():
    for heads, kv_heads in ((8, 8), (8, 1), (16, 4), (6, 2)):
        for seq in (1, 5, 300):
            for head_dim in (64, 96, 128):
                yield heads, kv_heads, seq, [500, 0, 129], 512, torch.float32, head_dim


@pytest.mark.parametrize("parameters", list(causal_cases()), ids=str)
def test_causal_matches_float64(parameters):
    case = reference.causal_case(*parameters)
    assert relative_error(attention(*on_gpu(case).arguments), case.output()) < TOLERANCE


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("cu_seqlens", [[0, 1], [0, 300], [0, 4, 260, 301]])
def test_packed_matches_float64(head_dim, cu_seqlens):
    case = reference.packed_case(cu_seqlens, head_dim=head_dim)
    assert relative_error(attention(*on_gpu(case).arguments), case.output()) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        reference.causal_case(8, 2, 300, [270, 0], capacity=280, head_dim=128),
        reference.causal_case(8, 2, 1, [270, 3], capacity=280, head_dim=64),
        reference.packed_case([0, 4, 260, 301], head_dim=72),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_match_float64(case, compiled):
    gpu = on_gpu(case)
    leaves = {name: x.requires_grad_() for name, x in gpu.floats.items()}
    op = torch.compile(attention, fullgraph=True, backend="aot_eager") if compiled else attention
    out = op(*gpu.arguments)
    assert relative_error(out, case.output()) < TOLERANCE
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(DEVICE))
    for (name, expected), gradient in zip(reference.gradients(case, grad).items(), found, strict=True):
        assert relative_error(gradient, expected) < GRADIENT_TOLERANCE, name


def test_memory_grows_with_the_length_both_ways():
    def peak(seq: int) -> int:
        q, k, v = (torch.randn(1, heads, seq, 64, device=DEVICE, requires_grad=True) for heads in (8, 2, 2))
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        attention(q, k, v, *[None] * 5, True, 0.125).sum().backward()
        return torch.cuda.max_memory_allocated(DEVICE) - before

    peak(2048)  # cuBLAS takes its workspace
    assert peak(8192) < 2.2 * peak(4096)


@pytest.mark.parametrize("seq", [1, 40])
def test_a_captured_graph_follows_what_its_tensors_hold(seq):
    """A step of a decoder: attend, append to the pool; lengths and pages are read on the device."""
    kernels = torch_calls.library(DEVICE)
    kernels.load()
    torch.manual_seed(seq)
    options = AttentionOptions(True, 128**-0.5, 8, 2, 128, 128)
    qkv = torch.randn(2 * seq, sum(options.widths), device=DEVICE)
    key, value = (torch.randn(9, 2, PAGE_SLOTS, 128, device=DEVICE) for _ in range(2))
    page_table = torch.randperm(9, device=DEVICE)[:8].view(2, 4).int()
    bounds, length = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, seq, 2 * seq], [5, 200]))
    past = torch_calls.Past(key, value, None, page_table, length)
    tensors = qkv, key, value, page_table, length

    def step() -> torch.Tensor:
        out, *new = torch_calls.attention(kernels, options, qkv, bounds, past=past)
        slots = length[:, None] + torch.arange(seq, dtype=torch.int32, device=DEVICE)
        pages = page_table.gather(1, slots.long() // PAGE_SLOTS)
        places = (pages * PAGE_SLOTS + slots % PAGE_SLOTS).flatten()
        torch_calls.kv_append(kernels, [options.layout], [(*new, None)], [(key, value, None)], places)
        length.add_(seq)
        return out

    def expected() -> torch.Tensor:
        """In float64, sequence by sequence."""
        outputs = []
        for tokens, pages, past_length in zip(qkv.cpu().split(seq), page_table.cpu(), length.tolist(), strict=True):
            q, k, v = (x.unflatten(-1, (-1, 128)).transpose(0, 1) for x in tokens.split(options.widths, -1))
            rows = [pool.cpu()[pages.long()].transpose(0, 1).flatten(1, 2)[:, :past_length] for pool in (key, value)]
            keys, values = (torch.cat(pair, 1) for pair in zip(rows, (k, v), strict=True))
            sees = torch.ones(seq, past_length + seq, dtype=torch.bool).tril(past_length)
            outputs.append(reference.attend(q, keys, values, sees, options.softmax_scale).flatten(1))
        return torch.cat(outputs)

    saved = [x.clone() for x in tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    assert all(map(torch.equal, tensors, saved)), "capturing ran the step"
    for number in range(3):
        qkv.normal_()
        page_table.copy_(torch.randperm(9)[:8].view(2, 4))
        wanted = expected()
        graph.replay()
        assert relative_error(out, wanted) < TOLERANCE, number
    assert length.tolist() == [5 + 3 * seq, 200 + 3 * seq]


def test_kv_append_writes_the_new_rows_and_no_others():
    torch.manual_seed(3)
    layers, heads, tokens, pages = 3, 2, 40, 2
    key, value = (torch.randn(layers, heads, tokens, dim, device=DEVICE) for dim in (64, 128))
    pools = [torch.randn(layers, pages, heads, PAGE_SLOTS, dim, device=DEVICE) for dim in (64, 128)]
    expected = [pool.clone() for pool in pools]
    for pool, new in zip(expected, (key, value), strict=True):
        pool[:, 0, :, 2:22] = new[:, :, :20]
        pool[:, 1, :, 118:] = new[:, :, 20:30]  # the others lie beyond the pool
    first = torch.tensor([[2], [PAGE_SLOTS + 118]], dtype=torch.int32, device=DEVICE)
    slots = (first + torch.arange(20, device=DEVICE).int()).flatten()
    layouts = [LayerLayout(KVFormat.F32, heads, 64, 128)] * layers
    new, past = ([(*pair, None) for pair in zip(*pairs, strict=True)] for pairs in ((key, value), pools))
    torch_calls.kv_append(torch_calls.library(DEVICE), layouts, new, past, slots)
    assert all(map(torch.equal, pools, expected))


@pytest.mark.parametrize(
    ("told", "case"),
    [
        ("head_dim is 16; expected 64, 96, 112 or 128", reference.causal_case(4, 2, 3, [2], 2, head_dim=16)),
        ("Packed attention has head sizes 64, 72 and 128", reference.packed_case([0, 3], head_dim=80)),
        (
            "take qkv as torch.float32 .* found torch.float64",
            reference.converted(reference.packed_case([0, 3]), torch.float64),
        ),
        (
            "take qkv as torch.float32 .* found torch.bfloat16",
            reference.converted(reference.packed_case([0, 3]), torch.bfloat16),
        ),
    ],
)
def test_what_the_kernels_do_not_support_is_refused(told, case):
    with pytest.raises(ValueError, match=told):
        attention(*on_gpu(case).arguments)


def test_a_length_on_the_host_is_refused():
    case = reference.causal_case(4, 2, 3, [2], 2, head_dim=64)
    case = dataclasses.replace(on_gpu(case), past_length=case.past_length)
    with pytest.raises(ValueError, match=r"take past_length as torch.int32 \[1\] on cuda:\d; found .* on cpu"):
        attention(*case.arguments)


@pytest.fixture(scope="module")
def models():
    return [
        Qwen3VLForConditionalGeneration.from_pretrained(NANO, dtype=torch.float32, attn_implementation=name).to(DEVICE)
        for name in ("eager", ATTN_IMPLEMENTATION)
    ]


def test_drop_in_generates_like_eager_attention(models):
    torch.manual_seed(1)
    token_ids = torch.randint(0, 400, (3, 12), device=DEVICE)
    mask = torch.ones_like(token_ids)
    mask[0, :5] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    expected, found = (m.eval().generate(input_ids=token_ids, attention_mask=mask, **options) for m in models)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)  # as on the CPU


def test_a_training_step_is_that_of_eager_attention(models):
    torch.manual_seed(4)
    token_ids = torch.randint(0, 400, (2, 20), device=DEVICE)
    found = []
    for model in models:
        loss = model.train()(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found.append(torch.stack([loss.detach(), norm]))
        model.zero_grad()
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=0)  # as on the CPU
