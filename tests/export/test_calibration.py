"""Statistics of calibration: the moments of Hugging Face's own queries, keys and values."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from pascalvl.export.calibration import calibrate
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.prompt import Patches, Prompt

IMAGE_GRID, VIDEO_GRID = (1, 8, 12), (2, 4, 6)


@pytest.fixture(scope="module")
def prompts(nano_reference):
    """Text; a picture and a video between text, as the model's own processor marks them."""
    config, rng = nano_reference.config, np.random.default_rng(0)

    def words(count):
        return rng.integers(0, 1900, count)

    def visual(grid, timestamps=()):
        return Patches.of(rng.standard_normal((np.prod(grid), 3 * 2 * 16 * 16), np.float32), grid, 2, timestamps)

    def marked(token, count):
        return [config.vision_start_token_id, *[token] * count, config.vision_end_token_id]

    image, frame = (marked(config.image_token_id, 24), marked(config.video_token_id, 6))
    mixed = np.concatenate([words(9), image, words(5), frame, words(3), frame, words(4)]).astype(np.int64)
    visuals = [visual(IMAGE_GRID), visual(VIDEO_GRID, (0.0, 1.0))]
    return [Prompt(words(80)), Prompt.of(mixed, visuals, (config.image_token_id, config.video_token_id))]


def direct_moments(model, prompts):
    """By hooks around the parts of Hugging Face's attention, with its own RoPE, one token at a time."""
    layers = model.model.language_model.layers
    seen = [[] for _ in layers]

    def note(index):
        def hook(module, args, kwargs):
            hidden, shape = kwargs["hidden_states"], (*kwargs["hidden_states"].shape[:2], -1, module.head_dim)
            query = module.q_norm(module.q_proj(hidden).view(shape)).transpose(1, 2)
            key = module.k_norm(module.k_proj(hidden).view(shape)).transpose(1, 2)
            value = module.v_proj(hidden).view(shape).transpose(1, 2)
            seen[index].append((*apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"]), value))

        return hook

    handles = [layer.self_attn.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    for prompt in prompts:
        token_ids = torch.from_numpy(prompt.token_ids)[None]
        inputs = {}
        for patches in (visual.patches for visual in prompt.visuals):
            suffix, kind = ("_videos", "video") if patches.is_video else ("", "image")
            inputs |= {
                f"pixel_values{suffix}": torch.from_numpy(patches.pixel_values),
                f"{kind}_grid_thw": torch.tensor([patches.grid]),
            }
        kinds = torch.zeros_like(token_ids)
        kinds[token_ids == model.config.image_token_id] = 1
        kinds[token_ids == model.config.video_token_id] = 2
        with torch.no_grad():
            model(input_ids=token_ids, mm_token_type_ids=kinds, **inputs)
    for handle in handles:
        handle.remove()

    moments = []
    for states in seen:
        query, key, value = (torch.cat([state[i][0] for state in states], 1).double().numpy() for i in range(3))
        heads, tokens = key.shape[:2]
        own = np.zeros((3, heads, key.shape[2], key.shape[2]))
        for t in range(tokens):
            for head in range(len(query)):
                own[0, head * heads // len(query)] += np.outer(query[head, t], query[head, t]) / tokens
            for head in range(heads):
                own[1, head] += np.outer(key[head, t], key[head, t]) / tokens
                own[2, head] += np.outer(value[head, t], value[head, t]) / tokens
        moments.append(own)
    return moments


def test_moments_are_those_of_the_model(nano_checkpoint, nano_reference, prompts):
    calls = []
    found = calibrate(nano_checkpoint, prompts, lambda: calls.append(None))
    assert len(calls) == len(found)
    for statistics, expected in zip(found, direct_moments(nano_reference, prompts), strict=True):
        for moment, own in zip((statistics.query, statistics.key, statistics.value), expected, strict=True):
            assert moment.dtype == np.float64
            # Float32 states, of attention summed in another order.
            np.testing.assert_allclose(moment, own, atol=1e-5 * np.abs(own).max())


def test_equal_prompts_give_equal_statistics(nano_checkpoint, prompts):
    for first, second in zip(calibrate(nano_checkpoint, prompts), calibrate(nano_checkpoint, prompts), strict=True):
        for name in ("query", "key", "value"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens(nano_checkpoint, prompts, count):
    with pytest.raises(UserError, match=f"at least 128 tokens .* found {count} of {80 * count} tokens"):
        calibrate(nano_checkpoint, prompts[:count])


def test_a_model_that_is_damaged(nano_checkpoint, prompts, tmp_path):
    copy = shutil.copytree(nano_checkpoint, tmp_path / "checkpoint")
    name = "model.language_model.layers.2.self_attn.k_norm.weight"
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            tensors[name][5] = float("nan")
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match="layer 2 of the model computes values that are not finite"):
        calibrate(copy, prompts)
