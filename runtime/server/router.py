"""The router before replicas: it keeps a conversation where its beginning and its pictures are in the cache.

A request goes to the replica that comes first for what it begins with, in an order that is random but always the same
(rendezvous hashing: Thaler and Ravishankar, 1998), passing over those that have more to do than their share allows
(bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018). Who may ask, and how much, is decided here; replicas do the
rest, and their responses are passed on unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import h11
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pascalvl.runtime.scheduler import Limits
from pascalvl.runtime.server.admission import Admission, Ticket
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.errors import APIError, shutting_down
from pascalvl.runtime.server.guard import guards, http_error, json_body, json_response, unless_gone
from pascalvl.runtime.server.keys import Keys
from pascalvl.runtime.server.metrics import CONTENT_TYPE
from pascalvl.runtime.server.replicas import Replica, Replicas
from pascalvl.runtime.server.stream import EventStream
from pascalvl.runtime.server.upstream import Upstream, UpstreamLost

_SHARE, _LEAST_SHARE = 1.25, 2
"""Of all requests at work, what one replica takes at most, times the mean; and that many in any case."""
_BEGINNING_CHARACTERS, _BEGINNING_TOKENS = 256, 64
"""Of a prompt without messages, what requests that belong together have in common."""
_FOR_ONE_CONNECTION = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"expect"),
    )
)
"""Headers that are not passed on (RFC 9110, 7.6.1), or that were answered here."""
_OF_REQUESTS = _FOR_ONE_CONNECTION | {b"content-length", b"origin"}
_OF_RESPONSES = _FOR_ONE_CONNECTION | {b"date"}
_ELSEWHERE = frozenset(("queue_full", "shutting_down", "engine_stopped"))
"""Codes of errors that another replica need not have."""
_RETRY_SECONDS = 5


def beginning(content: bytes) -> bytes:
    """What requests that share a prefix have in common: the model, and the messages up to the first of the user, with
    their pictures, or a prompt's first text or tokens. Of what is no such request, all."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(body, dict):
        return content
    first: Any = []
    messages, prompt = body.get("messages"), body.get("prompt")
    if isinstance(messages, list):
        for message in messages:
            first.append(message)
            if isinstance(message, dict) and message.get("role") == "user":
                break
    else:
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]  # of several
        if isinstance(prompt, str | list):
            first = prompt[: _BEGINNING_CHARACTERS if isinstance(prompt, str) else _BEGINNING_TOKENS]
    return json.dumps([body.get("model"), first]).encode()


def in_order(key: bytes, replicas: Iterable[Replica]) -> list[Replica]:
    """Replicas, the one first that requests with this key go to, then where they go without it, and so on."""

    def score(replica: Replica) -> bytes:
        return hashlib.blake2b(b"%d " % replica.number + key, digest_size=16).digest()

    return sorted(replicas, key=score)


def chosen(order: Sequence[Replica]) -> Replica:
    """The first that has no more at work than its share allows."""
    at_work = sum(replica.requests for replica in order)
    most = max(_LEAST_SHARE, math.ceil(_SHARE * (at_work + 1) / len(order)))
    return next(replica for replica in order if replica.requests < most)


class Router:
    """Passes requests on to replicas.

    Args:
        replicas: at work while the app is.
        config: as theirs, of which it keeps what is said of who may ask, how much, and how long.
    """

    def __init__(self, replicas: Replicas, config: ServerConfig) -> None:
        self.replicas, self.config = replicas, config
        count = replicas.count
        self.keys = Keys(config)
        at_once = count * Limits.sequences
        self.admission = Admission(at_once + count * config.queue, at_once, config.memory_bytes)
        """Of requests with a body."""
        self.app = Starlette(
            routes=[
                Route("/health", self._health, methods=["GET"]),
                Route("/metrics", self._metrics, methods=["GET"]),
                Route("/{path:path}", _Passed(self)),
            ],
            middleware=guards(self),
            exception_handlers={HTTPException: http_error},
        )
        self.app.router.redirect_slashes = False

    def failure(self, error: Exception) -> APIError:
        """What a client is told of an error here."""
        return APIError(500, "the server has failed, as its log tells.", code="internal_error")

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Replicas count what reaches them."""

    async def drain(self) -> None:
        """Let nobody in any more, and wait until all answers have ended, or are ended; and all replicas."""
        await self.admission.drain(self.config.drain_seconds, self.close)
        await self.replicas.end()

    def close(self) -> None:
        """End all answers and replicas at once."""
        self.admission.is_closed = True
        self.replicas.kill()

    async def pass_on(self, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        """Send the response of the replica that a request belongs to, or of another one if it cannot give any."""
        key = b""
        if body:
            key = b"%d %b" % (scope["state"]["salt"], await asyncio.to_thread(beginning, body))
        tried: list[Replica] = []
        for is_last in (False, True):
            left = [replica for replica in self.replicas.ready if replica not in tried]
            if not left:
                break
            replica = chosen(in_order(key, left)) if body else min(left, key=lambda replica: replica.requests)
            tried.append(replica)
            replica.requests += 1
            try:
                if await self._passed(replica, scope, receive, send, body, is_last or len(left) == 1):
                    return
            finally:
                replica.requests -= 1
        raise self._lost()

    def _lost(self) -> APIError:
        if self.admission.is_closed:
            return shutting_down()
        return APIError(503, "no replica can answer now: ask again later.", None, "no_replica", _RETRY_SECONDS)

    async def _passed(
        self, replica: Replica, scope: Scope, receive: Receive, send: Send, body: bytes, is_last: bool
    ) -> bool:
        """Send what a replica says; False, with nothing sent: it says nothing, or nothing that another would."""
        query = scope["query_string"]
        target = scope["raw_path"] + (b"?" + query if query else b"")
        headers = [(name, value) for name, value in scope["headers"] if name not in _OF_REQUESTS]
        try:
            async with Upstream(replica.socket) as upstream:
                response = await upstream.ask(scope["method"], target, headers, body)
                if dict(response.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                    await self._stream(replica, upstream, response, send)
                    return True
                content = await upstream.whole()
        except UpstreamLost:
            replica.lost()
            return False
        if response.status_code >= 429 and not is_last and _code(content) in _ELSEWHERE:
            return False
        passed = Response(content, response.status_code)
        passed.raw_headers = _passed_on(response)
        await passed(scope, receive, send)
        return True

    async def _stream(self, replica: Replica, upstream: Upstream, response: h11.Response, send: Send) -> None:
        """Send events as they come, each whole; and an error, if there is no end."""
        await send({"type": "http.response.start", "status": response.status_code, "headers": _passed_on(response)})
        stream, begun = EventStream(send), b""
        try:
            async for part in upstream.content():
                begun += part
                whole = begun.rfind(b"\n\n") + 2
                if whole > 1:
                    await stream.put_bytes(begun[:whole])
                    begun = begun[whole:]
        except UpstreamLost:
            replica.lost()
            lost = APIError(500, "the replica that wrote the answer has ended: ask again.", code="replica_lost")
            await stream.put_error(shutting_down() if self.admission.is_closed else lost)
        await stream.end()

    async def _health(self, _: Request) -> Response:
        states = [replica.state.value for replica in self.replicas.all]
        status = "shutting_down" if self.admission.is_closed else "ok" if self.replicas.ready else "no_replica"
        return json_response({"status": status, "replicas": states}, 200 if status == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        key = request.headers.get("authorization", "").encode("latin-1")
        headers = [(b"host", b"localhost"), *([(b"authorization", key)] if key else [])]

        async def text(replica: Replica) -> str:
            with contextlib.suppress(UpstreamLost):
                async with Upstream(replica.socket) as upstream:
                    if (await upstream.ask("GET", b"/metrics", headers, b"")).status_code == 200:
                        return (await upstream.whole()).decode()
            return ""

        replicas = self.replicas.ready
        texts = await asyncio.gather(*map(text, replicas))
        registry = CollectorRegistry()
        registry.register(_Collected(self.replicas.all, list(zip(replicas, texts, strict=True))))
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE})


class _Passed:
    """A route for all that replicas answer."""

    def __init__(self, router: Router) -> None:
        self._router = router

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await unless_gone(receive, self._router.pass_on(scope, receive, send, b""))
            return
        with Ticket(self._router.admission) as ticket:
            body = await json_body(scope, receive, ticket, self._router.config)
            await unless_gone(receive, self._router.pass_on(scope, receive, send, body))


class _Collected(Collector):
    """Replicas' metrics with a label of which it is, and what is known of them here."""

    def __init__(self, replicas: Sequence[Replica], texts: Sequence[tuple[Replica, str]]) -> None:
        self._replicas, self._texts = replicas, texts

    def collect(self) -> Iterator[Metric]:
        """Figures, each name once."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts:
            for family in text_string_to_metric_families(text):
                of_all = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                label = {"replica": str(replica.number)}
                of_all.samples += [s._replace(labels={**s.labels, **label}) for s in family.samples]
        yield from families.values()
        ready = GaugeMetricFamily("pascalvl_replica_ready", "Whether a replica can be asked.", labels=["replica"])
        requests = GaugeMetricFamily("pascalvl_replica_requests", "Requests at work there.", labels=["replica"])
        restarts = CounterMetricFamily("pascalvl_replica_restarts", "How often it was begun again.", labels=["replica"])
        for replica in self._replicas:
            number = [str(replica.number)]
            ready.add_metric(number, replica.is_ready)
            requests.add_metric(number, replica.requests)
            restarts.add_metric(number, replica.restarts)
        yield from (ready, requests, restarts)


def _passed_on(response: h11.Response) -> list[tuple[bytes, bytes]]:
    return [(bytes(name), bytes(value)) for name, value in response.headers if name not in _OF_RESPONSES]


def _code(content: bytes) -> str | None:
    """Of an error's body."""
    try:
        return json.loads(content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None
