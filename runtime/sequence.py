"""A prompt and the answer to it, while it is computed."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable

import numpy as np

from pascalvl.engines.engine import Features
from pascalvl.plugins.prompt import Prompt, Visual
from pascalvl.runtime.generation import FinishReason, Generation, StopMatcher, TokenLogprobs
from pascalvl.runtime.kv_cache import KVCache
from pascalvl.runtime.sampling import Sampler
from pascalvl.runtime.tokenizer import TextStream

_TOKEN_BITS = 20
"""Token ids are below 2^20."""


class TokenSequence:
    """The tokens of a prompt and its answer, which of them the KV cache has, and when the answer ends.

    Args:
        prompt: what is answered.
        pinned: which of its tokens a window never drops, bool ``[n]``.
        sampler: chooses the answer's tokens.
        limit: tokens of the answer at most.
        stop: what ends it besides.
        end_tokens: tokens that do.
        text: makes text of its tokens.
        generation: what becomes of it, filled as it comes.
        logprobs: fill `Generation.logprobs`, with so many of the likeliest; None: do not.
        cache_salt: see `token_identities`.
    """

    def __init__(
        self,
        prompt: Prompt,
        pinned: np.ndarray,
        sampler: Sampler,
        limit: int,
        stop: StopMatcher,
        end_tokens: frozenset[int],
        text: TextStream,
        generation: Generation,
        logprobs: int | None = None,
        cache_salt: int = 0,
    ) -> None:
        self.prompt, self.sampler, self.generation, self.logprobs = prompt, sampler, generation, logprobs
        self.cache_salt = cache_salt
        self._limit, self._stop, self._end_tokens, self._text = limit, stop, end_tokens, text
        self._prompted = prompted = len(prompt.token_ids)
        self._next_position = prompt.next_position
        self._tokens = np.concatenate([prompt.token_ids, np.zeros(limit, np.int64)])
        self._identities = np.concatenate([token_identities(prompt, cache_salt), np.zeros(limit, np.int64)])
        self._pinned = np.concatenate([pinned, np.zeros(limit, bool)])
        self.length = prompted
        """Tokens so far."""
        self.cache: KVCache | None = None
        """Where its keys and values are; None while it waits."""
        self.features: dict[int, Features] = {}
        """Of pictures that were looked at, until its prompt is computed."""
        self._pieces: deque[str] = deque()
        """Of the answer's text, that nobody has taken yet."""
        self.error: Exception | None = None
        """Why there is no more."""

    @property
    def is_finished(self) -> bool:
        return self.error is not None or self.generation.finish_reason is not None

    @property
    def is_ended_by_token(self) -> bool:
        """Whether the last token ended the answer, and is none of its text."""
        return bool(self.generation.token_ids) and self.generation.token_ids[-1] in self._end_tokens

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return self.cache.length if self.cache else 0

    @property
    def is_decoding(self) -> bool:
        """Whether what comes next is the token that was chosen last."""
        return self.length > self._prompted and self.computed == self.length - 1

    @property
    def identities(self) -> np.ndarray:
        """Of the tokens so far, see `token_identities`."""
        return self._identities[: self.length]

    @property
    def pinned(self) -> np.ndarray:
        """Which of the tokens so far a window never drops."""
        return self._pinned[: self.length]

    def take_pieces(self) -> list[str]:
        """What has come of the answer's text since this was called last."""
        return [self._pieces.popleft() for _ in range(len(self._pieces))]

    def token_ids(self, part: slice) -> np.ndarray:
        """Of some of the tokens so far."""
        return self._tokens[part]

    def positions(self, part: slice) -> np.ndarray:
        """M-RoPE positions of some of the tokens so far, int64 ``[3, n]``."""
        own = self.prompt.position_ids[:, part]
        answered = np.arange(max(part.start, self._prompted), max(part.stop, self._prompted)) - self._prompted
        return np.concatenate([own, np.tile(answered + self._next_position, (3, 1))], axis=1)

    def next_position(self) -> int:
        """Of the token that was chosen last."""
        return self._next_position + self.length - 1 - self._prompted

    def unseen(self) -> list[Visual]:
        """Pictures and videos of which tokens are still to be computed."""
        return [visual for visual in self.prompt.visuals if visual.token_indices[-1] >= self.computed]

    def accept(self, token: int, highest: float, logits: Callable[[], np.ndarray]) -> None:
        """Take the next token.

        Args:
            token: what was chosen by ``sampler.next()``.
            highest: the highest logit.
            logits: gives the row of logits, for log probabilities.

        Raises:
            UserError: see `Sampler.add`.
        """
        token = self.sampler.add(token, highest)
        if self.logprobs is not None:
            self.generation.logprobs.append(TokenLogprobs.of(logits(), token, self.logprobs))
        self._add(token)

    @property
    def forced(self) -> int:
        """How many tokens have to come next, if logits of none of them are wanted."""
        return len(self.sampler.forced) if self.logprobs is None and not self.is_finished else 0

    def take_forced(self) -> None:
        """Take these, as if each had been chosen; raises `UserError` as `accept` does."""
        while self.forced:
            self._add(self.sampler.add_forced())

    def _add(self, token: int) -> None:
        generation = self.generation
        generation.token_ids.append(token)
        is_end = token in self._end_tokens
        if piece := "" if is_end else self._stop.push(self._text.push(token)):
            self._pieces.append(piece)
        if is_end or self._stop.stopped or self.sampler.is_complete:
            self._finish(FinishReason.STOP)
        elif len(generation.token_ids) == self._limit:
            self._finish(FinishReason.LENGTH)
        else:
            self._tokens[self.length] = self._identities[self.length] = token
            self.length += 1

    def _finish(self, reason: FinishReason) -> None:
        if piece := self._stop.flush():
            self._pieces.append(piece)
        self.generation.finish_reason = reason


def cache_salt(secret: bytes) -> int:
    """A salt for `token_identities`: 42 bits of the secret's hash, above those of token ids."""
    return int.from_bytes(hashlib.sha256(secret).digest()[:8], "little") >> 2 & -1 << _TOKEN_BITS


def token_identities(prompt: Prompt, salt: int = 0) -> np.ndarray:
    """Numbers, int64 ``[n]``, equal for tokens whose embeddings are: ids of text, below 0 for visuals.

    Prompts of different salts (`cache_salt`; 0: none) differ in their first number, so that nothing is found of one for
    the other: what is kept of sequences is found from their beginnings on.
    """
    identities = prompt.token_ids.copy()
    for visual in prompt.visuals:
        # 62 bits of the content's hash; then as many numbers from there on as there are tokens.
        first = int.from_bytes(visual.patches.digest[:8], "little") >> 2
        identities[visual.token_indices] = -1 - first - np.arange(len(visual.token_indices))
    identities[:1] ^= salt
    return identities
