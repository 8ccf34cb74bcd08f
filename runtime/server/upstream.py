"""One request to a replica, over its Unix socket (HTTP/1.1, by h11)."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterable
from types import TracebackType

import h11

_CHUNK = 1 << 16
_HEADER_BYTES = 1 << 16


class UpstreamLost(Exception):
    """A replica cannot be reached, or ended, or said what is no HTTP, before its response was whole."""


class Upstream:
    """A connection for one request; an asynchronous context manager, at whose end the replica knows that nobody waits.

    It is a bare socket: what a replica answers before it has read a request, and closes, is there to be read, though
    the rest of the request cannot be written. A stream of asyncio's would end with that error.

    Args:
        path: of the socket that the replica listens at.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._sending: asyncio.Future[None] | None = None
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEADER_BYTES)

    async def __aenter__(self) -> Upstream:
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        try:
            await self._loop.sock_connect(self._socket, self._path)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, OSError):
                raise UpstreamLost from error
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait([self._sending])
            if not self._sending.cancelled():
                self._sending.exception()  # nobody else asks for it
        self._socket.close()

    async def ask(
        self, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> h11.Response:
        """Send a request; returns the head of its response. Raises `UpstreamLost`."""
        request = h11.Request(
            method=method,
            target=target,
            headers=[*headers, (b"content-length", str(len(body)).encode()), (b"connection", b"close")],
        )
        parts = [self._http.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())]
        self._sending = asyncio.ensure_future(self._loop.sock_sendall(self._socket, b"".join(parts)))
        while not isinstance(event := await self._event(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise UpstreamLost
        return event

    async def content(self) -> AsyncIterator[bytes]:
        """What follows a response's head, as it comes. Raises `UpstreamLost`."""
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            if not isinstance(event, h11.Data):
                raise UpstreamLost
            yield bytes(event.data)

    async def whole(self) -> bytes:
        """All that follows a response's head. Raises `UpstreamLost`."""
        return b"".join([part async for part in self.content()])

    async def get(self, path: str) -> bytes:
        """What is at a path that is open to all, whatever its status. Raises `UpstreamLost`."""
        await self.ask("GET", path.encode(), [(b"host", b"localhost")], b"")
        return await self.whole()

    async def _event(self) -> object:
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._loop.sock_recv(self._socket, _CHUNK))
        except (OSError, h11.RemoteProtocolError) as error:
            raise UpstreamLost from error
        return event
