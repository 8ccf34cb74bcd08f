"""The routes, and what answers them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server import metrics
from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.answers import Answers
from pascalvl.runtime.server.chat import chat_sequences, messages_of
from pascalvl.runtime.server.completions import completion_sequences, text_tokens
from pascalvl.runtime.server.form import Form
from pascalvl.runtime.server.guard import guards, http_error, json_body, json_response, unless_gone
from pascalvl.runtime.server.page import page
from pascalvl.runtime.server.schema import TOKENIZE, checked, refuse
from pascalvl.runtime.server.service import Service, request_errors

Answer = Callable[[Service, Any, Ticket, Scope, Receive, Send], Coroutine[Any, Any, None]]
Sequences = Callable[[Service, Any, Ticket, int], Awaitable[tuple[Form, Sequence[TokenSequence]]]]


def create_app(service: Service) -> Starlette:
    """An ASGI app that serves a model; the app's lifespan is the service's."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = Starlette(
        routes=[
            Route("/", _page(), methods=["GET"]),
            Route("/v1/chat/completions", _Posted(service, _completion(chat_sequences)), methods=["POST"]),
            Route("/v1/completions", _Posted(service, _completion(completion_sequences)), methods=["POST"]),
            Route("/tokenize", _Posted(service, _tokenize), methods=["POST"]),
            Route("/v1/models", _models(service), methods=["GET"]),
            Route("/v1/models/{name:path}", _model(service), methods=["GET"]),
            Route("/health", _health(service), methods=["GET"]),
            Route("/metrics", _metrics(service), methods=["GET"]),
        ],
        middleware=guards(service),
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    return app


class _Posted:
    """A route that takes JSON, and a place among the answers as long as it lasts.

    Args:
        service: of all.
        answer: sends the response to a body, unless the client goes away before.
    """

    def __init__(self, service: Service, answer: Answer) -> None:
        self._service, self._answer = service, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self._service
        if service.engine.error is not None:
            raise service.failure(service.engine.error)
        with Ticket(service.admission) as ticket:
            content = await json_body(scope, receive, ticket, service.config)
            body = await service.parse(content, ticket)
            del content
            await unless_gone(receive, self._answer(service, body, ticket, scope, receive, send))


def _completion(sequences_of: Sequences) -> Answer:
    async def answer(service: Service, body: Any, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
        form, sequences = await sequences_of(service, body, ticket, scope["state"]["salt"])
        del body
        with Answers(service, sequences, ticket) as answers:
            await form.send(answers, scope, receive, send)

    return answer


async def _tokenize(service: Service, body: Any, ticket: Ticket, scope: Scope, receive: Receive, send: Send) -> None:
    """The tokens of a text, or of the prompt that is made of messages."""
    fields = checked(body, TOKENIZE)
    service.check_model(fields.get("model"))
    if ("prompt" in fields) == ("messages" in fields):
        refuse("prompt", "or messages is needed, and not both")
    if "messages" in fields:
        prompt = await service.prompt(*messages_of(fields["messages"]), ticket)
        tokens = prompt.token_ids.tolist()
    else:
        with request_errors("prompt"):
            tokens = await service.run(text_tokens, service.model, fields["prompt"])
    found = {"count": len(tokens), "max_model_len": service.model.context_length, "tokens": tokens}
    await json_response(found)(scope, receive, send)


Endpoint = Callable[[Request], Awaitable[Response]]


def _models(service: Service) -> Endpoint:
    started = int(time.time())

    async def models(_: Request) -> Response:
        return json_response(
            {"object": "list", "data": [_described(name, service, started) for name in service.config.model_names]}
        )

    return models


def _model(service: Service) -> Endpoint:
    started = int(time.time())

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        service.check_model(name)
        return json_response(_described(name, service, started))

    return model


def _described(name: str, service: Service, started: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "pascalvl",
        "max_model_len": service.model.context_length,
    }


def _page() -> Endpoint:
    body, headers = page()

    async def shown(_: Request) -> Response:
        return Response(body, headers=headers)

    return shown


def _health(service: Service) -> Endpoint:
    async def health(_: Request) -> Response:
        return json_response({"status": service.health}, 200 if service.health == "ok" else 503)

    return health


def _metrics(service: Service) -> Endpoint:
    async def text(_: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    return text
