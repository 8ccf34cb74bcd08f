"""A vision-language model: an engine bundle, opened, that answers messages."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pascalvl.engines import Engine, Session, open_engine
from pascalvl.plugins.bundle import GENERATION_CONFIG, Manifest
from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.generation import Generation, GenerationConfig, StopMatcher
from pascalvl.runtime.grammar import Grammar, GrammarCompiler
from pascalvl.runtime.messages import Message
from pascalvl.runtime.page_files import PageFiles
from pascalvl.runtime.prompt import PromptBuilder
from pascalvl.runtime.reasoning import ReasoningMatcher, opens_thinking
from pascalvl.runtime.sampling import Sampler, SamplingParams, TokenMatcher
from pascalvl.runtime.scheduler import Limits, Scheduler
from pascalvl.runtime.sequence import TokenSequence, token_identities
from pascalvl.runtime.steps import Steps
from pascalvl.runtime.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DEFAULT_CONTEXT_LENGTH = 4096
"""Room for a few pictures and a conversation; about 1 GB of f16 cache for the largest published model."""
PINNED_SLOTS = 4096
"""Room beside a window for pictures that stay: four of a megapixel."""
DEFAULT_PREFILL_CHUNK = 512
DEFAULT_CACHE_BYTES = 4 << 30
"""Of the files of a cache's folder."""
_MOST_LOGPROBS = 20
"""Of the likeliest tokens, as OpenAI has it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What `VisionLanguageModel.generate` takes, of one among many."""

    messages: Sequence[Message]
    sampling: SamplingParams | None = None
    max_new_tokens: int | None = None
    stop: str | Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] | None = None
    logprobs: int | None = None
    grammar: Grammar | None = None
    cache_salt: int = 0
    """Requests of different salts use nothing of what is kept of each other; see `runtime.sequence.cache_salt`."""
    reasoning_budget: int | None = None
    """Tokens that a Thinking model may think, after which it has to answer; None: any number."""


class VisionLanguageModel:
    """An engine bundle with a KV cache that many conversations share; make one with `open`.

    The cache keeps the tokens of prompts and answers as long as there is room. What a prompt begins with and is still
    there is not computed again, so a conversation is continued by giving all of its messages with every call.
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
        sequences: int = 1,
        cache_folder: Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.manifest = engine.manifest
        self.config = self.manifest.model
        self.cache_config = self.manifest.kv_cache if cache is None else _chosen_at_run_time(cache, self.manifest)
        """What the KV cache is like."""
        self.context_length = _context_length(context_length, self.config.text, self.cache_config)
        """Tokens of prompt and answer together, at most."""
        if prefill_chunk < 1:
            raise UserError(f"a prefill chunk of {prefill_chunk} tokens is out of range: expected at least 1.")
        if sequences < 1:
            raise UserError(f"room for {sequences} conversations is out of range: expected at least 1.")
        self.generation_config = GenerationConfig.from_file(engine.directory / GENERATION_CONFIG)
        window = self.cache_config.window
        most = [engine.max_prefill, window.length if window else None]
        self.prefill_chunk = min([prefill_chunk, *(limit for limit in most if limit is not None)])
        max_pixels = engine.max_pixels if max_pixels is None else max_pixels
        self._prompts = PromptBuilder(
            engine.directory, self.config, max_pixels, control_tokens_in_text, self.context_length
        )
        vocab_size, end_tokens = self.config.text.vocab_size, self.generation_config.eos_token_ids
        self._grammars = GrammarCompiler(self._prompts.tokenizer, vocab_size, end_tokens)
        self.steps = Steps(engine)
        """Makes the engines' feeds."""
        self.gpu = engine.gpu
        """Name of the GPU that computes; None: the CPU does."""
        self._sequences = sequences
        self._reopen = reopen
        self._unloaded: dict[str, np.ndarray] | None = None
        """Of a model that is unloaded: what its cache held."""
        limits = Limits(chunk=self.prefill_chunk, chunk_beside=min(self.prefill_chunk, Limits.chunk_beside))
        session = self._open_session(engine)
        self.engine = engine
        files = None if cache_folder is None else PageFiles(cache_folder, self._digest, session, cache_bytes)
        self.scheduler = Scheduler(engine, session, self.cache_config, self.context_length, self.steps, limits, files)

    @property
    def _session(self) -> Session:
        return self.scheduler.session

    def _open_session(self, engine: Engine) -> Session:
        slots = self.cache_config.slots(self.context_length, pinned_slots(self.cache_config))
        session = engine.open_session(slots, self._sequences * pages_of(slots))
        self._sequence_pages = session.sequence_pages  # prompts are made while the model is unloaded, too
        log.info("KV cache %s: %d pages, %d bytes", self.cache_config, session.pages, session.nbytes)
        return session

    def unload(self) -> None:
        """Give back what the model takes of its device, a GPU's CUDA context too, until it is asked again.

        Keys and values wait in the host's memory. All of the process loses what it has on the GPU. Only models from
        `open` can be unloaded.
        """
        if self._unloaded is not None:
            return
        if self._reopen is None:
            raise ValueError("the model was not opened from a bundle")
        engine, self._unloaded = self.engine, self.scheduler.let_go()
        del self.engine
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
        engine = self._reopen()
        session = self._open_session(engine)
        session.write(np.array(self.scheduler.pool.used, np.int32), self._unloaded)
        self.engine, self._unloaded = engine, None
        self.scheduler.use(engine, session)
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
        sequences: int = 1,
        cache_folder: str | Path | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
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
            marked_layers: let `pascalvl.runtime.validation.trace` return the hidden states after each decoder layer.
            progress: called with numbers of bytes, as the bundle's files are checked.
            cache: another window, and whether pictures are pinned; the rest as the engines were built for. By default
                all is as it was built.
            control_tokens_in_text: take what reads as a control token in a user's or a tool's message as that token,
                and not as text; see `pascalvl.runtime.prompt.PromptBuilder`.
            sequences: conversations of a whole context that there is room for; of shorter ones more run at once.
            cache_folder: where keys and values of earlier processes are found again, and `save_cache` writes them.
            cache_bytes: that files there take at most; those that were not used the longest go first.

        Raises:
            UserError: a bundle that cannot be used here, a cache that it is not for, or a context out of range.
        """

        def opened() -> Engine:
            return open_engine(Path(directory), backend, marked_layers, progress)

        return cls(
            opened(),
            context_length,
            prefill_chunk,
            max_pixels,
            cache,
            control_tokens_in_text,
            opened,
            sequences,
            None if cache_folder is None else Path(cache_folder),
            cache_bytes,
        )

    def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """What `generate` makes of messages before it runs them."""
        return self._prompts.build(messages, tools, template_variables)

    def check_grammar(self, grammar: Grammar | None) -> None:
        """Raise `UserError`, as `generate` does, for a grammar that cannot be used; else it is compiled then."""
        if grammar is not None:
            self._grammars.matcher(grammar)

    def prompt_of_tokens(self, token_ids: Sequence[int] | np.ndarray) -> Prompt:
        """A prompt of these tokens and of no pictures; raises `UserError` for none, and for some out of range."""
        return self._prompts.of_tokens(token_ids)

    def check_length(self, text: str) -> None:
        """Raise `UserError` for a text that is longer than the context, however it is encoded."""
        self._prompts.check_length(text)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._prompts.tokenizer

    def generate(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Answer messages; the answer is computed while it, or another one, is iterated over.

        Args:
            messages: the conversation, as `pascalvl.runtime.messages.Message` describes it.
            sampling: how tokens are chosen; by default as the model's authors set.
            max_new_tokens: tokens at most; by default as the model's authors set, or as many as the context holds.
            stop: one text or several that end the answer where they come up in it, and are not part of it.
            tools: JSON schemas of functions that the model may call, for the chat template.
            template_variables: what else the chat template may ask for, such as ``{"enable_thinking": False}``.
            logprobs: fill `Generation.logprobs`, with as many of the likeliest tokens, from 0; on a GPU logits are then
                copied to the host for each token.
            grammar: what the answer must be, unless max_new_tokens or a stop string ends it before.

        Raises:
            UserError: messages, pictures or videos that cannot be used, a prompt longer than the context, a limit
                below 1, logprobs out of range, or a grammar that cannot be used.
        """
        prompt = self.prompt(messages, tools, template_variables)
        return self.answer(prompt, sampling, max_new_tokens, stop, logprobs, grammar)

    def answer(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """`generate`, of what `prompt` made of messages, or of any other tokens."""
        load_seconds = self.load()
        sequence = self.sequence_of(prompt, sampling, max_new_tokens, stop, logprobs, grammar)
        sequence.generation.load_seconds = load_seconds
        sequence.generation.pieces = self._pieces(sequence)
        return sequence.generation

    def generate_many(
        self, requests: Iterable[Request | TokenSequence | None], at_once: int = 2 * Limits.sequences
    ) -> Iterator[tuple[int, Generation]]:
        """Answer many requests, several at once: their numbers and whole answers, as they end.

        Requests are taken as they are needed; of one that cannot be answered, `Generation.error` says why, and the
        others go on. What each is answered does not depend on what is beside it.

        Args:
            requests: or what `sequence` made of them, maybe in another thread. None among them has no number: the next
                is not ready, and is asked for again later, or, where nothing is at work, never.
            at_once: that are taken, and not answered, at most.
        """
        self.load()
        at_work: dict[TokenSequence, int] = {}
        waiting, numbers = iter(requests), itertools.count()
        try:
            while True:
                while len(at_work) < at_once and (request := next(waiting, None)):
                    number = next(numbers)
                    try:
                        sequence = request if isinstance(request, TokenSequence) else self.sequence(request)
                    except UserError as error:
                        yield number, Generation.failed(error)
                        continue
                    self.scheduler.submit(sequence)
                    at_work[sequence] = number
                if not at_work:
                    return
                self.scheduler.step()
                for sequence in [sequence for sequence in at_work if sequence.is_finished]:
                    for piece in sequence.take_pieces():
                        sequence.generation.add(piece)
                    sequence.generation.error = sequence.error
                    yield at_work.pop(sequence), sequence.generation
        except KeyboardInterrupt:
            self.scheduler.recover()
            raise
        finally:
            for sequence in at_work:
                self.scheduler.cancel(sequence)

    def sequence(self, request: Request) -> TokenSequence:
        """What the scheduler takes of a request; for errors see `generate`."""
        prompt = self.prompt(request.messages, request.tools, request.template_variables)
        return self.sequence_of(
            prompt,
            request.sampling,
            request.max_new_tokens,
            request.stop,
            request.logprobs,
            request.grammar,
            request.cache_salt,
            request.reasoning_budget,
        )

    def sequence_of(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        grammar: Grammar | None = None,
        cache_salt: int = 0,
        reasoning_budget: int | None = None,
    ) -> TokenSequence:
        """What the scheduler takes of a prompt; for errors see `generate`."""
        matcher = StopMatcher(stop)
        limit = max_new_tokens if max_new_tokens is not None else self.generation_config.max_new_tokens
        if limit is not None and limit < 1:
            raise UserError(f"max_new_tokens is out of range: expected at least 1, found {limit}.")
        if logprobs is not None and not (type(logprobs) is int and 0 <= logprobs <= _MOST_LOGPROBS):
            raise UserError(f"logprobs is out of range: expected 0 to {_MOST_LOGPROBS}, found {shown(logprobs)}.")
        room = self.room(prompt)
        matching = self._matcher(prompt, grammar, reasoning_budget)
        sampling = sampling or self.generation_config.sampling
        return TokenSequence(
            prompt,
            self._pinned(prompt),
            Sampler(sampling, prompt.token_ids, self.config.text.vocab_size, matching),
            room if limit is None else min(limit, room),
            matcher,
            self.generation_config.eos_token_ids,
            self._prompts.tokenizer.stream(),
            Generation(len(prompt.token_ids)),
            logprobs,
            cache_salt,
        )

    def _matcher(self, prompt: Prompt, grammar: Grammar | None, reasoning_budget: int | None) -> TokenMatcher | None:
        """What says which tokens of an answer may come next; None: all may."""
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        thinks = opens_thinking(prompt.token_ids, self.tokenizer)
        if reasoning_budget is None and not (matcher and thinks):
            return matcher
        vocab_size, end_tokens = self.config.text.vocab_size, self.generation_config.eos_token_ids
        return ReasoningMatcher(thinks, self.tokenizer, vocab_size, end_tokens, reasoning_budget, matcher)

    def _pieces(self, sequence: TokenSequence) -> Generator[str, None, None]:
        """Run all that is at work until a sequence's text has come."""
        self.scheduler.submit(sequence)
        try:
            while True:
                while pieces := sequence.take_pieces():  # others may have run while one was looked at
                    for piece in pieces:
                        yield sequence.generation.add(piece)
                if sequence.is_finished:
                    break
                self.load()
                self.scheduler.step()
        except KeyboardInterrupt:
            self.scheduler.recover()
            raise
        finally:
            if not sequence.is_finished:
                self.scheduler.cancel(sequence)
        if sequence.error:
            raise sequence.error

    def keep_prefix(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        """Run messages and keep their keys and values on the host, for every later prompt that begins as they do.

        What is kept of, for example, a system message and a picture is not computed again, whatever was asked between.
        """
        prompt = self.prompt(messages, tools, template_variables)
        for _ in self.answer(prompt, SamplingParams(temperature=0), 1):
            pass
        if not self.scheduler.keep(token_identities(prompt)):
            raise UserError(
                "the messages are longer than the KV cache's window: shorten them, or give a longer window."
            )

    def save_cache(self, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
        """Write all keys and values that are kept to the folder that the model was opened with, where later processes
        find them; of a conversation of which a window has dropped tokens there are none.

        Args:
            progress: called with numbers of pages, those that are done and all.

        Raises:
            UserError: that cannot be done.
        """
        self.load()
        self.scheduler.save(progress)

    def decode_launches(self) -> int | None:
        """Kernels that a decode step launches, see `pascalvl.engines.Session.decode_launches`."""
        self.load()
        return self._session.decode_launches()

    @property
    def _digest(self) -> str:
        """Tells apart engines whose keys and values differ."""
        files = {name: file["sha256"] for name, file in self.manifest.files.items()}
        what = [str(self.manifest.kv_cache), files, self.manifest.backend, self.gpu]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def room(self, prompt: Prompt, needed: int = 1) -> int:
        """Tokens that fit behind a prompt; raises `UserError` if that is not as many as needed."""
        length = len(prompt.token_ids)
        if length + needed > self.context_length:
            longest = self.config.text.max_position_embeddings
            raise UserError(
                f"the prompt has {length} tokens, but the context holds {self.context_length} with the answer: shorten "
                f"the prompt, limit its pictures' pixels, or set a longer context (up to {longest})."
            )
        pinned = int(self._pinned(prompt).sum())
        capacity = self._sequence_pages * PAGE_SLOTS
        if self.cache_config.slots(self.context_length, pinned) > capacity:
            room = capacity - self.cache_config.slots(self.context_length)
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
