"""The nano checkpoint's files: configuration in the form of the real Qwen3-VL's, and how weights are written."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.nano.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE

PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH_SIZE = 16, 2, 2
TOKEN_PIXELS = PATCH_SIZE * MERGE_SIZE
"""Side of the square of pixels behind one visual token."""
MIN_PIXELS, MAX_PIXELS = 64 * 64, 256 * 256
VIDEO_MIN_PIXELS, VIDEO_MAX_PIXELS = 4 * 64 * 64, 8 * 128 * 128
SHARD_BYTES = 12_000_000
KEY_SPREAD = 100.0
"""Ratio of the largest to the smallest channel factor given to the keys."""

CHAT_TEMPLATE = """\
{%- set seen = namespace(pictures=0, videos=0) %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' or 'image' in part or 'image_url' in part %}
                {%- set seen.pictures = seen.pictures + 1 %}
                {%- if add_vision_id %}
                    {{- 'Picture ' ~ seen.pictures ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' or 'video' in part %}
                {%- set seen.videos = seen.videos + 1 %}
                {%- if add_vision_id %}
                    {{- 'Video ' ~ seen.videos ~ ': ' }}
                {%- endif %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in part %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def config(tokenizer: Tokenizer) -> dict:
    """config.json, with the keys and layout of the published Qwen3-VL checkpoints (transformers 4.57)."""
    token = tokenizer.token_to_id
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": token("<|image_pad|>"),
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": token("<|endoftext|>"),
            "dtype": "float16",
            "eos_token_id": token("<|im_end|>"),
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 256,
            "initializer_range": 0.02,
            "intermediate_size": 768,
            "max_position_embeddings": 8192,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 8,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": VOCAB_SIZE,
        },
        "tie_word_embeddings": True,
        "transformers_version": "4.57.0",
        "video_token_id": token("<|video_pad|>"),
        "vision_config": {
            "deepstack_visual_indexes": [1, 3, 4],
            "depth": 6,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 128,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 512,
            "model_type": "qwen3_vl",
            "num_heads": 2,
            "num_position_embeddings": 256,
            "out_hidden_size": 256,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        },
        "vision_end_token_id": token("<|vision_end|>"),
        "vision_start_token_id": token("<|vision_start|>"),
    }


def build_model(tokenizer: Tokenizer) -> Qwen3VLForConditionalGeneration:
    """A model with random weights, float32."""
    settings = config(tokenizer)
    settings["text_config"]["dtype"] = "float32"
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings))


def processor_files() -> dict[str, dict]:
    """The preprocessor configurations: what happens to pictures and videos before the vision encoder."""
    common = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": {
            "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
            **common,
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
        "video_preprocessor_config.json": {
            "size": {"shortest_edge": VIDEO_MIN_PIXELS, "longest_edge": VIDEO_MAX_PIXELS},
            **common,
            "fps": 2,
            "min_frames": 4,
            "max_frames": 8,
            "cap_pixels_per_frame": False,
            "video_processor_type": "Qwen3VLVideoProcessor",
        },
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for index, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def write_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes every file but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    files = {
        "config.json": config(tokenizer),
        "generation_config.json": {
            "bos_token_id": pad,
            "do_sample": False,
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
            "transformers_version": "4.57.0",
        },
        "tokenizer_config.json": tokenizer_config(tokenizer),
        **processor_files(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))


def spread_keys(state: dict[str, torch.Tensor], seed: int = 0) -> None:
    """Scales the channels of every key by factors log-uniform over KEY_SPREAD, and the queries by their inverse.

    Real Qwen3 keys have channels that are many times larger than others; trained from scratch, these do not. The two
    channels of a RoPE pair (i, i + head_dim / 2) get one factor, so the rotation commutes with it and q·k is unchanged.
    Works in place, in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(name for name in state if name.endswith("k_norm.weight")):
        keys, queries = state[name], state[name.replace("k_norm", "q_norm")]
        power = torch.rand(len(keys) // 2, generator=generator) - 0.5
        factor = torch.exp(power * math.log(KEY_SPREAD)).repeat(2).to(keys.device)
        keys.mul_(factor)
        queries.div_(factor)


def write_weights(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Writes float16 shards and their index, names as in the published checkpoints (the tied lm_head left out)."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        half = tensor.detach().to("cpu", torch.float16).contiguous()
        if used + half.nbytes > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = half
        used += half.nbytes
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in sorted(shard)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save(folder: Path, model: Qwen3VLForConditionalGeneration, tokenizer: Tokenizer) -> None:
    """Writes the whole checkpoint, keys spread, from a float32 model, which is left as it was."""
    write_settings(folder, tokenizer)
    state = {name: tensor.detach().float().clone() for name, tensor in model.state_dict().items()}
    spread_keys(state)
    write_weights(folder, state)
