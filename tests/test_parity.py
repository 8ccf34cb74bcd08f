"""Greedy answers token for token equal to Hugging Face `generate` in float32, through the whole pipeline.

The reference runs on its own: Hugging Face's processor, template, positions and cache. Its pictures go through its
Pillow image processor, which rounds as ours does; the frames of the videos have sizes that need no resizing.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen2VLImageProcessorPil
from transformers.video_utils import VideoMetadata

from pascalvl.engines.device.memory import available_target
from pascalvl.plugins.kernels.build import Target
from pascalvl.runtime import SamplingParams, VisionLanguageModel
from pascalvl.runtime.video import Video
from tests.nano.scenes import render, render_clip
from tests.nano.tasks import TASKS

MAX_NEW_TOKENS = 64
GREEDY = SamplingParams(temperature=0)
PICTURE_SIZES = [(96, 64), (201, 133), (77, 190), (256, 256), (400, 97), (64, 64), (333, 111), (128, 224), (1200, 900)]
CLIP_SIZES = [(64, 64), (96, 64), (64, 96), (128, 64)]

# Task, number of prompts, what its generator is told. Long recall prompts have more than 1,500 tokens.
PROMPTS = [
    ("text", 8, {}),
    ("picture", 14, {}),
    ("pictures", 8, {}),
    ("video", 8, {}),
    ("dialogue", 8, {"turns": 3}),
    ("recall", 3, {"length": 300}),
    ("recall", 4, {"length": 1650, "distance": 1500}),
    ("recall_picture", 2, {"length": 300}),
]
CASES = [(task, seed, options) for task, count, options in PROMPTS for seed in range(count)]


def conversation(task: str, seed: int, options: dict) -> tuple[list[dict], list[Image.Image], list[Video]]:
    """Messages up to a generated conversation's last question, its media in their parts; and the media again."""
    rng = random.Random(f"parity {task} {seed}")
    fewest, most = TASKS[task].media
    count = 3 if task == "pictures" else rng.randint(fewest, most)
    sizes = rng.sample(CLIP_SIZES if task == "video" else PICTURE_SIZES, count)
    messages, shown, _, _ = (talk := TASKS[task].make(rng, sizes, True, **options)).turns()[-1]
    media = [
        Video([Image.fromarray(f) for f in render_clip(item, *size, seed=seed)], item.fps, tuple(item.indices))
        if task == "video"
        else render(item, *size, seed=seed)
        for item, size in zip(talk.media[:shown], sizes, strict=False)
    ]
    waiting = iter(media)
    filled = [
        {**message, "content": [_fill(part, waiting) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
    images = [item for item in media if not isinstance(item, Video)]
    return filled, images, [item for item in media if isinstance(item, Video)]


def _fill(part: dict, media) -> dict:
    return part if part["type"] == "text" else {**part, part["type"]: next(media)}


@pytest.fixture(scope="module")
def processor(nano_checkpoint):
    processor = AutoProcessor.from_pretrained(nano_checkpoint)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(nano_checkpoint)
    return processor


@pytest.fixture(scope="module", params=["onnxruntime", "cuda"])
def model(request, nano_engine):
    if request.param == "cuda" and available_target() is not Target.CUDA:
        pytest.skip("needs a GPU; on the emulator, tests/engines/test_cuda_backend.py has shorter ones")
    return VisionLanguageModel.open(nano_engine("f32", request.param))


def reference_inputs(processor, messages, images, videos):
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    media = {"images": images} if images else {}
    if videos:
        frames = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
        metadata = [
            VideoMetadata(v.frame_indices[-1] + 1, fps=v.fps, frames_indices=list(v.frame_indices)) for v in videos
        ]
        media |= {"videos": frames, "video_metadata": metadata, "do_sample_frames": False}
    return processor(text=[text], return_tensors="pt", **media)


def reference_tokens(model, inputs):
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokens[0, inputs["input_ids"].shape[1] :].tolist()


def answer(model, messages, **options):
    generation = model.generate(messages, GREEDY, MAX_NEW_TOKENS, **options)
    for _ in generation:
        pass
    return generation


@pytest.mark.parametrize(
    ("task", "seed", "options"), CASES, ids=[f"{t}-{o.get('length', '')}-{s}" for t, s, o in CASES]
)
def test_tokens_equal_the_reference(task, seed, options, model, nano_reference, processor):
    messages, images, videos = conversation(task, seed, options)
    inputs = reference_inputs(processor, messages, images, videos)
    if options.get("length", 0) > 1500:
        assert inputs["input_ids"].shape[1] > 1500
    generation = answer(model, messages)
    assert generation.prompt_tokens == inputs["input_ids"].shape[1]
    assert generation.token_ids == reference_tokens(nano_reference, inputs)


def test_logits_are_within_float32_of_the_reference(model, nano_reference, processor):
    """Logits of size 20 and more, after 6 layers summed in another order: within 2e-4, measured 3e-5."""
    from pascalvl.runtime.validation import trace  # needs polygraphy, which is not where GPUs are

    messages, images, videos = conversation("pictures", 100, {})
    inputs = reference_inputs(processor, messages, images, videos)
    with torch.no_grad():
        expected = nano_reference(**inputs).logits[0, -1].numpy()
    found = trace(model, messages, [])["prefill.logits"][0]
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)


def test_turns_of_a_conversation_reuse_the_cache_and_answer_the_same(nano_engine_bundle, nano_reference, processor):
    """Asked turn by turn, with the model's own answers as history; each turn against the reference from the start."""
    model = VisionLanguageModel.open(nano_engine_bundle)
    messages, images, _ = conversation("dialogue", 3, {"turns": 3})
    asked = []
    for turn, message in enumerate(m for m in messages if m["role"] != "assistant"):
        asked.append(message)
        if message["role"] == "system":
            continue
        generation = answer(model, asked)
        placeholders = sum(p["type"] == "image" for m in asked if isinstance(m["content"], list) for p in m["content"])
        inputs = reference_inputs(processor, asked, images[:placeholders], [])
        assert generation.token_ids == reference_tokens(nano_reference, inputs)
        assert (generation.reused_tokens > 0) == (turn > (asked[0]["role"] == "system"))
        asked.append({"role": "assistant", "content": generation.text})


def test_half_precision_cache_gives_the_same_answers(nano_engine, nano_reference, processor):
    model = VisionLanguageModel.open(nano_engine("f16"))
    for case in [("picture", 1, {}), ("recall", 0, {"length": 300}), ("video", 0, {})]:
        messages, images, videos = conversation(*case)
        inputs = reference_inputs(processor, messages, images, videos)
        assert answer(model, messages).token_ids == reference_tokens(nano_reference, inputs)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_one_shot(nano_engine_bundle, chunk):
    from pascalvl.runtime.validation import trace  # needs polygraphy, which is not where GPUs are

    messages, _, _ = conversation("pictures", 2, {})
    whole, chunked = (VisionLanguageModel.open(nano_engine_bundle, prefill_chunk=c) for c in (4096, chunk))
    tokens = answer(whole, messages).token_ids
    assert answer(chunked, messages).token_ids == tokens
    expected, found = (trace(m, messages, tokens) for m in (whole, chunked))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-4, rtol=0, err_msg=name)
