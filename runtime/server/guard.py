"""What every request passes on its way to a route, and how errors are answered."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.keys import Keys
from pascalvl.runtime.server.stream import written

log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset(("/", "/health"))
"""That no key is needed for."""


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A response with JSON in it."""
    return Response(written(content), status, headers, "application/json")


def error_response(error: APIError) -> Response:
    """A response that tells what is wrong."""
    return json_response(error.body, error.status, error.headers)


async def http_error(_: Request, error: Exception) -> Response:
    """Of Starlette's own errors: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    sentences = {404: "there is nothing at this path.", 405: "this path does not take this method."}
    response = error_response(APIError(error.status_code, sentences.get(error.status_code, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


class Guarded(Protocol):
    """What requests are for."""

    config: ServerConfig
    keys: Keys

    def failure(self, error: Exception) -> APIError:
        """What a client is told of an error."""

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Of one that has ended."""


def guards(guarded: Guarded) -> list[Middleware]:
    """The middleware that every request passes."""
    origins = guarded.config.allowed_origins
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
    guard = Middleware(_Guard, guarded=guarded)
    return [cors, guard] if origins else [guard]


class _Guard:
    """Lets in who may ask, answers errors in their form, and counts."""

    def __init__(self, app: ASGIApp, guarded: Guarded) -> None:
        self._app, self._guarded = app, guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None
        start = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._guarded.keys.check_browser(headers)
            if scope["path"] not in _OPEN_PATHS:
                scope.setdefault("state", {})["salt"] = self._guarded.keys.salt(headers)
            await self._app(scope, receive, watched)
        except ClientDisconnect:
            status = status or 499
        except Exception as error:
            failure = error if isinstance(error, APIError) else self._guarded.failure(error)
            if failure.status == 500:
                log.error("%s: an error", scope["path"], exc_info=error)
            if status is None:
                await error_response(failure)(scope, receive, watched)
            else:
                raise  # the connection is closed, which tells that there is no more
        finally:
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "other"
            self._guarded.count_request(path, status or 499, time.perf_counter() - start)


async def json_body(scope: Scope, receive: Receive, ticket: Ticket, config: ServerConfig) -> bytes:
    """A request's, which is JSON by what it says; raises `APIError` for others, and one that is too large or slow."""
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise APIError(415, "expected JSON, told by a header 'Content-Type: application/json'.")
    try:
        return await asyncio.wait_for(_body(headers, receive, ticket, config.body_bytes), config.body_seconds)
    except asyncio.TimeoutError:
        raise APIError(408, f"the request's body has not come within {config.body_seconds:g} seconds.") from None


async def _body(headers: Headers, receive: Receive, ticket: Ticket, most: int) -> bytes:
    """Within bounds that are checked before it is here."""
    too_large = APIError(413, f"the request's body is too large: expected at most {most} bytes.", code="body_too_large")
    stated = headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > most:
        raise too_large
    ticket.take(nbytes=int(stated))
    content, taken = bytearray(), int(stated)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        content += message.get("body", b"")
        if len(content) > most:
            raise too_large
        if len(content) > taken:  # without a stated length
            ticket.take(nbytes=len(content) - taken)
            taken = len(content)
        if not message.get("more_body", False):
            return bytes(content)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        await working
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
