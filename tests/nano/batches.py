"""Training batches: conversations of one task and one picture size a slot, as arrays ready for the GPU.

A batch is made on the CPU by worker processes (text, token ids, positions, what the pictures show); the pictures
themselves are drawn on the GPU, see `pixels`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import jinja2.sandbox
import numpy as np
import torch
from tokenizers import Tokenizer

from tests.nano.auxiliary import patch_labels
from tests.nano.checkpoint import (
    CHAT_TEMPLATE,
    MAX_PIXELS,
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    TOKEN_PIXELS,
    VIDEO_MAX_PIXELS,
)
from tests.nano.scenes import Drawing, draw, draw_clips, paint, put, rasterise
from tests.nano.tasks import MAX_FRAMES, MIN_FRAMES, TASKS, Conversation, Size

MAX_PICTURE_TOKENS = MAX_PIXELS // TOKEN_PIXELS**2
MAX_RECALL = 2048
NESTED_VIDEO = 0.75
"""Share of video batches in the form of transformers 5, which leaves vision_start and vision_end around the whole
video as well as around each temporal patch; transformers 4.57 replaced them."""


@dataclass(frozen=True)
class Slot:
    """The pictures (or videos) that stand in one place of every conversation of a batch, all of one size."""

    drawing: Drawing
    """`frames` pictures a conversation."""
    frames: int
    source: Size
    """Size drawn at, before the processor's resize."""
    size: Size
    """Size after it."""
    patch_labels: np.ndarray
    """What stands behind each patch: uint8 [pictures, patches, 6], see tests.nano.auxiliary."""


@dataclass(frozen=True)
class Batch:
    """Arrays of one batch of `batch` conversations, right-padded to `length` tokens."""

    task: str
    slots: list[Slot]
    input_ids: np.ndarray  # [batch, length] int32
    position_ids: np.ndarray  # [3, batch, length] int32
    visual_index: np.ndarray  # [batch, visual tokens] int32, their places in the sequence
    label_index: np.ndarray  # [labels] int32, flat places whose next token is trained
    labels: np.ndarray  # [labels] int32, those next tokens
    answer: np.ndarray  # [labels] int32, which answer of the batch a label belongs to
    weights: np.ndarray  # [labels] float32, its share in the loss: an answer weighs the root of its length
    kinds: list[str]  # one an answer


@functools.cache
def template() -> jinja2.Template:
    """The checkpoint's chat template, compiled as transformers compiles it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(CHAT_TEMPLATE)


def sample_tokens(rng: random.Random, most: int = MAX_PICTURE_TOKENS, least: int = 4) -> Size:
    """A picture's size in visual tokens: area uniform, aspect ratio log-uniform up to 3."""
    area = rng.uniform(least, most)
    aspect = math.exp(rng.uniform(-math.log(3), math.log(3)))
    width = max(2, round(math.sqrt(area * aspect)))
    height = max(2, round(math.sqrt(area / aspect)))
    while width * height > most:
        width, height = (width - 1, height) if width > height else (width, height - 1)
    return width, height


def sample_source(rng: random.Random, size: Size) -> Size:
    """The size a picture is drawn at, so that resizing it to `size` leaves the traces that real files show."""
    chance = rng.random()
    if chance < 0.3:
        return size
    scale = math.exp(rng.uniform(0, math.log(1.8))) if chance < 0.75 else rng.uniform(0.8, 1)
    return round(size[0] * scale * rng.uniform(0.92, 1.08)), round(size[1] * scale * rng.uniform(0.92, 1.08))


@dataclass(frozen=True)
class Plan:
    """What a batch holds, before any conversation is drawn."""

    task: str
    grids: tuple[Size, ...]
    """Width and height in visual tokens of each slot."""
    options: dict[str, int]
    """Arguments of the task's generator."""
    frames: int
    conversations: int


def sample_plan(rng: random.Random, task: str, budget: int, max_recall: int) -> Plan:
    """Draws sizes and lengths, and as many conversations as about `budget` tokens hold."""
    least, most = TASKS[task].media
    number = rng.randint(least, most)
    frames = 0
    tokens = MAX_PICTURE_TOKENS
    text = rng.choice((0, 60, 110, 160))
    options = {"tokens": text}
    if task == "video":
        frames = rng.randint(MIN_FRAMES, MAX_FRAMES)
        tokens = VIDEO_MAX_PIXELS // (frames * TOKEN_PIXELS**2)
        options["frames"] = frames
    elif task == "dialogue":
        text = 90
        options = {}
    elif task.startswith("recall"):
        top = max_recall if task == "recall" else max_recall // 2
        length = round(math.exp(rng.uniform(math.log(32), math.log(top - 40))))
        turns = rng.choice((1, 4, 8, 8))
        tokens = 32
        text = length + 24 * turns
        options = {"length": length, "turns": turns}
    grids = tuple(sample_tokens(rng, tokens) for _ in range(number))
    visual = sum(width * height for width, height in grids) * max(1, -(-frames // TEMPORAL_PATCH_SIZE))
    return Plan(task, grids, options, frames, max(8, min(768, budget // (80 + text + visual))))


def make_conversations(rng: random.Random, plan: Plan, held_out: bool) -> list[Conversation]:
    sizes = [(width * TOKEN_PIXELS, height * TOKEN_PIXELS) for width, height in plan.grids]
    return [TASKS[plan.task].make(rng, sizes, held_out, **plan.options) for _ in range(plan.conversations)]


def expand(text: str, talk: Conversation, plan: Plan, nested: bool) -> str:
    """Replaces each placeholder by as many as there are visual tokens, as the Hugging Face processor does."""
    for width, height in plan.grids:
        count = width * height
        if plan.task == "video":
            frame = f"<|vision_start|>{'<|video_pad|>' * count}<|vision_end|>"
            frames = "".join(f"<{time} seconds>{frame}" for time in talk.media[0].timestamps())
            placeholder = "<|video_pad|>" if nested else "<|vision_start|><|video_pad|><|vision_end|>"
            return text.replace(placeholder, frames)
        text = text.replace("<|image_pad|>", "<|picture|>" * count, 1)
    return text.replace("<|picture|>", "<|image_pad|>")


def blocks(plan: Plan) -> list[Size]:
    """Sizes, in visual tokens, of the runs of visual tokens in a conversation: a picture each, or a temporal patch."""
    return [grid for grid in plan.grids for _ in range(max(1, -(-plan.frames // TEMPORAL_PATCH_SIZE)))]


def mrope_positions(visual_index: np.ndarray, grids: list[Size], length: int) -> np.ndarray:
    """Temporal, height and width positions [3, batch, length] (Qwen3-VL: a picture advances by its longer side)."""
    advance = np.ones((len(visual_index), length), np.int32)
    offset = np.zeros((3, len(visual_index), length), np.int32)
    steps, rows, cols = [], [], []
    for width, height in grids:
        steps += [0] * (width * height - 1) + [max(width, height)]
        rows += [i // width for i in range(width * height)]
        cols += [i % width for i in range(width * height)]
    if grids:
        np.put_along_axis(advance, visual_index, np.array([steps], np.int32), 1)
        for axis, values in ((1, rows), (2, cols)):
            np.put_along_axis(offset[axis], visual_index, np.array([values], np.int32), 1)
    return offset + advance.cumsum(1, dtype=np.int32) - advance


def collate(plan: Plan, talks: list[Conversation], tokenizer: Tokenizer, nested: bool) -> dict:
    """Token ids, positions and labels of the plan's conversations, as Batch's fields."""
    texts = [expand(template().render(messages=talk.messages), talk, plan, nested) for talk in talks]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    length = -(-max(map(len, encoded)) // 16) * 16
    token = tokenizer.token_to_id
    ids = np.full((len(encoded), length), token("<|endoftext|>"), np.int32)
    for row, values in zip(ids, encoded, strict=True):
        row[: len(values)] = values
    pad = token("<|video_pad|>" if plan.task == "video" else "<|image_pad|>")
    visual = np.flatnonzero(ids.ravel() == pad).reshape(len(ids), -1) % length
    flat = ids.ravel()
    starts = np.flatnonzero((flat[:-1] == token("<|im_start|>")) & (flat[1:] == token("assistant"))) + 3
    ends = np.flatnonzero(flat == token("<|im_end|>"))
    ends = ends[np.searchsorted(ends, starts)]
    index = np.concatenate([np.arange(start - 1, end) for start, end in zip(starts, ends, strict=True)])
    lengths = ends - starts + 1
    return {
        "input_ids": ids,
        "position_ids": mrope_positions(visual, blocks(plan), length),
        "visual_index": visual.astype(np.int32),
        "label_index": index.astype(np.int32),
        "labels": flat[index + 1],
        "answer": np.repeat(np.arange(len(starts), dtype=np.int32), lengths),
        "weights": np.repeat(1 / np.sqrt(lengths), lengths).astype(np.float32),
        "kinds": [kind for talk in talks for kind in talk.kinds],
    }


def make_batch(
    seed: int, tokenizer: Tokenizer, task: str, budget: int, max_recall: int = MAX_RECALL, held_out: bool = False
) -> Batch:
    """One batch, a pure function of its arguments."""
    rng = random.Random(f"{'held-out' if held_out else 'train'} {task} {seed}")
    generator = np.random.default_rng(rng.getrandbits(64))
    plan = sample_plan(rng, task, budget, max_recall)
    talks = make_conversations(rng, plan, held_out)
    slots = []
    for i, (width, height) in enumerate(plan.grids):
        size = width * TOKEN_PIXELS, height * TOKEN_PIXELS
        media = [talk.media[i] for talk in talks]
        drawing = draw_clips(media, generator) if plan.task == "video" else draw(media, generator)
        frames = max(1, plan.frames)
        pairs = drawing.take(np.arange(len(drawing.grid)).reshape(-1, frames)[:, ::TEMPORAL_PATCH_SIZE].ravel())
        labels = patch_labels(pairs, size[1] // PATCH_SIZE, size[0] // PATCH_SIZE)
        slots.append(Slot(drawing, frames, sample_source(rng, size), size, labels))
    return Batch(task, slots, **collate(plan, talks, tokenizer, rng.random() < NESTED_VIDEO))


@functools.lru_cache(4096)
def resize_weights(size: int, new_size: int) -> np.ndarray:
    """Antialiased bicubic (a = -0.5) resampling of one axis as a matrix [new_size, size], as in Pillow and torch."""
    scale = size / new_size
    support = max(scale, 1.0)
    centre = (np.arange(new_size) + 0.5) * scale
    x = np.abs((np.arange(size) + 0.5 - centre[:, None]) / support)
    weights = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


@torch.no_grad()
def pixels(slot: Slot, device: torch.device | str, painter: Callable = paint) -> torch.Tensor:
    """Draws a slot and preprocesses it as the Hugging Face processors do.

    Returns [batch, frames, 3, height, width], float32 in [-1, 1].
    """
    with torch.autocast(torch.device(device).type, enabled=False):
        image = rasterise(slot.drawing, *slot.source, device, painter)
        noise = put(slot.drawing.noise, device)[:, None, None, None]
        image = torch.addcmul(image, torch.randn_like(image), noise).round_().clamp_(0, 255)
        if slot.source != slot.size:
            across, down = (put(resize_weights(*sizes), device) for sizes in zip(slot.source, slot.size, strict=True))
            image = (down @ image @ across.T).clamp_(0, 255).round_()
        return (image / 127.5 - 1).unflatten(0, (-1, slot.frames))


def patchify(frames: torch.Tensor) -> torch.Tensor:
    """Frames [batch, frames, 3, height, width] to patches [batch * temporal patches, patches, patch size], in the order
    of the Hugging Face processors: the four patches of a visual token together. An odd last frame is doubled."""
    if frames.shape[1] % TEMPORAL_PATCH_SIZE:
        frames = torch.cat([frames, frames[:, -1:]], 1)
    frames = frames.unflatten(1, (-1, TEMPORAL_PATCH_SIZE))
    for axis in (4, 7):
        frames = frames.unflatten(axis, (-1, MERGE_SIZE, PATCH_SIZE))
    # [batch, time, pair, channel, rows, merge, patch, cols, merge, patch]
    frames = frames.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    return frames.flatten(6).flatten(2, 5).flatten(0, 1)
