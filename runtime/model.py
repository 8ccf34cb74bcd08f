"""A vision-language model: an engine bundle, opened, that answers messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import numpy as np

from pascalvl.engines import Engine, open_engine
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import EMBEDDINGS, GENERATION_CONFIG
from pascalvl.plugins.errors import UserError
from pascalvl.runtime.chat_template import Message
from pascalvl.runtime.generation import FinishReason, Generation, GenerationConfig, StopMatcher
from pascalvl.runtime.image import Patches
from pascalvl.runtime.kv_cache import KVCache
from pascalvl.runtime.positions import position_grid_taps, rope_tables, vision_cu_seqlens, vision_rope_tables
from pascalvl.runtime.prompt import Prompt, PromptBuilder, Visual
from pascalvl.runtime.sampling import Sampler, SamplingParams, check_finite

DEFAULT_CONTEXT_LENGTH = 4096
"""Room for a few pictures and a conversation; about 1 GB of f16 cache for the largest published model."""
DEFAULT_PREFILL_CHUNK = 512

Features = tuple[np.ndarray, np.ndarray]
"""A visual for the decoder: embeddings ``[n, hidden_size]`` and DeepStack's ``[num_deepstack, n, hidden_size]``."""


class VisionLanguageModel:
    """An engine bundle with a KV cache of one conversation; make one with `open`.

    The cache keeps the tokens of the last prompt and answer. What the next prompt begins with and is still there is not
    computed again, so a conversation is continued by giving all of its messages with every call.
    """

    def __init__(
        self, engine: Engine, context_length: int | None, prefill_chunk: int, max_pixels: int | None = None
    ) -> None:
        self.manifest = engine.manifest
        self.config = self.manifest.model
        text = self.config.text
        longest = text.max_position_embeddings
        self.context_length = min(DEFAULT_CONTEXT_LENGTH, longest) if context_length is None else context_length
        """Tokens of prompt and answer together, at most."""
        if not 2 <= self.context_length <= longest:
            raise UserError(
                f"a context of {self.context_length} tokens is out of range: expected 2 to {longest} for this model."
            )
        if prefill_chunk < 1:
            raise UserError(f"a prefill chunk of {prefill_chunk} tokens is out of range: expected at least 1.")
        self.generation_config = GenerationConfig.from_file(engine.directory / GENERATION_CONFIG)
        self._engine = engine
        self._prefill_chunk = prefill_chunk
        max_pixels = engine.max_pixels if max_pixels is None else max_pixels
        self._prompts = PromptBuilder(engine.directory, self.config, max_pixels)
        self._embeddings = EmbeddingTable(engine.directory / EMBEDDINGS, **self.manifest.embeddings)
        self._session = engine.open_session(self.context_length)
        self._cache = KVCache(self._session)
        self._answering: Generator[str, None, None] = (piece for piece in ())

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
        host: str | None = None,
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
            host: ``plugin`` runs the bundle's graphs node by node, attention in the TensorRT plugin's library.

        Raises:
            UserError: a bundle that cannot be used here, or a context out of range.
        """
        engine = open_engine(Path(directory), backend, marked_layers, progress, host)
        return cls(engine, context_length, prefill_chunk, max_pixels)

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """What `generate` makes of messages before it runs them."""
        return self._prompts.build(messages)

    def generate(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generation:
        """Answer messages; the answer is computed while it is iterated over, and ends one that is still under way.

        Args:
            messages: the conversation, as `pascalvl.runtime.chat_template` describes it.
            sampling: how tokens are chosen; by default as the model's authors set.
            max_new_tokens: tokens at most; by default as the model's authors set, or as many as the context holds.
            stop: one text or several that end the answer where they come up in it, and are not part of it.

        Raises:
            UserError: messages, pictures or videos that cannot be used, a prompt longer than the context, or a limit
                below 1.
        """
        matcher = StopMatcher(stop)
        limit = max_new_tokens if max_new_tokens is not None else self.generation_config.max_new_tokens
        if limit is not None and limit < 1:
            raise UserError(f"max_new_tokens is out of range: expected at least 1, found {limit}.")
        self._answering.close()
        prompt = self.prompt(messages)
        room = self._room(prompt)
        identities = token_identities(prompt)
        # The last token is run in any case: its logits are needed.
        reused = min(self._cache.common_prefix(identities), len(identities) - 1)
        self._cache.truncate(reused)
        sampler = Sampler(sampling or self.generation_config.sampling, prompt.token_ids, self.config.text.vocab_size)
        generation = Generation(len(prompt.token_ids), reused)
        limit = room if limit is None else min(limit, room)
        self._answering = generation.pieces = self._answer(prompt, identities, sampler, matcher, limit, generation)
        return generation

    def trace(self, messages: Sequence[Message], forced_tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """Run messages and then the given tokens, whatever the model would have answered.

        Returns:
            Outputs by the names of `pascalvl.engines.validation`: features of the visuals, the prompt's last logits and
            those after each forced token, ``[1, vocab_size]``; with marked layers also the prompt's hidden states.
        """
        from pascalvl.engines import validation

        self._answering.close()
        prompt = self.prompt(messages)
        self._room(prompt, len(forced_tokens))
        self._cache.truncate(0)
        features = [self._encode(visual.patches) for visual in prompt.visuals]
        traced = {}
        if features:
            traced[validation.VISION_EMBEDS] = np.concatenate([embeds for embeds, _ in features])
            deepstack = np.concatenate([levels for _, levels in features], axis=1)
            traced.update((validation.vision_deepstack(i), level) for i, level in enumerate(deepstack))
        seen = list(zip(prompt.visuals, features, strict=True))
        chunks = list(self._prefill(prompt, token_identities(prompt), seen))
        traced[validation.PREFILL_LOGITS] = chunks[-1][bindings.LOGITS]
        for layer in range(self.config.text.num_hidden_layers):
            if (name := bindings.hidden_states(layer)) in chunks[0]:
                hidden = np.concatenate([outputs[name][0] for outputs in chunks])
                traced[validation.prefill_hidden_states(layer)] = hidden
        for step, token in enumerate(forced_tokens):
            feeds = self._decode_feeds(token, prompt.next_position + step)
            traced[validation.decode_logits(step)] = self._session.decode(feeds)
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
        return self.context_length - length

    def _answer(
        self,
        prompt: Prompt,
        identities: np.ndarray,
        sampler: Sampler,
        matcher: StopMatcher,
        limit: int,
        generation: Generation,
    ) -> Generator[str, None, None]:
        start = time.perf_counter()
        reused = self._cache.length
        unseen = [visual for visual in prompt.visuals if visual.token_indices[-1] >= reused]
        seen = [(visual, self._encode(visual.patches)) for visual in unseen]
        generation.vision_seconds = time.perf_counter() - start
        for outputs in self._prefill(prompt, identities, seen):
            logits = outputs[bindings.LOGITS]
        generation.prefill_seconds = time.perf_counter() - start - generation.vision_seconds

        text = self._prompts.tokenizer.stream()
        reason = FinishReason.LENGTH
        for step in range(limit):
            start = time.perf_counter()
            if step == 0:
                token = sampler(logits[0])
            else:
                token = self._next(generation.token_ids[-1], prompt.next_position + step - 1, sampler)
            generation.token_ids.append(token)
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
        vision = self.config.vision
        indices, weights = position_grid_taps((1, h, w), vision)
        cos, sin = vision_rope_tables((1, h, w), vision)
        feeds = {
            bindings.POSITION_INDICES: indices,
            bindings.POSITION_WEIGHTS: weights,
            bindings.ROPE_COS: cos,
            bindings.ROPE_SIN: sin,
            bindings.CU_SEQLENS: vision_cu_seqlens((1, h, w)),
        }
        outputs = [
            self._engine.run(bindings.VISION, {**feeds, bindings.PIXEL_VALUES: pixel_values})
            for pixel_values in patches.pixel_values.reshape(t, h * w, -1)
        ]
        return (
            np.concatenate([output[bindings.IMAGE_EMBEDS] for output in outputs]),
            np.concatenate([output[bindings.DEEPSTACK_EMBEDS] for output in outputs], axis=1),
        )

    def _prefill(
        self, prompt: Prompt, identities: np.ndarray, seen: Sequence[tuple[Visual, Features]]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Run the prompt's tokens that are not in the cache, chunk by chunk; yields the decoder's outputs."""
        for start in range(self._cache.length, len(identities), self._prefill_chunk):
            chunk = slice(start, min(start + self._prefill_chunk, len(identities)))
            feeds = self._feeds(prompt.token_ids[chunk], prompt.position_ids[:, chunk])
            embeds = feeds[bindings.INPUTS_EMBEDS]
            deepstack = np.zeros((self.config.num_deepstack, *embeds.shape), np.float32)
            for visual, (image_embeds, levels) in seen:
                first, last = np.searchsorted(visual.token_indices, (start, chunk.stop))
                rows = visual.token_indices[first:last] - start
                embeds[0, rows] = image_embeds[first:last]
                deepstack[:, 0, rows] = levels[:, first:last]
            self._cache.expect(identities[chunk])
            yield self._session.prefill({**feeds, bindings.DEEPSTACK_EMBEDS: deepstack})

    def _next(self, token: int, position: int, sampler: Sampler) -> int:
        """Run one more token; returns the one chosen after it."""
        feeds = self._decode_feeds(token, position)
        if not sampler.params.takes_likeliest:
            return sampler(self._session.decode(feeds)[0])
        likeliest, logit = self._session.decode_greedy(feeds)
        check_finite(logit)
        return likeliest

    def _decode_feeds(self, token: int, position: int) -> dict[str, np.ndarray]:
        """What the session takes of one more token of text, which the cache then expects."""
        self._cache.expect(np.array([token]))
        return self._feeds([token], np.full((3, 1), position))

    def _feeds(self, token_ids: Sequence[int] | np.ndarray, position_ids: np.ndarray) -> dict[str, np.ndarray]:
        """The decoder's inputs for tokens of text ``[n]`` at positions ``[3, n]``."""
        cos, sin = rope_tables(position_ids, self.config.text)
        return {
            bindings.INPUTS_EMBEDS: self._embeddings[token_ids][None],
            bindings.ROPE_COS: cos[None],
            bindings.ROPE_SIN: sin[None],
        }


class EmbeddingTable:
    """The token embeddings, mapped from their file: indexing with ids ``[n]`` gives float32 ``[n, hidden_size]``."""

    def __init__(self, path: Path, dtype: str, shape: Sequence[int]) -> None:
        self._is_bfloat16 = dtype == "bfloat16"
        self._rows = np.asarray(np.memmap(path, np.uint16 if self._is_bfloat16 else dtype, "r", shape=tuple(shape)))

    def __getitem__(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        rows = self._rows[token_ids]
        if self._is_bfloat16:  # the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def token_identities(prompt: Prompt) -> np.ndarray:
    """Numbers, int64 ``[n]``, equal for tokens whose embeddings are: ids of text, below 0 for visuals."""
    identities = prompt.token_ids.copy()
    for visual in prompt.visuals:
        # 62 bits of the content's hash; then as many numbers from there on as there are tokens.
        first = int.from_bytes(visual.patches.digest[:8], "little") >> 2
        identities[visual.token_indices] = -1 - first - np.arange(len(visual.token_indices))
    return identities
