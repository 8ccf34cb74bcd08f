"""How fast a model answers, in the manner of llama-bench: what a user of `generate` waits for, at several depths.

A depth is the number of tokens of a conversation that are in the KV cache already. A prefill puts them there once; each
repeat puts tokens of its own behind them, for which the cache is truncated to the depth, as it is in a chat whose last
question is asked anew. Sequences that decode together have that depth each, in pages of their own. Prompts are random
tokens, as many as they are meant to be, whatever the tokenizer; only the picture's figures include the chat template
and the tokenizer. EOS tokens end nothing. A measurement is run once to warm up, and then as often as
`BenchOptions.repeats` says; figures are medians.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from PIL import Image
from rich.table import Table

from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import pages_of
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.generation import Generation
from pascalvl.runtime.kv_cache import KVCache
from pascalvl.runtime.model import VisionLanguageModel
from pascalvl.runtime.sampling import SamplingParams

log = logging.getLogger(__name__)

_GREEDY = SamplingParams()
_SEED = 0
_QUESTION = "Describe the picture."
_ROOM_FOR_TEXT = 256
"""Tokens of a template and the question beside a picture's, at most."""
_UNKNOWN = "–"  # noqa: RUF001 - an en dash


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What is measured; raises `UserError` for numbers out of range."""

    depths: tuple[int, ...] = (0, 4096, 16384)
    """Tokens that are in the cache before."""
    prefill: int = 512
    """Tokens of the prompt whose prefill is timed."""
    decode: int = 64
    """Decode steps that are timed."""
    follow_ups: tuple[int, ...] = (8, 20)
    """Tokens of further user turns."""
    batch: tuple[int, ...] = (1,)
    """Sequences that decode together; 1: the conversation alone, which is measured in any case."""
    picture: int = 1024
    """Side of the square picture, in pixels; 0: there is none."""
    repeats: int = 10

    def __post_init__(self) -> None:
        for name, least in (
            ("depths", 0),
            ("prefill", 1),
            ("decode", 1),
            ("follow_ups", 1),
            ("batch", 1),
            ("repeats", 1),
        ):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number < least:
                    raise UserError(f"{name} is out of range: expected numbers from {least}, found {number}.")
        if self.picture != 0 and not 32 <= self.picture <= 4096:
            raise UserError(f"picture is out of range: expected 32 to 4096 pixels, or 0: none; found {self.picture}.")
        if not self.depths:
            raise UserError("depths are missing: expected at least one, such as 0.")

    @property
    def tokens_behind_depth(self) -> int:
        """Tokens for which a context must have room behind a depth, the first new one included."""
        return max(self.prefill + 1, self.decode + 2, *(count + 1 for count in self.follow_ups))

    def context(self, model: ModelConfig) -> int:
        """Tokens of the context that holds all depths and the picture, at most what the model was made for."""
        side = -(-self.picture // (model.vision.patch_size * model.vision.spatial_merge_size))
        needed = max(max(self.depths) + self.tokens_behind_depth, side**2 + _ROOM_FOR_TEXT)
        return min(needed, model.text.max_position_embeddings)


SHORT = BenchOptions(depths=(0, 4096), repeats=3)
SHORT_ON_CPU = BenchOptions(depths=(0,), prefill=128, decode=16, follow_ups=(8,), picture=512, repeats=2)
"""What a report measures."""


@dataclasses.dataclass(frozen=True)
class DepthFigures:
    """What was measured behind so many tokens."""

    depth: int
    prefill_tokens_per_second: float
    """Of `BenchOptions.prefill` new tokens: from their embeddings to the last one's logits on the host."""
    decode_tokens_per_second: float
    """Of `BenchOptions.decode` tokens after the first, each chosen as the likeliest, and decoded to text."""
    of_floor: float | None
    """Share of such a token's time that a plain read of its bytes takes, those of the decoder's weights and of all past
    tokens in the cache; None: the rate of a plain read is not known."""
    sampled_tokens_per_second: float | None
    """As `decode_tokens_per_second`, with the checkpoint's own sampling; None: that takes the likeliest, too."""
    follow_up_ms: dict[int, float]
    """By the tokens of a further user turn: from the call until its first new token is chosen."""
    together_tokens_per_second: dict[int, float]
    """By the number of sequences that decode together, each behind so many tokens: of all of them, as
    `decode_tokens_per_second`, but not decoded to text."""


@dataclasses.dataclass(frozen=True)
class PictureFigures:
    """What a picture takes that was never seen before, in an otherwise empty conversation."""

    width: int
    """In pixels, as the vision encoder gets it."""
    height: int
    tokens: int
    """That it becomes."""
    preprocessing_ms: float
    """Chat template, resizing, cutting into patches, tokenising: on the host."""
    vision_ms: float
    """The vision encoder, patches and features going to and from the host."""
    first_token_ms: float
    """All together: from a picture and a question until the answer's first token is chosen."""


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What was measured of a model, and on what."""

    source: str
    """Name of what was exported."""
    backend: str
    gpu: str | None
    """None: the CPU."""
    weights: str
    kv_cache: str
    options: BenchOptions
    weight_bytes: int
    """Of the decoder: what every token reads."""
    cache_bytes_per_token: int
    read_bytes_per_second: float | None
    """Of a plain read of the GPU's memory, in this run; None: not known, or there is no GPU."""
    launches_per_token: int | None
    """Kernels of a decode step, copies not counted; None: not known, or there is no GPU."""
    sampling: str | None
    """The checkpoint's own; None: it takes the likeliest token."""
    depths: tuple[DepthFigures, ...]
    picture: PictureFigures | None
    left_out: tuple[str, ...]
    """Sentences on what could not be measured here."""


def count_runs(options: BenchOptions, model: VisionLanguageModel) -> int:
    """How often `measure` will call its ``progress``."""
    samplings = 1 if own_sampling(model) is None else 2
    at_depth = 1 + (1 + options.repeats) * (1 + samplings + len(options.follow_ups) + len(_batches(options)))
    depths = sum(_why_left_out(model, depth, options) is None for depth in set(options.depths))
    return depths * at_depth + (1 + options.repeats) * (options.picture > 0)


def measure(
    model: VisionLanguageModel, options: BenchOptions, progress: Callable[[str], None] = lambda _: None
) -> BenchResult:
    """Run all that ``options`` say; depths and a picture for which there is no room are left out.

    Args:
        model: what is measured; it forgets its conversation.
        options: what of it.
        progress: called before each run with what that is.

    Raises:
        UserError: there is room for none of the depths.
    """
    reasons = {depth: _why_left_out(model, depth, options) for depth in options.depths}
    depths = [depth for depth, reason in reasons.items() if reason is None]
    left_out = [reason for reason in reasons.values() if reason]
    if not depths:
        raise UserError(f"there is nothing to measure: {left_out[0]}")
    manifest = model.manifest
    cache_bytes = model.cache_config.bytes_per_token(model.config.text)
    weight_bytes = manifest.weight_bytes(bindings.DECODER)
    sampling = own_sampling(model)
    read_rate = _read_rate() if model.gpu else None
    tokens = np.random.default_rng(_SEED).integers(model.config.text.vocab_size, size=max(depths))
    figures, picture, launches = [], None, None
    with endless(model):
        for depth in depths:
            progress(f"filling the cache with {depth:,} tokens")
            runs = _Runs(model, tokens[:depth], options.repeats, progress)
            at_depth = _at_depth(runs, options, sampling)
            if read_rate:
                nbytes = weight_bytes + cache_bytes * (depth + options.decode // 2)
                share = nbytes / read_rate * at_depth.decode_tokens_per_second
                at_depth = dataclasses.replace(at_depth, of_floor=share)
            together = {}
            for count in _batches(options):
                try:
                    together[count] = _together(model, runs, count, options, progress)
                except (UserError, MemoryError) as error:
                    left_out.append(f"{count:,} sequences behind {depth:,} tokens are left out: {_reason(error)}")
            figures.append(dataclasses.replace(at_depth, together_tokens_per_second=together))
        launches = model.decode_launches()
        if options.picture:
            try:
                picture = _picture(model, options, progress)
            except (UserError, MemoryError) as error:
                left_out.append(f"the picture is left out: {_reason(error)}")
    return BenchResult(
        source=manifest.source["name"],
        backend=manifest.backend["name"],
        gpu=model.gpu,
        weights=str(manifest.weights),
        kv_cache=str(model.cache_config),
        options=options,
        weight_bytes=weight_bytes,
        cache_bytes_per_token=cache_bytes,
        read_bytes_per_second=read_rate,
        launches_per_token=launches,
        sampling=None if sampling is None else _described(sampling),
        depths=tuple(figures),
        picture=picture,
        left_out=tuple(left_out),
    )


class _Runs:
    """Runs behind tokens that stay in the cache.

    Args:
        model: what runs.
        tokens: int64 ``[depth]``; they are brought into the cache.
        repeats: of each run, beside the one to warm up.
        progress: see `measure`.
    """

    def __init__(
        self, model: VisionLanguageModel, tokens: np.ndarray, repeats: int, progress: Callable[[str], None]
    ) -> None:
        self._model, self.tokens, self._repeats, self._progress = model, tokens, repeats, progress
        self._random = np.random.default_rng(_SEED)
        self._first = 0
        self.depth = len(tokens)
        if self.depth:
            self._run(tokens, 1, _GREEDY)

    def median(
        self,
        what: str,
        prompt: int,
        new: int,
        sampling: SamplingParams,
        figure: Callable[[Generation, float], float],
    ) -> float:
        """Median of a figure of ``new`` tokens after a prompt of so many, which is given the seconds that all took."""
        figures = []
        for _ in range(1 + self._repeats):
            self._progress(f"{what} behind {self.depth:,} tokens")
            figures.append(figure(*self._run(np.concatenate([self.tokens, self._fresh(prompt)]), new, sampling)))
        return statistics.median(figures[1:])

    def _fresh(self, count: int) -> np.ndarray:
        """Tokens of which not even the first is what came there before."""
        size = self._model.config.text.vocab_size
        tokens = self._random.integers(size, size=count)
        tokens[0] = self._first = (self._first + 1) % size
        return tokens

    def _run(self, tokens: np.ndarray, new: int, sampling: SamplingParams) -> tuple[Generation, float]:
        start = time.perf_counter()
        generation = self._model.answer(Prompt(tokens), sampling, new)
        for _ in generation:
            pass
        return generation, time.perf_counter() - start


def _at_depth(runs: _Runs, options: BenchOptions, sampling: SamplingParams | None) -> DepthFigures:
    """All figures but the share of the floor."""
    prefill, steps = options.prefill, options.decode

    def decoded(what: str, params: SamplingParams) -> float:
        return runs.median(what, 1, 1 + steps, params, lambda generation, _: cast(float, generation.tokens_per_second))

    return DepthFigures(
        depth=runs.depth,
        prefill_tokens_per_second=runs.median(
            f"prefill of {prefill}", prefill, 1, _GREEDY, lambda generation, _: prefill / generation.prefill_seconds
        ),
        decode_tokens_per_second=decoded(f"decode of {steps}", _GREEDY),
        of_floor=None,
        sampled_tokens_per_second=None if sampling is None else decoded(f"sampling of {steps}", sampling),
        follow_up_ms={
            count: runs.median(f"follow-up of {count}", count, 1, _GREEDY, lambda _, seconds: 1e3 * seconds)
            for count in options.follow_ups
        },
        together_tokens_per_second={},
    )


def _batches(options: BenchOptions) -> list[int]:
    """Numbers of sequences that are measured together."""
    return [count for count in dict.fromkeys(options.batch) if count > 1]


def _together(
    model: VisionLanguageModel, runs: _Runs, count: int, options: BenchOptions, progress: Callable[[str], None]
) -> float:
    """Tokens a second of so many sequences in a pool of their own; raises `UserError` where there is no room for it."""
    capacity = runs.depth + options.decode
    pages = pages_of(capacity)
    session = model.engine.open_session(capacity, count * pages)
    config = dataclasses.replace(model.cache_config, window=None, pin_images=False)
    tables = np.arange(count * pages, dtype=np.int32).reshape(count, pages)
    caches = [KVCache(session, config, capacity, table) for table in tables]

    def run(cache: KVCache, tokens: np.ndarray) -> None:
        positions = np.broadcast_to(cache.length + np.arange(len(tokens)), (3, len(tokens)))
        with cache.appending(tokens) as placement:
            session.step([model.steps.new_tokens(tokens, positions, placement)])

    def step(tokens: Sequence[int]) -> list[int]:
        with contextlib.ExitStack() as stack:
            placements = [stack.enter_context(cache.appending(np.array([0]))) for cache in caches]
            chosen = session.choose(model.steps.next_tokens(tokens, [cache.length for cache in caches], placements))
        return [token for token, _ in chosen]

    rates = []
    for cache in caches:
        for first in range(0, runs.depth, model.prefill_chunk):
            run(cache, runs.tokens[first : first + model.prefill_chunk])
    for _ in range(1 + options.repeats):
        progress(f"decode of {count} sequences behind {runs.depth:,} tokens")
        for cache in caches:
            cache.truncate(runs.depth)
        tokens = [sequence % model.config.text.vocab_size for sequence in range(count)]
        start = time.perf_counter()
        for _ in range(options.decode):
            tokens = step(tokens)
        rates.append(count * options.decode / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def _reason(error: UserError | MemoryError) -> str:
    """Why something is left out, a sentence."""
    if isinstance(error, UserError):
        return str(error)
    return f"there is not enough memory ({error})." if str(error) else "there is not enough memory."


def _picture(model: VisionLanguageModel, options: BenchOptions, progress: Callable[[str], None]) -> PictureFigures:
    random, rows = np.random.default_rng(_SEED), []
    for _ in range(1 + options.repeats):
        progress(f"a picture of {options.picture}x{options.picture}")
        noise = random.integers(256, size=(options.picture, options.picture, 3), dtype=np.uint8)
        content = [{"type": "image", "image": Image.fromarray(noise)}, {"type": "text", "text": _QUESTION}]
        start = time.perf_counter()
        prompt = model.prompt([{"role": "user", "content": content}])
        _ = prompt.visuals[0].patches.pixel_values  # else made when the picture is looked at
        prepared = time.perf_counter()
        generation = model.answer(prompt, _GREEDY, 1)
        for _ in generation:
            pass
        rows.append((prepared - start, generation.vision_seconds, time.perf_counter() - start))
    preprocessing, vision, first_token = (1e3 * statistics.median(column) for column in zip(*rows[1:], strict=True))
    visual = prompt.visuals[0]
    _, height, width = (size * model.config.vision.patch_size for size in visual.patches.grid)
    return PictureFigures(width, height, len(visual.token_indices), preprocessing, vision, first_token)


def _why_left_out(model: VisionLanguageModel, depth: int, options: BenchOptions) -> str | None:
    """What keeps a depth from being measured, a sentence; None: nothing."""
    needed, window, room = depth + options.tokens_behind_depth, model.cache_config.window, model.context_length
    if needed > room:
        return f"depth {depth:,} is left out: it takes a context of {needed:,} tokens, and this one holds {room:,}."
    if window is not None and needed > window.length:
        return f"depth {depth:,} is left out: the KV cache's window keeps {window.length:,} of {needed:,} tokens."
    return None


def own_sampling(model: VisionLanguageModel) -> SamplingParams | None:
    """The checkpoint's, with a seed; None: it takes the likeliest token."""
    own = model.generation_config.sampling
    return None if own.takes_likeliest else dataclasses.replace(own, seed=_SEED)


def _described(sampling: SamplingParams) -> str:
    fields = [field for field in dataclasses.fields(sampling) if field.name != "seed"]
    given = {field.name: getattr(sampling, field.name) for field in fields}
    usual = dataclasses.asdict(SamplingParams())
    return ", ".join(f"{name} {value}" for name, value in given.items() if value != usual[name])


@contextlib.contextmanager
def endless(model: VisionLanguageModel) -> Iterator[None]:
    """Inside, no token ends an answer."""
    config = model.generation_config
    model.generation_config = dataclasses.replace(config, eos_token_ids=frozenset())
    try:
        yield
    finally:
        model.generation_config = config


def _read_rate() -> float | None:
    """Bytes a second of a plain read of the GPU's memory; None: that cannot be measured here."""
    try:
        from pascalvl.plugins.bench.timing import plain_read_rate

        return plain_read_rate()
    except (ModuleNotFoundError, UserError) as error:
        log.info("the rate of a plain read is not known: %s", error)
        return None


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(result: BenchResult) -> Sequence[Table | str]:
    """What a person reads of a result: tables, and lines of text."""
    options = result.options
    formats = f"weights {result.weights}, KV cache {result.kv_cache}"
    where = f"{result.backend} on {result.gpu or 'the CPU'}"
    table = Table(title=f"{result.source}: {where}, {formats}; medians of {options.repeats}")
    headings = ["depth", f"prefill of {options.prefill}, tok/s", f"decode of {options.decode}, tok/s", "of floor"]
    headings += ["sampled, tok/s", *(f"follow-up of {count}, ms" for count in options.follow_ups)]
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in result.depths:
        rates = row.prefill_tokens_per_second, row.decode_tokens_per_second
        share = _UNKNOWN if row.of_floor is None else f"{row.of_floor:.0%}"
        times = [f"{row.follow_up_ms[count]:,.1f}" for count in options.follow_ups]
        table.add_row(f"{row.depth:,}", *map(_rate, rates), share, _rate(row.sampled_tokens_per_second), *times)
    return [table, *_together_tables(result), *_picture_tables(result.picture), *_lines(result)]


def _together_tables(result: BenchResult) -> list[Table]:
    counts = list(dict.fromkeys(count for row in result.depths for count in row.together_tokens_per_second))
    if not counts:
        return []
    table = Table(title=f"sequences that decode {result.options.decode} tokens together, tok/s of all")
    for heading in ("depth", "1", *map(str, counts)):
        table.add_column(heading, justify="right")
    for row in result.depths:
        rates = [row.decode_tokens_per_second, *(row.together_tokens_per_second.get(count) for count in counts)]
        table.add_row(f"{row.depth:,}", *map(_rate, rates))
    return [table]


def _picture_tables(picture: PictureFigures | None) -> list[Table]:
    if picture is None:
        return []
    table = Table(title=f"a picture of {picture.width}x{picture.height}, {picture.tokens:,} tokens")
    for heading in ("preprocessing, ms", "vision encoder, ms", "first token, ms"):
        table.add_column(heading, justify="right")
    table.add_row(*(f"{ms:,.1f}" for ms in (picture.preprocessing_ms, picture.vision_ms, picture.first_token_ms)))
    return [table]


def _lines(result: BenchResult) -> list[str]:
    launches, read = result.launches_per_token, result.read_bytes_per_second
    weights, row = f"{result.weight_bytes / 1e9:.3f} GB", f"{result.cache_bytes_per_token:,} bytes"
    return [
        f"kernel launches a token: {_UNKNOWN if launches is None else f'{launches:,}'}",
        f"a token reads {weights} of weights, and {row} of the KV cache for each past token",
        f"a plain read of the GPU's memory: {_UNKNOWN if read is None else f'{read / 1e9:,.0f} GB/s'}",
        f"sampled: {result.sampling or 'the checkpoint takes the likeliest token'}",
        *result.left_out,
    ]


def _rate(rate: float | None) -> str:
    if rate is None:
        return _UNKNOWN
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.1f}"
