"""What all requests share: the model at work, who is let in, and the threads in which prompts are made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.async_model import AsyncGeneration, AsyncModel
from pascalvl.runtime.grammar import Grammar
from pascalvl.runtime.model import VisionLanguageModel
from pascalvl.runtime.scheduler import Limits
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server.admission import Admission, Ticket
from pascalvl.runtime.server.config import ServerConfig
from pascalvl.runtime.server.errors import APIError, engine_stopped, shutting_down
from pascalvl.runtime.server.keys import Keys
from pascalvl.runtime.server.media import Media, Source
from pascalvl.runtime.server.metrics import Metrics
from pascalvl.runtime.server.schema import parsed

_PREPARING, _FETCHING = 2, 8
"""Threads in which prompts are made, and pictures are fetched."""
_BYTES_OF_A_VALUE = 100
"""Of JSON, parsed."""

P = ParamSpec("P")
T = TypeVar("T")


class Service:
    """One model, served; `running` is its life.

    Args:
        model: which; the service is its only user.
        config: how.
    """

    def __init__(self, model: VisionLanguageModel, config: ServerConfig, media: Media | None = None) -> None:
        self.model, self.config = model, config
        at_once = Limits.sequences
        self.admission = Admission(at_once + config.queue, at_once, config.memory_bytes)
        self.keys = Keys(config)
        self.media = media or Media.of(config.media)
        self.metrics = Metrics(self)
        self.engine = AsyncModel(model, config.unload_after)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While it is open, questions are answered."""
        with (
            ThreadPoolExecutor(_PREPARING, "pascalvl prompts") as preparing,
            ThreadPoolExecutor(_FETCHING, "pascalvl fetch") as fetching,
            ThreadPoolExecutor(1, "pascalvl JSON") as parsing,
        ):
            self._parsing = _Workers(parsing, 1)
            self._preparing = _Workers(preparing, _PREPARING)
            self._fetching = _Workers(fetching, _FETCHING)
            preparing.submit(self.model.check_grammar, Grammar.json_object())  # the first takes longer than the others
            async with self.engine:
                yield

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.config.model_names[0]

    @property
    def health(self) -> str:
        """``ok``, or why nothing can be asked."""
        if self.engine.error is not None:
            return "engine_stopped"
        return "shutting_down" if self.admission.is_closed else "ok"

    def check_model(self, name: str | None) -> None:
        """Raise `APIError` 404 for a model that is not served here."""
        if name is not None and name not in self.config.model_names:
            served = ", ".join(self.config.model_names)
            raise APIError(404, f"the model {shown(name)} is not here: expected {served}.", "model", "model_not_found")

    async def prompt(
        self,
        messages: Sequence[dict[str, Any]],
        sources: Sequence[tuple[dict[str, Any], Source]],
        ticket: Ticket,
        template_variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """Make a prompt of messages.

        Args:
            messages: in Hugging Face's form.
            sources: the parts of them that are pictures and videos, to be filled, and what each is of.
            ticket: which the memory is taken from.
            template_variables: what else the chat template may ask for.
            tools: JSON schemas of functions that the model may call.

        Raises:
            APIError: what is wrong with them.
        """
        self.media.check_count(len(sources))
        wanted = [source for _, source in sources]
        found = await asyncio.gather(*(self._file(source, ticket) for source in wanted), return_exceptions=True)
        files: list[bytes] = []
        for each in found:  # all have ended: none takes memory any more
            if isinstance(each, BaseException):
                raise each
            files.append(each)

        def build() -> Prompt:
            with contextlib.ExitStack() as stack:
                opened = self.media.opened(wanted, files, lambda nbytes: ticket.take(nbytes=nbytes), stack)
                for (part, source), visual in zip(sources, opened, strict=True):
                    part[source.kind] = visual
                with request_errors("messages"):
                    return self.model.prompt(messages, tools, template_variables)

        return await self._preparing.run(build)

    async def _file(self, source: Source, ticket: Ticket) -> bytes:
        workers = self._fetching if self.media.is_far(source) else self._preparing
        content = await workers.run(self.media.read, source)
        ticket.take(nbytes=len(content))
        return content

    async def parse(self, content: bytes, ticket: Ticket) -> Any:
        """The JSON of a request, in a thread that nothing else takes long in; raises `APIError` for what is none, and
        for values that take more memory than there is."""

        def made() -> Any:
            ticket.take(nbytes=_BYTES_OF_A_VALUE * sum(map(content.count, (b",", b"[", b"{"))))
            return parsed(content)

        return await self._parsing.run(made)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread of those in which prompts are made."""
        return await self._preparing.run(function, *args, **kwargs)

    def begin(self, sequences: Sequence[TokenSequence], arrived: asyncio.Event) -> list[AsyncGeneration]:
        """Begin answers; raises `APIError` where that is not possible any more."""
        try:
            return [self.engine.begin(sequence, arrived) for sequence in sequences]
        except UserError as error:
            raise self.failure(error) from None

    def failure(self, error: Exception) -> APIError:
        """What a client is told of an error of the engine's, or of one answer."""
        if isinstance(error, APIError):
            return error
        if self.engine.error is not None:
            return engine_stopped()
        if self.admission.is_closed:
            return shutting_down()
        if isinstance(error, UserError):
            return APIError(500, str(error), code="engine_error")
        if isinstance(error, MemoryError):
            return APIError(500, "there is not enough memory for the request: send less at once.", code="out_of_memory")
        return APIError(500, "the server has failed, as its log tells.", code="internal_error")

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """For the metrics: a request that has ended."""
        self.metrics.requests.labels(path, str(status)).inc()
        self.metrics.duration.observe(seconds)

    def close(self) -> None:
        """End all answers, which tells those who wait."""
        self.engine.close()

    async def drain(self) -> None:
        """Let nobody in any more, and wait until all answers have ended, or are ended."""
        await self.admission.drain(self.config.drain_seconds, self.close)


class _Workers:
    """Threads for functions that take a while; what waits for one holds nothing but its own task."""

    def __init__(self, executor: ThreadPoolExecutor, count: int) -> None:
        self._executor = executor
        self._free = asyncio.Semaphore(count)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What the function returns. Who is cancelled meanwhile waits for its end: so long it uses memory."""
        async with self._free:
            future = asyncio.wrap_future(self._executor.submit(function, *args, **kwargs))
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                await asyncio.wait([future])
                if not future.cancelled():
                    future.exception()  # nobody else will ask for it
                raise


@contextlib.contextmanager
def field_errors() -> Iterator[None]:
    """Inside, errors that begin with the field that they are about are a client's."""
    try:
        yield
    except UserError as error:
        raise APIError(400, str(error), str(error).partition(":")[0], "invalid_value") from None


@contextlib.contextmanager
def request_errors(param: str | None = None) -> Iterator[None]:
    """Inside, what users can put right is a client's error."""
    try:
        yield
    except UserError as error:
        raise APIError(400, str(error), param, "invalid_value") from None
