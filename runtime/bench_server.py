"""How fast a server answers, as its clients see it: `bench server`, over HTTP, with streams."""

from __future__ import annotations

import dataclasses
import http.client
import json
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from pascalvl.plugins.errors import UserError, reason, shown

_SECONDS = 600
"""That a server may say nothing."""
_WORD_SEED = 0
_EVENT = b"data: "


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What is measured."""

    clients: int = 8
    """That ask at once, each for one answer after the other."""
    requests: int = 2
    """Of each of them."""
    words: int = 500
    """Of a prompt, each of which begins differently."""
    tokens: int = 256
    """Of an answer at most."""

    def __post_init__(self) -> None:
        for name, most in (("clients", 1024), ("requests", 100_000), ("words", 1_000_000), ("tokens", 1_000_000)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise UserError(f"{name} is out of range: expected 1 to {most}, found {value}.")


@dataclasses.dataclass(frozen=True)
class ServerResult:
    """What was measured."""

    url: str
    model: str
    options: ServerOptions
    tokens: int
    """Of all answers."""
    tokens_per_second: float
    """Of all of them, from the first request to the last token, prompts included."""
    first_token_ms: tuple[float, float]
    """Median and 99th percentile."""
    gap_ms: tuple[float, float]
    """Between two events of a stream: of text that a token completes, which random ones rarely do."""


@dataclasses.dataclass
class _Answer:
    begun: float
    events: list[float]
    """When text came."""
    tokens: int = 0


def measure(
    url: str, options: ServerOptions, api_key: str = "", progress: Callable[[], None] = lambda: None
) -> ServerResult:
    """Ask a server.

    Args:
        url: where its API is, such as ``http://127.0.0.1:8000/v1``.
        options: how much is asked.
        api_key: of a client.
        progress: called after each answer.

    Raises:
        UserError: the server cannot be reached, or an answer of it is an error.
    """
    server = _Server(url, api_key)
    model = server.model()
    answers: list[list[_Answer]] = [[] for _ in range(options.clients)]
    errors: list[Exception] = []
    rng = np.random.default_rng(_WORD_SEED)
    prompts = [
        [" ".join(f"{word:x}" for word in rng.integers(1 << 16, size=options.words)) for _ in range(options.requests)]
        for _ in range(options.clients)
    ]

    def ask(client: int) -> None:
        try:
            for prompt in prompts[client]:
                if errors:
                    return
                answers[client].append(server.answer(model, prompt, options.tokens))
                progress()
        except (UserError, OSError, http.client.HTTPException, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(client,), daemon=True) for client in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0] if isinstance(errors[0], UserError) else _no_answer(url, errors[0])
    every = [answer for of_client in answers for answer in of_client]
    end = max(answer.events[-1] for answer in every)
    tokens = sum(answer.tokens for answer in every)
    first = [1e3 * (answer.events[0] - answer.begun) for answer in every]
    gaps = np.concatenate([1e3 * np.diff(answer.events) for answer in every])
    return ServerResult(
        url,
        model,
        options,
        tokens,
        tokens / (end - min(answer.begun for answer in every)),
        (float(np.median(first)), float(np.quantile(first, 0.99))),
        (float(np.median(gaps)), float(np.quantile(gaps, 0.99))) if len(gaps) else (0.0, 0.0),
    )


class _Server:
    """Where requests go."""

    def __init__(self, url: str, api_key: str) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"expected the URL of a server's API, such as http://127.0.0.1:8000/v1, found {shown(url)}."
            )
        self._url, self._path = url, parts.path.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            self._host, self._port = parts.hostname, parts.port
        except ValueError as error:
            raise UserError(f"{shown(url)} has no port that can be ({error}): give another one.") from None
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def model(self) -> str:
        """The first that it serves."""
        try:
            with self._response("GET", "/models") as response:
                return str(json.load(response)["data"][0]["id"])
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise _no_answer(self._url, error) from error

    def answer(self, model: str, prompt: str, tokens: int) -> _Answer:
        """Ask for one, and read it as it comes."""
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        found = _Answer(time.perf_counter(), [])
        with self._response("POST", "/chat/completions", body) as response:
            for event in _events(response):
                if "error" in event:
                    raise UserError(f"the server failed in the middle of an answer: {shown(event['error'])}.")
                if event.get("usage"):
                    found.tokens = int(event["usage"]["completion_tokens"])
                elif event["choices"] and event["choices"][0]["delta"].get("content"):
                    found.events.append(time.perf_counter())
        if not found.events:
            found.events.append(time.perf_counter())
        return found

    def _response(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        connection = self._kind(self._host, self._port, timeout=_SECONDS)
        content = None if body is None else json.dumps(body)
        connection.request(method, self._path + path, content, self._headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            text = response.read(10_000).decode(errors="replace")
            raise UserError(
                f"the server at {self._url} answered {response.status} ({shown(text)}): correct that first."
            )
        return response


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(_EVENT) and (content := line[len(_EVENT) :].strip()) != b"[DONE]":
            yield json.loads(content)


def _no_answer(url: str, error: Exception) -> UserError:
    why = reason(error) if str(error) else type(error).__name__
    return UserError(f"the server at {url} gives no answer ({why}): start one with 'pascalvl serve', or give its URL.")


def tables(result: ServerResult) -> Sequence[Table]:
    """What a person reads of a result."""
    options = result.options
    table = Table(title=f"{result.model} at {result.url}: {options.clients} clients, {options.words} words each")
    for heading in (
        "answers",
        "tokens",
        "tok/s of all",
        "first token, ms",
        "p99",
        "between tokens, ms",
        "p99",
    ):
        table.add_column(heading, justify="right")
    times = (*result.first_token_ms, *result.gap_ms)
    table.add_row(
        f"{options.clients * options.requests}",
        f"{result.tokens:,}",
        f"{result.tokens_per_second:,.0f}",
        *(f"{ms:,.1f}" for ms in times),
    )
    return [table]
