"""The torch op against float64 softmax attention, and as a drop-in attention implementation of transformers."""

import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pascalvl.export.attention import ATTN_IMPLEMENTATION, flash_attention_2
from tests.export import reference

# float32 dot products of up to a few hundred terms of size one, and a softmax: a few units in the last place.
TOLERANCE = 2e-6


@pytest.mark.parametrize("past_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("seq", "past_length"), [(1, [0, 5]), (7, [9, 0]), (5, [3, 9])])
def test_causal_matches_float64(heads, kv_heads, seq, past_length, past_dtype):
    case = reference.causal_case(heads, kv_heads, seq, past_length, capacity=9, past_dtype=past_dtype)
    output = flash_attention_2(
        case.q, case.k, case.v, None, case.past_key, case.past_value, case.past_length, True, case.scale
    )
    assert output.shape == (2, seq, heads, case.q.shape[-1])
    np.testing.assert_allclose(output.numpy(), case.expected(), atol=TOLERANCE)


@pytest.mark.parametrize("cu_seqlens", [[0, 12], [0, 1, 12], [0, 4, 9, 12]])
def test_packed_matches_float64(cu_seqlens):
    case = reference.packed_case(cu_seqlens)
    output = flash_attention_2(case.q, case.k, case.v, case.cu_seqlens, None, None, None, False, case.scale)
    np.testing.assert_allclose(output.numpy(), case.expected(), atol=TOLERANCE)


def test_registration_passes_torchs_own_checks():
    case = reference.causal_case(4, 2, 3, [2, 5], capacity=6)
    arguments = (case.q, case.k, case.v, None, case.past_key, case.past_value, case.past_length, True, case.scale)
    torch.library.opcheck(torch.ops.pascalvl.flash_attention_2.default, arguments)


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
