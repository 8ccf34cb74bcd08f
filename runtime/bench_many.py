"""How many requests a model answers at once: through the scheduler, as they would come."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image
from rich.table import Table

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.bench import endless, own_sampling
from pascalvl.runtime.model import VisionLanguageModel
from pascalvl.runtime.sampling import Sampler, SamplingParams
from pascalvl.runtime.scheduler import Limits
from pascalvl.runtime.sequence import TokenSequence

_GREEDY = SamplingParams(temperature=0)
_SEED = 0
_QUESTIONS = "Describe the picture.", "How many colours does it have?", "Where is it brightest?"
_REPEATS_OF_PICTURE = 5


@dataclasses.dataclass(frozen=True)
class ManyOptions:
    """What is measured."""

    streams: int = 8
    """Answers that are written at once."""
    depth: int = 4096
    """Tokens of each one's prompt."""
    steps: int = 200
    """Tokens of each answer that are timed."""
    arriving: int = 4096
    """Tokens of a prompt that comes while the others write; 0: none does."""
    picture: int = 1024
    """Side of the square picture, in pixels; 0: there is none."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("streams", 1, Limits.sequences),
            ("depth", 1, None),
            ("steps", 1, None),
            ("arriving", 0, None),
            ("picture", 0, 4096),
        ):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                expected = f"{least} to {most}" if most else f"a number from {least}"
                raise UserError(f"{name} is out of range: expected {expected}, found {value}.")

    @property
    def context(self) -> int:
        """Tokens of the longest sequence."""
        written = self.steps + self.arriving // (Limits.chunk_beside // 2) + 32
        return max(self.depth + written, self.arriving + 2, self.picture**2 // 1024 + 256)


@dataclasses.dataclass(frozen=True)
class Writing:
    """Answers that are written at once."""

    sampling: str
    tokens_per_second: float
    """Of all of them."""
    host_us: float
    """Of a step, outside the engine: scheduling, feeds, sampling's numbers, text; microseconds."""
    scheduler_us: float
    """Of these, scheduling alone."""
    prompt_tokens_per_second: float
    """While their prompts were computed, before any of them wrote."""
    gap_ms: tuple[float, float] | None
    """Median and 99th percentile of the time between two tokens of theirs, while another prompt comes."""


@dataclasses.dataclass(frozen=True)
class ManyResult:
    """What was measured of a model."""

    source: str
    backend: str
    gpu: str | None
    weights: str
    kv_cache: str
    options: ManyOptions
    writing: tuple[Writing, ...]
    first_token_ms: tuple[float, float, float] | None
    """Of a question about a picture that was never seen before, of another about it, and of one whose pages wait on the
    host."""


def measure(
    model: VisionLanguageModel, options: ManyOptions, progress: Callable[[str], None] = lambda _: None
) -> ManyResult:
    """Run all that ``options`` say; the model has room for `ManyOptions.context` tokens of each stream and one more.

    Args:
        model: what is measured; what it keeps of earlier prompts is forgotten.
        options: what of it.
        progress: called before each run with what that is.
    """
    own = own_sampling(model)
    samplings = {"the likeliest": _GREEDY} | ({} if own is None else {"the checkpoint's own": own})
    with endless(model):
        progress("a first run")
        _writing(model, "", _GREEDY, dataclasses.replace(options, steps=2))
        writing = []
        for name, sampling in samplings.items():
            progress(f"{options.streams} answers, tokens: {name}")
            writing.append(_writing(model, name, sampling, options))
        progress("a picture")
        pictures = _pictures(model, options.picture) if options.picture else None
    manifest = model.manifest
    return ManyResult(
        manifest.source["name"],
        manifest.backend["name"],
        model.gpu,
        str(manifest.weights),
        str(model.cache_config),
        options,
        tuple(writing),
        pictures,
    )


def _writing(model: VisionLanguageModel, name: str, sampling: SamplingParams, options: ManyOptions) -> Writing:
    scheduler = model.scheduler
    scheduler.tree.clear()
    random = np.random.default_rng(_SEED)
    prompts = [_prompt(model, random, options.depth) for _ in range(options.streams)]
    begun = time.perf_counter()
    for prompt in prompts:
        scheduler.submit(model.sequence_of(prompt, sampling, 1))
    while not scheduler.is_idle:
        scheduler.step()
    prompt_rate = options.streams * options.depth / (time.perf_counter() - begun)
    sequences = [model.sequence_of(prompt, sampling, options.context - options.depth) for prompt in prompts]
    for sequence in sequences:
        scheduler.submit(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        scheduler.step()
    with (
        _timed(scheduler.session, "choose") as inside,
        _timed(model.steps, "next_tokens") as feeds,
        _timed(Sampler, "next") as samplers,
        _timed(TokenSequence, "accept") as texts,
    ):
        begun = time.perf_counter()
        for _ in range(options.steps):
            scheduler.step()
        seconds = time.perf_counter() - begun
    gaps = []
    if options.arriving:
        scheduler.cancel(sequences.pop())
        arriving = model.sequence_of(_prompt(model, random, options.arriving), sampling, 2)
        scheduler.submit(arriving)
        while not arriving.is_decoding:
            begun = time.perf_counter()
            scheduler.step()
            gaps.append(1e3 * (time.perf_counter() - begun))
        sequences.append(arriving)
    for sequence in sequences:
        scheduler.cancel(sequence)
    return Writing(
        name,
        options.streams * options.steps / seconds,
        1e6 * (seconds - sum(inside)) / options.steps,
        1e6 * (seconds - sum(inside) - sum(feeds) - sum(samplers) - sum(texts)) / options.steps,
        prompt_rate,
        (float(np.median(gaps)), float(np.quantile(gaps, 0.99))) if gaps and len(sequences) > 1 else None,
    )


def _prompt(model: VisionLanguageModel, random: np.random.Generator, length: int) -> Prompt:
    """Of random tokens."""
    return Prompt(random.integers(model.config.text.vocab_size, size=length))


@contextmanager
def _timed(owner: object, name: str) -> Iterator[list[float]]:
    """Inside, the seconds that each call of a method takes."""
    method, seconds = getattr(owner, name), []

    def timed(*arguments: object) -> object:
        begun = time.perf_counter()
        try:
            return method(*arguments)
        finally:
            seconds.append(time.perf_counter() - begun)

    setattr(owner, name, timed)
    try:
        yield seconds
    finally:
        setattr(owner, name, method)


def _pictures(model: VisionLanguageModel, side: int) -> tuple[float, float, float]:
    random, rows = np.random.default_rng(_SEED), []
    tree, pool = model.scheduler.tree, model.scheduler.pool
    for _ in range(1 + _REPEATS_OF_PICTURE):
        picture = Image.fromarray(random.integers(256, size=(side, side, 3), dtype=np.uint8))
        row = []
        for question in _QUESTIONS:
            if question == _QUESTIONS[-1]:
                tree.make_room(len(pool))
            content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
            begun = time.perf_counter()
            for _ in model.generate([{"role": "user", "content": content}], _GREEDY, 1):
                pass
            row.append(1e3 * (time.perf_counter() - begun))
        rows.append(row)
    first, again, from_host = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    return first, again, from_host


def tables(result: ManyResult) -> Sequence[Table]:
    """What a person reads of a result."""
    options = result.options
    formats = f"weights {result.weights}, KV cache {result.kv_cache}"
    table = Table(title=f"{result.source}: {result.backend} on {result.gpu or 'the CPU'}, {formats}")
    for heading in (
        f"{options.streams} answers behind {options.depth:,} tokens",
        "tok/s of all",
        "host, us a step",
        "of it the scheduler",
        "their prompts, tok/s",
        f"between tokens while {options.arriving:,} come, ms",
        "p99",
    ):
        table.add_column(heading, justify="right")
    for row in result.writing:
        gaps = [f"{gap:.1f}" for gap in row.gap_ms] if row.gap_ms else ["", ""]
        rates = row.tokens_per_second, row.host_us, row.scheduler_us, row.prompt_tokens_per_second
        table.add_row(row.sampling, *(f"{rate:,.0f}" for rate in rates), *gaps)
    if result.first_token_ms is None:
        return [table]
    picture = Table(title=f"a picture of {options.picture}x{options.picture}, until the first token")
    for heading in ("never seen before, ms", "seen before, ms", "its pages on the host, ms"):
        picture.add_column(heading, justify="right")
    picture.add_row(*(f"{ms:,.1f}" for ms in result.first_token_ms))
    return [table, picture]
