"""Trains the nano checkpoint on one GPU in under ten minutes: `python -m tests.nano.train --out DIR`."""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import nn
from torch._inductor import config as inductor
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3VLForConditionalGeneration

from tests.nano import checkpoint, tokenizer
from tests.nano.auxiliary import PatchHeads
from tests.nano.batches import MAX_RECALL, Batch, make_batch, patchify, pixels
from tests.nano.forward import Forward
from tests.nano.optimiser import optimisers
from tests.nano.scenes import put
from tests.nano.tasks import TASKS

ROTATION = (
    "recall",
    "pictures",
    "video",
    "recall_picture",
    "pictures",
    "dialogue",
    "recall",
    "text",
    "video",
    "picture",
)
"""A step trains a batch of the picture task and one of these, in turn."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    steps: int = 4000
    minutes: float = 8.8
    """Wall-clock budget: the schedule follows the slower clock, so a slow GPU anneals early and still ends well."""
    matrix_lr: float = 6e-3
    other_lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.02
    picture_tokens: int = 56_000
    other_tokens: int = 40_000
    patch_share: float = 0.5
    """Share of the training in which the patch labels are learned too."""
    curriculum: float = 0.25
    """Share of the steps over which the longest recall grows from 128 to 2,048 tokens."""


@dataclass
class Steps(Dataset):
    """The batches of each step, a pure function of the recipe and the step."""

    recipe: Recipe
    tokenizer: Tokenizer

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> list[Batch]:
        recipe = self.recipe
        grown = min(1.0, step / (recipe.curriculum * recipe.steps))
        max_recall = round(128 * (MAX_RECALL / 128) ** grown)
        seed = recipe.seed * 1_000_000 + 2 * step
        plans = (("picture", recipe.picture_tokens), (ROTATION[step % len(ROTATION)], recipe.other_tokens))
        return [make_batch(seed + i, self.tokenizer, *plan, max_recall) for i, plan in enumerate(plans)]


def untouched(batches: list[Batch]) -> list[Batch]:
    """The loader's collate function: workers already make whole batches."""
    return batches


@torch.no_grad()
def whiten_patches(model: Qwen3VLForConditionalGeneration, batches: list[Batch], device: torch.device) -> None:
    """Starts the patch embedding at the pictures' principal components, each scaled to unit variance.

    A patch is mostly its background's brightness; started at random, the embedding tells little else, and shapes are
    learned hundreds of steps later than colours.
    """
    convolution = model.model.visual.patch_embed.proj
    shape = convolution.weight.shape  # [hidden, channels, pair, patch, patch]
    patches = torch.cat([patchify(pixels(slot, device)).flatten(0, 1) for batch in batches for slot in batch.slots])
    patches = patches.view(-1, *shape[1:]).mean(2).flatten(1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    weight = (vectors / (values + 1e-2).sqrt()).flip(1)[:, : shape[0]].T
    convolution.weight.copy_(weight.view(shape[0], shape[1], 1, *shape[3:]).expand(shape) / shape[2])
    convolution.bias.copy_(-weight @ mean)


def schedule(recipe: Recipe, step: int, progress: float) -> float:
    """Factor on the learning rates: linear warm-up, then a cosine down to nothing at progress 1."""
    return min(1.0, (step + 1) / recipe.warmup) * (1 + math.cos(math.pi * progress)) / 2


def held_out_accuracy(forward: Forward, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Share of answers in held-out batches whose every token is the most likely one, by task.

    Runs with gradients on, which costs nothing here and saves compiling the blocks a second time.
    """
    right: dict[str, list[torch.Tensor]] = defaultdict(list)
    for batch in batches:
        wrong = forward(batch, device).logits.argmax(-1) != put(batch.labels, device)
        errors = torch.zeros(len(batch.kinds), device=device).index_add(0, put(batch.answer, device), wrong.float())
        right[batch.task].append(errors == 0)
    return {task: torch.cat(parts).float().mean().item() for task, parts in right.items()}


def train(recipe: Recipe, out: Path, device: torch.device, workers: int, compiled: bool) -> None:
    """Trains from scratch and writes the checkpoint to `out`."""
    console = Console(width=160, highlight=False)
    start = time.monotonic()
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans every new shape anew; the flash kernels do not
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False  # would compile anew at certain sizes
    text = tokenizer.train()
    torch.manual_seed(recipe.seed)
    model = checkpoint.build_model(text).to(device)
    whiten_patches(model, [make_batch(-1 - i, text, "picture", 2000) for i in range(8)], device)
    heads = PatchHeads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size).to(device)
    forward = Forward(model, compiled)
    both = nn.ModuleList([model, heads])
    steppers = optimisers(both, recipe.matrix_lr, recipe.other_lr, recipe.weight_decay)
    peaks = [recipe.matrix_lr, recipe.other_lr]
    loader = DataLoader(
        Steps(recipe, text), batch_size=None, num_workers=workers, prefetch_factor=8, collate_fn=untouched
    )
    held_out = [make_batch(i, text, task, 12_000, held_out=True) for task in TASKS for i in range(3)]
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters; ready {time.monotonic() - start:.0f} s")

    losses: dict[str, list[torch.Tensor]] = defaultdict(list)
    for step, batches in enumerate(loader):
        elapsed = time.monotonic() - start
        progress = max(step / recipe.steps, elapsed / (60 * recipe.minutes))
        if progress >= 1:
            break
        for stepper, peak in zip(steppers, peaks, strict=True):
            for group in stepper.param_groups:
                group["lr"] = peak * schedule(recipe, step, progress)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16):
                output = forward(batch, device)
                patch_loss = torch.zeros((), device=device)
                slots = zip(batch.slots, output.patches, output.tokens, strict=True)
                for slot, patches, tokens in slots if progress < recipe.patch_share else ():
                    labels = put(slot.patch_labels, device).flatten(0, 1).long()
                    patch_loss = patch_loss + heads(patches, tokens, labels) / len(batch.slots)
            labels, weights = put(batch.labels, device).long(), put(batch.weights, device)
            loss = (
                nn.functional.cross_entropy(output.logits.float(), labels, reduction="none") @ weights / weights.sum()
            )
            (loss + patch_loss).backward()
            losses[batch.task].append(loss.detach())
            if batch.slots and progress < recipe.patch_share:
                losses["patches"].append(patch_loss.detach())
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        if (step + 1) % 100 == 0:
            report = " ".join(f"{task} {torch.stack(values).mean():.3f}" for task, values in losses.items())
            console.print(f"step {step + 1} {time.monotonic() - start:.0f} s loss: {report}")
            losses.clear()
        if (step + 1) % 500 == 0:
            with torch.autocast(device.type, torch.bfloat16):
                scores = held_out_accuracy(forward, held_out, device)
            console.print("  held out: " + " ".join(f"{task} {score:.3f}" for task, score in scores.items()))
    checkpoint.save(out, model, text)
    console.print(f"{step + 1} steps, {time.monotonic() - start:.0f} s, saved to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    defaults = Recipe()
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="wall-clock budget")
    parser.add_argument("--tokens", type=float, default=1.0, help="factor on the size of every batch")
    parser.add_argument("--workers", type=int, default=8, help="processes that prepare batches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-compile", action="store_true", help="run the blocks without torch.compile")
    options = parser.parse_args()
    recipe = Recipe(
        seed=options.seed,
        steps=options.steps,
        minutes=options.minutes,
        picture_tokens=round(defaults.picture_tokens * options.tokens),
        other_tokens=round(defaults.other_tokens * options.tokens),
    )
    train(recipe, options.out, torch.device(options.device), options.workers, not options.no_compile)


if __name__ == "__main__":
    main()
