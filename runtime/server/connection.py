"""One client's connection: uvicorn's, with limits of time for clients that send or take nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.stream import written


def connection_class(config: ServerConfig) -> type[H11Protocol]:
    """What uvicorn makes an object of for each connection."""

    class Connection(H11Protocol):
        """Is cut off where a request's head takes too long, or nothing is taken of what was sent."""

        _head: asyncio.TimerHandle | None = None
        _write: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = _stopped(self._head)
            elif self._head is None:
                self._await_head()

        def _await_head(self) -> None:
            self._head = self.loop.call_later(config.head_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write = _stopped(self._write) or self.loop.call_later(config.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._write = _stopped(self._write)

        def connection_lost(self, error: Exception | None) -> None:
            self._head, self._write = _stopped(self._head), _stopped(self._write)
            super().connection_lost(error)
            self._unset_keepalive_if_required()

        def send_400_response(self, msg: str) -> None:
            body = written(APIError(400, "the request is no valid HTTP.").body)
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events: list[Any] = [
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event))
            self.transport.close()

    return Connection


def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """What is there in the place of a timer that is stopped: none."""
    if timer is not None:
        timer.cancel()
    return None
