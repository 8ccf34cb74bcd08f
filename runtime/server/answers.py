"""The answers to one request while they are written, whichever form they are sent in."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from pascalvl.runtime.generation import FinishReason, TokenLogprobs
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.service import Service

_LONGEST_SILENCE = 15.0
"""Seconds, after which whoever waits is told that there is nothing new: proxies close what is silent."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new of one answer."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprobs]
    """Of its tokens, if they were asked for, but for one that ends the answer and is no text."""
    finish_reason: str | None


class Answers:
    """Answers being written; a context manager, at whose end those that have not ended are left.

    Args:
        service: what writes them.
        sequences: what the scheduler takes of each.
        ticket: of the request.
    """

    def __init__(self, service: Service, sequences: Sequence[TokenSequence], ticket: Ticket) -> None:
        self._service, self._sequences, self._ticket = service, sequences, ticket
        self._arrived = asyncio.Event()

    def __enter__(self) -> Answers:
        self._answers = self._service.begin(self._sequences, self._arrived)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for answer in self._answers:
            answer.cancel()
            self._service.metrics.count(answer.generation)

    async def pieces(self) -> AsyncIterator[Piece | None]:
        """What comes of all, as it comes; None: nothing has come for a while. Raises `APIError`."""
        metrics, loop = self._service.metrics, asyncio.get_running_loop()
        running = dict(enumerate(self._answers))
        told = dict.fromkeys(running, 0)
        latest: dict[int, float] = {}
        while running:
            is_silent = True
            for index, answer in list(running.items()):
                try:
                    news = answer.poll()
                except Exception as error:  # of the engine's thread
                    raise self._service.failure(error) from error
                if news is None:
                    continue
                is_silent, now = False, loop.time()
                if new := news.tokens - told[index]:
                    if index in latest:
                        for _ in range(new):
                            metrics.between_tokens.observe((now - latest[index]) / new)
                    elif not latest:
                        metrics.first_token.observe(self._ticket.seconds)
                    latest[index] = now
                if news.is_finished:
                    del running[index]
                yield self._piece(index, news.text, slice(told[index], news.tokens), news.is_finished)
                told[index] = news.tokens
            if is_silent and running:
                self._arrived.clear()
                timer = loop.call_later(_LONGEST_SILENCE, self._arrived.set)
                start = loop.time()
                await self._arrived.wait()
                timer.cancel()
                if loop.time() - start >= _LONGEST_SILENCE:
                    yield None

    def _piece(self, index: int, text: str, new: slice, is_finished: bool) -> Piece:
        sequence = self._sequences[index]
        generation = sequence.generation
        logprobs = generation.logprobs[new]
        if is_finished and logprobs and sequence.is_ended_by_token:
            logprobs = logprobs[:-1]
        reason = generation.finish_reason if is_finished else None
        return Piece(index, text, logprobs, reason.value if isinstance(reason, FinishReason) else None)

    def failure(self, error: Exception) -> APIError:
        """What a client is told of an error, see `Service.failure`."""
        return self._service.failure(error)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens so far: of each prompt once, of all answers."""
        generations = [sequence.generation for sequence in self._sequences]
        prompts = {id(sequence.prompt): sequence.generation for sequence in reversed(self._sequences)}
        prompt_tokens = sum(generation.prompt_tokens for generation in prompts.values())
        completion_tokens = sum(len(generation.token_ids) for generation in generations)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(generation.reused_tokens for generation in prompts.values())
            },
        }
