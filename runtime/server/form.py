"""The form of one response, and how answers are sent in it: whole, or as they are written."""

from __future__ import annotations

import abc
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pascalvl.runtime.generation import TokenLogprobs
from pascalvl.runtime.server.answers import Answers
from pascalvl.runtime.server.settings import Settings
from pascalvl.runtime.server.stream import DONE, SILENCE, EventStream, written


class Form(abc.ABC):
    """What a completion looks like as JSON.

    Args:
        model: its name, as it is told.
        settings: of the request.
        choices: in all.
    """

    kind: str
    """``object`` of a whole one."""
    kind_of_chunk: str
    prefix: str
    """Of ids."""

    def __init__(self, model: str, settings: Settings, choices: int) -> None:
        self._settings, self._count = settings, choices
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    @abc.abstractmethod
    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str) -> dict[str, Any]:
        """Of a whole answer, which ended for a reason."""

    @abc.abstractmethod
    def first(self) -> dict[str, Any] | None:
        """Of a stream's first chunk of each answer; None: there is none but the others."""

    @abc.abstractmethod
    def deltas(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """Of a stream's chunks for what is new of an answer."""

    @abc.abstractmethod
    def last(self, index: int, reason: str) -> list[dict[str, Any]]:
        """Of a stream's last chunks of an answer, the last with a ``finish_reason``."""

    async def send(self, answers: Answers, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answers, as the request has it; raises `APIError` as long as nothing was sent."""
        if self._settings.stream:
            await self._stream(answers, EventStream(send))
        else:
            content = await self._whole(answers)
            await Response(written(content), media_type="application/json")(scope, receive, send)

    async def _whole(self, answers: Answers) -> dict[str, Any]:
        texts: list[list[str]] = [[] for _ in range(self._count)]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self._count)]
        reasons = [""] * self._count
        async for piece in answers.pieces():
            if piece is not None:
                texts[piece.index].append(piece.text)
                logprobs[piece.index] += piece.logprobs
                reasons[piece.index] = piece.finish_reason or ""
        choices = [
            {"index": index, **self.choice(index, "".join(texts[index]), logprobs[index], reasons[index])}
            for index in range(self._count)
        ]
        return {**self._head, "object": self.kind, "choices": choices, "usage": answers.usage}

    async def _stream(self, answers: Answers, stream: EventStream) -> None:
        await stream.begin()
        if first := self.first():
            for index in range(self._count):
                await stream.put(self._chunk(index, first))
        try:
            async for piece in answers.pieces():
                if piece is None:
                    await stream.put_bytes(SILENCE)
                    continue
                chunks = self.deltas(piece.index, piece.text, piece.logprobs) if piece.text or piece.logprobs else []
                if piece.finish_reason:
                    chunks += self.last(piece.index, piece.finish_reason)
                for chunk in chunks:
                    await stream.put(self._chunk(piece.index, chunk))
            if self._settings.include_usage:
                await stream.put({**self._head, "object": self.kind_of_chunk, "choices": [], "usage": answers.usage})
            await stream.put_bytes(DONE)
        except ClientDisconnect:
            raise
        except Exception as error:  # what was begun cannot be answered otherwise
            await stream.put_error(answers.failure(error))
        await stream.end()

    def _chunk(self, index: int, choice: Mapping[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._settings.include_usage else {}
        choices = [{"index": index, "finish_reason": None, **choice}]
        return {**self._head, "object": self.kind_of_chunk, "choices": choices, **usage}
