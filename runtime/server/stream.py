"""Server-sent events: how answers are sent while they are written (WHATWG HTML, 9.2)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.types import Send

from pascalvl.runtime.server.errors import APIError

DONE = b"data: [DONE]\n\n"
SILENCE = b": nothing new\n\n"
"""A comment, which clients leave out."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def written(content: Any) -> bytes:
    """JSON in UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class EventStream:
    """One response, of status 200 once it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def begin(self) -> None:
        """Send the head."""
        await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async def put(self, content: Mapping[str, Any]) -> None:
        """Send an event."""
        await self.put_bytes(b"data: " + written(content) + b"\n\n")

    async def put_error(self, error: APIError) -> None:
        """Tell what went wrong, in the middle."""
        await self.put_bytes(b"event: error\ndata: " + written(error.body) + b"\n\n")

    async def put_bytes(self, content: bytes) -> None:
        """Send an event as it is."""
        await self._send({"type": "http.response.body", "body": content, "more_body": True})

    async def end(self) -> None:
        """There is no more."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
