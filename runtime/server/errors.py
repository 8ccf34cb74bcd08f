"""Errors as OpenAI's clients expect them."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(Exception):
    """What a client is told, in one sentence.

    Args:
        status: of HTTP.
        message: the sentence.
        param: the field of the request that it is about.
        code: a name for programs.
        retry_after: seconds after which it may be asked again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def body(self) -> dict[str, Any]:
        """As JSON has it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def engine_stopped() -> APIError:
    """The engine's thread has ended by an error, which the server's log tells."""
    return APIError(500, "the engine has stopped by an error, which the server's log tells.", code="engine_stopped")


def shutting_down() -> APIError:
    """The server ends."""
    return APIError(503, "the server is shutting down: ask again later, or another one.", None, "shutting_down", 5)
