"""Prompts for the torch backend, and Hugging Face's greedy answers to the same tokens and pixels.

(That tokens and pixels are what Hugging Face makes of a prompt is for `tests/test_parity.py` to show, on the CPU.)
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from pascalvl.export.checkpoint import model_inputs
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime import Generation, SamplingParams, VisionLanguageModel
from pascalvl.runtime.video import Video
from tests.nano.scenes import render, sample_scene

GREEDY = SamplingParams()


def scene(seed: int, width: int, height: int, rows: int = 2, columns: int = 3) -> Image.Image:
    return render(sample_scene(random.Random(seed), rows, columns), width, height)


def user(*content: str | Image.Image | Video) -> dict:
    kinds = {str: "text", Video: "video", Image.Image: "image"}
    return {"role": "user", "content": [{"type": kinds[type(c)], kinds[type(c)]: c} for c in content]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def kept_pages(model) -> list:
    """Nodes of the longest conversation that is kept."""
    paths = []
    for node in model.scheduler.tree._in_pool:
        path = []
        while node.page is not None:
            path.insert(0, node)
            node = node.parent
        paths.append(path)
    return max(paths, key=lambda path: sum(len(node.identities) for node in path), default=[])


def kept_tokens(model) -> int:
    """Tokens of that conversation."""
    return sum(len(node.identities) for node in kept_pages(model))


def answer(
    model: VisionLanguageModel, messages: list[dict], new_tokens: int, sampling: SamplingParams = GREEDY
) -> Generation:
    generation = model.generate(messages, sampling, new_tokens)
    for _ in generation:
        pass
    return generation


def reference_answer(
    reference: Qwen3VLForConditionalGeneration, prompt: Prompt, new_tokens: int, **options: object
) -> tuple[list[int], np.ndarray]:
    """Hugging Face's answer to a prompt, on the device that the model is on: tokens [n], logits [n, vocab_size]."""
    inputs = {name: tensor.to(reference.device) for name, tensor in model_inputs(reference, prompt).items()}
    with torch.no_grad():
        result = reference.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            **options,
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return result.sequences[0, len(prompt.token_ids) :].tolist(), torch.cat(result.logits).cpu().numpy()
