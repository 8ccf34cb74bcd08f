"""A vision-language model: an engine bundle, opened, that answers messages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pascalvl.engines import Engine, open_engine
from pascalvl.engines.engine import Features, NewTokens, Placement, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import EMBEDDINGS, GENERATION_CONFIG, POSITIONS, Manifest
from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import TextConfig
from pascalvl.runtime.embeddings import EmbeddingRows, EmbeddingTable
from pascalvl.runtime.generation import FinishReason, Generation, GenerationConfig, StopMatcher, TokenLogprobs
from pascalvl.runtime.image import Patches
from pascalvl.runtime.kv_cache import KVCache, Prefix
from pascalvl.runtime.messages import Message
from pascalvl.runtime.positions import TextRope, VisionPositions, rope_tables, vision_cu_seqlens, vision_rope_tables
from pascalvl.runtime.prompt import Prompt, PromptBuilder, Visual
from pascalvl.runtime.sampling import Sampler, SamplingParams

log = logging.getLogger(__name__)

_Outputs = TypeVar("_Outputs")

DEFAULT_CONTEXT_LENGTH = 4096
"""Room for a few pictures and a conversation; about 1 GB of f16 cache for the largest published model."""
PINNED_SLOTS = 4096
"""Room beside a window for pictures that stay: four of a megapixel."""
DEFAULT_PREFILL_CHUNK = 512
_MOST_LOGPROBS = 20
"""Of the likeliest tokens, as OpenAI has it."""


class VisionLanguageModel:
    """An engine bundle with a KV cache of one conversation; make one with `open`.

    The cache keeps the tokens of the last prompt and answer. What the next prompt begins with and is still there is not
    computed again, so a conversation is continued by giving all of its messages with every call.
    """

    def __init__(
        self,
        engine: Engine,
        context_length: int | None,
        prefill_chunk: int,
        max_pixels: int | None = None,
        cache: CacheConfig | None = None,
        control_tokens_in_text: bool = False,
        reopen: Callable[[], Engine] | None = None,
    ) -> None:
        self.manifest = engine.manifest
        self.config = self.manifest.model
        self.cache_config = self.manifest.kv_cache if cache is None else _chosen_at_run_time(cache, self.manifest)
        """What the KV cache is like."""
        self.context_length = _context_length(context_length, self.config.text, self.cache_config)
        """Tokens of prompt and answer together, at most."""
        if prefill_chunk < 1:
            raise UserError(f"a prefill chunk of {prefill_chunk} tokens is out of range: expected at least 1.")
        self.generation_config = GenerationConfig.from_file(engine.directory / GENERATION_CONFIG)
        window = self.cache_config.window
        most = [engine.max_prefill, window.length if window else None]
        self.prefill_chunk = min([prefill_chunk, *(limit for limit in most if limit is not None)])
        max_pixels = engine.max_pixels if max_pixels is None else max_pixels
        self._prompts = PromptBuilder(engine.directory, self.config, max_pixels, control_tokens_in_text)
        self._embeddings = EmbeddingTable(engine.directory / EMBEDDINGS, **self.manifest.embeddings)
        self._text_rope = TextRope(self.config.text)
        positions = EmbeddingTable(engine.directory / POSITIONS, **self.manifest.position_embeddings)
        self._vision_positions = VisionPositions(positions, self.config.vision)
        self.gpu = engine.gpu
        """Name of the GPU that computes; None: the CPU does."""
        self._prefixes: list[Prefix] = []
        self._answering: Generator[str, None, None] = (piece for piece in "")
        self._reopen = reopen
        self._unloaded: tuple[Prefix | None, np.ndarray] | None = None
        """Of a model that is unloaded: what its cache held, and which tokens of that are pinned."""
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        """Run on an engine, with a cache that is empty."""
        slots = self.cache_config.slots(self.context_length, pinned_slots(self.cache_config))
        session = engine.open_session(slots)
        self.engine, self._session = engine, session
        self._cache = KVCache(session, self.cache_config, self.context_length)
        log.info("KV cache %s: %d slots, %d bytes", self.cache_config, self._cache.capacity, session.nbytes)

    def unload(self) -> None:
        """Give back what the model takes of its device, a GPU's CUDA context too, until it is asked again.

        Keys and values wait in the host's memory, unless a window has dropped some. All of the process loses what it
        has on the GPU. Only models from `open` can be unloaded.
        """
        if self._unloaded is not None:
            return
        if self._reopen is None:
            raise ValueError("the model was not opened from a bundle")
        self._answering.close()
        engine, self._unloaded = self.engine, (self._cache.prefix(self._cache.length), self._cache.pinned)
        del self.engine, self._session, self._cache
        engine.close()
        log.info("unloaded")

    def load(self) -> float:
        """Undo `unload`; returns the seconds that it took, 0 where there is nothing to undo.

        Raises:
            UserError: as `open`; the model stays unloaded.
        """
        if self._unloaded is None or self._reopen is None:
            return 0.0
        start = time.perf_counter()
        self._use(self._reopen())
        (prefix, pinned), self._unloaded = self._unloaded, None
        if prefix is not None:
            self._cache.restore(prefix, len(prefix.identities), pinned)
        return time.perf_counter() - start

    @classmethod
    def open(
        cls,
        directory: str | Path,
        backend: str = "auto",
        context_length: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        max_pixels: int | None = None,
        marked_layers: bool = False,
        progress: Callable[[int], None] = lambda _: None,
        cache: CacheConfig | None = None,
        control_tokens_in_text: bool = False,
    ) -> VisionLanguageModel:
        """Open an engine bundle.

        Args:
            directory: the bundle.
            backend: backend the bundle must be for; ``auto`` is the one it was built for.
            context_length: tokens of prompt and answer together, for which the cache is laid out;
                `DEFAULT_CONTEXT_LENGTH`, or less if the model was made for less.
            prefill_chunk: tokens of a prompt that are run at a time.
            max_pixels: area that larger pictures (videos: all frames together) are resized to; by default what the
                engine was built for, and at most what the model's authors set, which for a photograph can mean tens of
                thousands of patches.
            marked_layers: let `trace` return the hidden states after each decoder layer.
            progress: called with numbers of bytes, as the bundle's files are checked.
            cache: another window, and whether pictures are pinned; the rest as the engines were built for. By default
                all is as it was built.
            control_tokens_in_text: take what reads as a control token in a user's or a tool's message as that token,
                and not as text; see `pascalvl.runtime.prompt.PromptBuilder`.

        Raises:
            UserError: a bundle that cannot be used here, a cache that it is not for, or a context out of range.
        """

        def opened() -> Engine:
            return open_engine(Path(directory), backend, marked_layers, progress)

        return cls(opened(), context_length, prefill_chunk, max_pixels, cache, control_tokens_in_text, opened)

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """What `generate` makes of messages before it runs them."""
        return self._prompts.build(messages, tools, template_variables)

    def generate(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        logprobs: int | None = None,
    ) -> Generation:
        """Answer messages; the answer is computed while it is iterated over, and ends one that is still under way.

        Args:
            messages: the conversation, as `pascalvl.runtime.messages.Message` describes it.
            sampling: how tokens are chosen; by default as the model's authors set.
            max_new_tokens: tokens at most; by default as the model's authors set, or as many as the context holds.
            stop: one text or several that end the answer where they come up in it, and are not part of it.
            tools: JSON schemas of functions that the model may call, for the chat template.
            template_variables: what else the chat template may ask for, such as ``{"enable_thinking": False}``.
            logprobs: fill `Generation.logprobs`, with as many of the likeliest tokens, from 0; on a GPU logits are then
                copied to the host for each token.

        Raises:
            UserError: messages, pictures or videos that cannot be used, a prompt longer than the context, a limit
                below 1, or logprobs out of range.
        """
        prompt = self.prompt(messages, tools, template_variables)
        return self.answer(prompt, sampling, max_new_tokens, stop, logprobs)

    def answer(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Generation:
        """`generate`, of what `prompt` made of messages, or of any other tokens."""
        matcher = StopMatcher(stop)
        limit = max_new_tokens if max_new_tokens is not None else self.generation_config.max_new_tokens
        if limit is not None and limit < 1:
            raise UserError(f"max_new_tokens is out of range: expected at least 1, found {limit}.")
        if logprobs is not None and not (type(logprobs) is int and 0 <= logprobs <= _MOST_LOGPROBS):
            raise UserError(f"logprobs is out of range: expected 0 to {_MOST_LOGPROBS}, found {shown(logprobs)}.")
        self._answering.close()
        load_seconds = self.load()
        room = self._room(prompt)
        identities = token_identities(prompt)
        reused = self._reuse(identities, self._pinned(prompt))
        sampler = Sampler(sampling or self.generation_config.sampling, prompt.token_ids, self.config.text.vocab_size)
        generation = Generation(len(prompt.token_ids), reused, load_seconds)
        limit = room if limit is None else min(limit, room)
        self._answering = generation.pieces = self._answer(
            prompt, identities, sampler, matcher, limit, generation, logprobs
        )
        return generation

    def keep_prefix(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Run messages and keep their keys and values on the host, for every later prompt that begins as they do.

        What is kept of, for example, a system message and a picture is not computed again, whatever was asked between.
        """
        self._answering.close()
        self.load()
        prompt = self.prompt(messages, tools, template_variables)
        self._room(prompt)
        identities = token_identities(prompt)
        self._reuse(identities, self._pinned(prompt))
        unseen = [visual for visual in prompt.visuals if visual.token_indices[-1] >= self._cache.length]
        seen = [(visual, self._encode(visual.patches)) for visual in unseen]
        for _ in self._prefill(prompt, identities, seen, lambda tokens, _: self._session.choose(tokens)):
            pass
        prefix = self._cache.prefix(len(identities))
        if prefix is None:
            raise UserError(
                "the messages are longer than the KV cache's window: shorten them, or give a longer window."
            )
        self._prefixes.append(prefix)

    def save_cache(self, path: str | Path) -> None:
        """Write the keys and values of the conversation so far to a file, which `load_cache` reads.

        Raises:
            UserError: the file cannot be written, or a window has dropped some.
        """
        self.load()
        prefix = self._cache.prefix(self._cache.length)
        if prefix is None:
            raise UserError(
                "the KV cache cannot be saved: its window has dropped tokens; give a longer window, or none."
            )
        prefix.save(Path(path), self._digest)

    def load_cache(self, path: str | Path) -> None:
        """Keep what `save_cache` wrote, as `keep_prefix` does; raises `UserError` for other files."""
        self.load()
        self._prefixes.append(Prefix.load(Path(path), self._digest, self._session))

    def decode_launches(self) -> int | None:
        """Kernels that a decode step launches, see `pascalvl.engines.Session.decode_launches`."""
        self.load()
        return self._session.decode_launches()

    @property
    def _digest(self) -> str:
        """Tells apart engines whose keys and values differ."""
        files = {name: file["sha256"] for name, file in self.manifest.files.items()}
        return hashlib.sha256(json.dumps([str(self.manifest.kv_cache), files], sort_keys=True).encode()).hexdigest()

    def _reuse(self, identities: np.ndarray, pinned: np.ndarray) -> int:
        """Bring the cache to as many of a prompt's first tokens as it, or a kept prefix, has; returns their number."""
        most = len(identities) - 1  # the last token is run in any case: its logits are needed
        own = min(self._cache.common_prefix(identities), most)
        best = max(self._prefixes, key=lambda prefix: prefix.common(identities), default=None)
        if best is not None:
            common = min(best.common(identities), most)
            if common > own and self._cache.restore(best, common, pinned[:common]):
                return common
        return self._cache.truncate(own)

    def trace(self, messages: Sequence[Message], forced_tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Run messages and then the given tokens, whatever the model would have answered.

        Returns:
            Outputs by the names of `pascalvl.engines.validation`: features of the visuals, the prompt's last logits and
            those after each forced token, ``[1, vocab_size]``; with marked layers also the prompt's hidden states.
        """
        from pascalvl.engines import validation

        self._answering.close()
        self.load()
        prompt = self.prompt(messages)
        self._room(prompt, len(forced_tokens))
        self._cache.truncate(0)
        features = [self._encode(visual.patches) for visual in prompt.visuals]
        traced = {}
        if features:
            on_host = [self.engine.on_host(feature) for feature in features]
            traced[validation.VISION_EMBEDS] = np.concatenate([feature.embeds for feature in on_host])
            deepstack = np.concatenate([feature.levels for feature in on_host], axis=1)
            traced.update((validation.vision_deepstack(i), level) for i, level in enumerate(deepstack))
        seen = list(zip(prompt.visuals, features, strict=True))
        identities = token_identities(prompt)
        chunks = list(self._prefill(prompt, identities, seen, lambda tokens, _: self._session.step(tokens)))
        traced[validation.PREFILL_LOGITS] = chunks[-1][bindings.LOGITS]
        for layer in range(self.config.text.num_hidden_layers):
            if (name := bindings.hidden_states(layer)) in chunks[0]:
                hidden = np.concatenate([outputs[name] for outputs in chunks])
                traced[validation.prefill_hidden_states(layer)] = hidden
        for step, token in enumerate(forced_tokens):
            with self._cache.appending(np.array([token])) as placement:
                tokens = self.next_tokens([token], [prompt.next_position + step], [placement])
                traced[validation.decode_logits(step)] = self._session.step(tokens)[bindings.LOGITS]
        return traced

    def _room(self, prompt: Prompt, needed: int = 1) -> int:
        """Tokens that fit behind a prompt; raises `UserError` if that is not as many as needed."""
        length = len(prompt.token_ids)
        if length + needed > self.context_length:
            longest = self.config.text.max_position_embeddings
            raise UserError(
                f"the prompt has {length} tokens, but the context holds {self.context_length} with the answer: shorten "
                f"the prompt, limit its pictures' pixels, or set a longer context (up to {longest})."
            )
        pinned = int(self._pinned(prompt).sum())
        if self.cache_config.slots(self.context_length, pinned) > self._cache.capacity:
            room = self._cache.capacity - self.cache_config.slots(self.context_length)
            raise UserError(
                f"the prompt's pictures have {pinned} tokens, more than the KV cache has room for beside its window "
                f"({room}): limit their pixels, or do not pin them."
            )
        return self.context_length - length

    def _pinned(self, prompt: Prompt) -> np.ndarray:
        """Which of a prompt's tokens the cache keeps whatever its window, bool ``[n]``."""
        pinned = np.zeros(len(prompt.token_ids), bool)
        if self.cache_config.pin_images:
            for visual in prompt.visuals:
                pinned[visual.token_indices] = True
        return pinned

    def _answer(
        self,
        prompt: Prompt,
        identities: np.ndarray,
        sampler: Sampler,
        matcher: StopMatcher,
        limit: int,
        generation: Generation,
        logprobs: int | None,
    ) -> Generator[str, None, None]:
        start = time.perf_counter()
        reused = self._cache.length
        unseen = [visual for visual in prompt.visuals if visual.token_indices[-1] >= reused]
        seen = [(visual, self._encode(visual.patches)) for visual in unseen]
        generation.vision_seconds = time.perf_counter() - start

        def run(tokens: list[NewTokens], is_last: bool) -> list[tuple[int, float]]:
            return self._session.choose(tokens, [sampler.next()] if is_last else None)

        for chosen in self._prefill(prompt, identities, seen, run):
            ((first, highest),) = chosen
        generation.prefill_seconds = time.perf_counter() - start - generation.vision_seconds

        text = self._prompts.tokenizer.stream()
        reason = FinishReason.LENGTH
        for step in range(limit):
            start = time.perf_counter()
            if step == 0:
                token = sampler.add(first, highest)
            else:
                token = self._next(generation.token_ids[-1], prompt.next_position + step - 1, sampler)
            generation.token_ids.append(token)
            if logprobs is not None:
                generation.logprobs.append(TokenLogprobs.of(self._session.logits()[0], token, logprobs))
            piece = "" if token in self.generation_config.eos_token_ids else matcher.push(text.push(token))
            generation.decode_seconds += time.perf_counter() - start
            if piece:
                yield generation.add(piece)
            if matcher.stopped or token in self.generation_config.eos_token_ids:
                reason = FinishReason.STOP
                break
        if piece := matcher.flush():
            yield generation.add(piece)
        generation.finish_reason = reason

    def _encode(self, patches: Patches) -> Features:
        """Run the vision encoder, for a video one temporal patch at a time: they do not see each other."""
        t, h, w = patches.grid
        cos, sin = vision_rope_tables((1, h, w), self.config.vision)
        feeds = {
            bindings.POSITION_EMBEDS: self._vision_positions((1, h, w)),
            bindings.ROPE_COS: cos,
            bindings.ROPE_SIN: sin,
            bindings.CU_SEQLENS: vision_cu_seqlens((1, h, w)),
        }
        pixels = patches.pixel_values.reshape(t, h * w, -1)
        return self.engine.encode([{**feeds, bindings.PIXEL_VALUES: pixel_values} for pixel_values in pixels])

    def _prefill(
        self,
        prompt: Prompt,
        identities: np.ndarray,
        seen: Sequence[tuple[Visual, Features]],
        run: Callable[[list[NewTokens], bool], _Outputs],
    ) -> Iterator[_Outputs]:
        """Run the prompt's tokens that are not in the cache, chunk by chunk; yields what ``run`` makes of each, which
        is also told whether it is the last one."""
        pinned = self._pinned(prompt)
        for start in range(self._cache.length, len(identities), self.prefill_chunk):
            chunk = slice(start, min(start + self.prefill_chunk, len(identities)))
            visuals = []
            for visual, features in seen:
                first, last = np.searchsorted(visual.token_indices, (start, chunk.stop))
                if first < last:
                    places = visual.token_indices[first:last] - start
                    visuals.append(VisualRows(features, slice(first, last), places))
            with self._cache.appending(identities[chunk], pinned[chunk]) as placement:
                tokens = self.new_tokens(prompt.token_ids[chunk], prompt.position_ids[:, chunk], placement, visuals)
                outputs = run([tokens], chunk.stop == len(identities))
            yield outputs

    def _next(self, token: int, position: int, sampler: Sampler) -> int:
        """Run one more token; returns the one chosen after it."""
        with self._cache.appending(np.array([token])) as placement:
            tokens = self.next_tokens([token], [position], [placement])
            ((chosen, highest),) = self._session.choose(tokens, [sampler.next()])
        return sampler.add(chosen, highest)

    def next_tokens(
        self, token_ids: Sequence[int], positions: Sequence[int], placements: Sequence[Placement]
    ) -> list[NewTokens]:
        """One more token of text of each of some sequences."""
        return [
            NewTokens(EmbeddingRows(self._embeddings, (token,)), *self._text_rope.at(position), placement)
            for token, position, placement in zip(token_ids, positions, placements, strict=True)
        ]

    def new_tokens(
        self,
        token_ids: Sequence[int] | np.ndarray,
        position_ids: np.ndarray,
        placement: Placement,
        visuals: Sequence[VisualRows] = (),
    ) -> NewTokens:
        """Tokens ``[n]`` of one sequence at positions ``[3, n]``, at most `prefill_chunk`."""
        cos, sin = rope_tables(position_ids, self.config.text)
        return NewTokens(EmbeddingRows(self._embeddings, token_ids), cos, sin, placement, visuals)


def pinned_slots(cache: CacheConfig) -> int:
    """Slots that a model's cache has beside its window, at least, for pictures that stay."""
    return PINNED_SLOTS if cache.pin_images else 0


def _chosen_at_run_time(cache: CacheConfig, manifest: Manifest) -> CacheConfig:
    """The engines' cache with another window; raises `UserError` for what they were not built for."""
    built, chosen = manifest.kv_cache, cache.with_rank_of(manifest.kv_cache)
    if dataclasses.replace(chosen, window=built.window, pin_images=built.pin_images) != built:
        raise UserError(
            f"the KV cache {cache} is not what these engines were built for ({built}): only window and pin can be "
            f"chosen now; build the bundle with --kv {cache}."
        )
    return chosen


def default_context_length(text: TextConfig, cache: CacheConfig) -> int:
    """Tokens of prompt and answer together, where nobody says how many."""
    longest = text.max_position_embeddings
    return longest if cache.window else min(DEFAULT_CONTEXT_LENGTH, longest)


def _context_length(given: int | None, text: TextConfig, cache: CacheConfig) -> int:
    """Tokens of prompt and answer together; raises `UserError` for a number out of range."""
    longest = text.max_position_embeddings
    if given is None:
        return default_context_length(text, cache)
    if cache.window and given > longest:
        log.warning("positions beyond %d, which the model was made for, may make its answers worse", longest)
    elif not 2 <= given <= longest:
        raise UserError(f"a context of {given} tokens is out of range: expected 2 to {longest} for this model.")
    return given


def token_identities(prompt: Prompt) -> np.ndarray:
    """Numbers, int64 ``[n]``, equal for tokens whose embeddings are: ids of text, below 0 for visuals."""
    identities = prompt.token_ids.copy()
    for visual in prompt.visuals:
        # 62 bits of the content's hash; then as many numbers from there on as there are tokens.
        first = int.from_bytes(visual.patches.digest[:8], "little") >> 2
        identities[visual.token_indices] = -1 - first - np.arange(len(visual.token_indices))
    return identities
