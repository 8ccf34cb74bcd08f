"""Measures a nano checkpoint through Hugging Face: its processor, its model in float32, greedy `generate`.

`python -m tests.nano.evaluate` prints a table; `evaluate` returns the numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from tests.nano.checkpoint import MAX_PIXELS, MIN_PIXELS, TOKEN_PIXELS
from tests.nano.scenes import Clip, render, render_clip
from tests.nano.tasks import TASKS, Size

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 128
BATCH_SIZE = 64


@dataclass
class Prompt:
    """One answer to generate: the conversation up to it, its media drawn, what it should be."""

    kind: str
    messages: list[dict]
    images: list
    videos: list
    metadata: list[VideoMetadata]
    expected: str


def canvas(rng: random.Random, most: int = 400) -> tuple[Size, Size]:
    """A picture's size in pixels, any and odd, and the size its cells must be legible at: the smaller of that and what
    the processor resizes it to."""
    while True:
        area = math.exp(rng.uniform(math.log(64 * 64), math.log(most * most)))
        aspect = math.exp(rng.uniform(-math.log(3), math.log(3)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if min(width, height) < 60:
            continue
        resized = smart_resize(height, width, TOKEN_PIXELS, MIN_PIXELS, MAX_PIXELS)
        return (width, height), (min(width, resized[1]), min(height, resized[0]))


def make_prompts(task: str, samples: int, seed: int) -> list[Prompt]:
    """At least `samples` prompts of a task, on layouts held out from training. A dialogue gives one a turn."""
    prompts: list[Prompt] = []
    index = 0
    while len(prompts) < samples:
        rng = random.Random(f"evaluate {task} {seed} {index}")
        index += 1
        number = rng.randint(*TASKS[task].media)
        sizes = [canvas(rng, 160 if task == "video" else 400) for _ in range(number)]
        options: dict = {}
        suffix = ""
        if task.startswith("recall"):
            distance = rng.randint(100, 2000 if task == "recall" else 1000)
            options = {"length": distance + rng.randint(20, 80), "distance": distance}
            suffix = f" {distance // 500 * 500}+"
        talk = TASKS[task].make(rng, [legible for _, legible in sizes], True, **options)
        images, videos, metadata = [], [], []
        for item, (pixels, _) in zip(talk.media, sizes, strict=True):
            if isinstance(item, Clip):
                videos.append(render_clip(item, *pixels, seed=rng.getrandbits(32)))
                total = item.indices[-1] + 1
                metadata.append(VideoMetadata(total, fps=item.fps, frames_indices=list(item.indices)))
            else:
                images.append(render(item, *pixels, seed=rng.getrandbits(32)))
        for messages, media, kind, expected in talk.turns():
            if kind == "fact":
                continue
            shown = images[:media], videos[:media], metadata[:media]
            prompts.append(Prompt(kind + suffix * (kind == "recall"), messages, *shown, expected))
    return prompts


class Judge:
    """A checkpoint loaded through Hugging Face, float32, answering prompts greedily."""

    def __init__(self, folder: Path, device: str) -> None:
        torch.backends.cudnn.allow_tf32 = False
        self.device = device
        self.processor = AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self.model = model.to(device).eval()

    @torch.no_grad()
    def answer(self, prompts: list[Prompt]) -> list[str]:
        """The generated text of each prompt."""
        texts = [
            self.processor.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
            for prompt in prompts
        ]
        media: dict = {}
        if images := [image for prompt in prompts for image in prompt.images]:
            media["images"] = images
        if videos := [video for prompt in prompts for video in prompt.videos]:
            metadata = [entry for prompt in prompts for entry in prompt.metadata]
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(text=texts, padding=True, return_tensors="pt", **media).to(self.device)
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def evaluate(
    model_dir: Path | str = HERE / "checkpoint",
    tasks: tuple[str, ...] = tuple(TASKS),
    samples: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = BATCH_SIZE,
) -> dict[str, dict]:
    """Exact-match accuracy on held-out conversations.

    Returns for each task {"exact": share, "answers": count, "kinds": {kind: [right, answers]}, "wrong": [(expected,
    got), ...]}. Each turn of a dialogue is asked with the expected answers of the turns before it.
    """
    judge = Judge(Path(model_dir), device)
    results = {}
    with Progress() as progress:
        for task in tasks:
            prompts = make_prompts(task, samples, seed)
            prompts.sort(key=lambda prompt: len(str(prompt.messages)))
            kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0])
            wrong = []
            bar = progress.add_task(task, total=len(prompts))
            for first in range(0, len(prompts), batch_size):
                some = prompts[first : first + batch_size]
                for prompt, got in zip(some, judge.answer(some), strict=True):
                    kinds[prompt.kind][0] += got == prompt.expected
                    kinds[prompt.kind][1] += 1
                    if got != prompt.expected:
                        wrong.append((prompt.expected, got))
                progress.advance(bar, len(some))
            right = sum(count for count, _ in kinds.values())
            results[task] = {
                "exact": right / len(prompts),
                "answers": len(prompts),
                "kinds": {kind: kinds[kind] for kind in sorted(kinds)},
                "wrong": wrong,
            }
    return results


def check_pictures(model_dir: Path | str = HERE / "checkpoint", device: str = "cpu") -> list[tuple[str, str, str, str]]:
    """Asks the questions of pictures/pictures.json; returns (file, question, expected, got) of each."""
    from PIL import Image

    judge = Judge(Path(model_dir), device)
    folder = HERE / "pictures"
    rows = []
    for entry in json.loads((folder / "pictures.json").read_text(encoding="utf-8")):
        for turn in entry["questions"]:
            content = [{"type": "image"}, {"type": "text", "text": turn["question"]}]
            image = Image.open(folder / entry["file"])
            prompt = Prompt("", [{"role": "user", "content": content}], [image], [], [], turn["answer"])
            rows.append((entry["file"], turn["question"], turn["answer"], judge.answer([prompt])[0]))
    return rows


def print_table(results: dict[str, dict]) -> None:
    table = Table("task", "exact", "answers", "by kind")
    for task, result in results.items():
        kinds = ", ".join(f"{kind} {right / total:.3f}" for kind, (right, total) in result["kinds"].items())
        table.add_row(task, f"{result['exact']:.2%}", str(result["answers"]), kinds)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--samples", type=int, default=1000, help="answers a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--wrong", type=int, default=5, help="wrong answers to print a task")
    options = parser.parse_args()
    results = evaluate(
        options.checkpoint, tuple(options.tasks), options.samples, options.seed, options.device, options.batch_size
    )
    for task, result in results.items():
        for expected, got in result["wrong"][: options.wrong]:
            Console(width=160).print(f"{task}: expected {expected!r}, got {got!r}", markup=False)
    print_table(results)


if __name__ == "__main__":
    main()
