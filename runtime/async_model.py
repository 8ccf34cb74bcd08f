"""A model that many coroutines ask: one thread runs the scheduler, coroutines only submit, read and cancel."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.generation import Generation
from pascalvl.runtime.idle import Idle
from pascalvl.runtime.model import Request, VisionLanguageModel
from pascalvl.runtime.sequence import TokenSequence

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)


class AsyncModel:
    """Answers requests of coroutines of one event loop, many at once; an asynchronous context manager.

    Args:
        model: which; nobody else uses it until the end.
        unload_after: seconds without anything to do after which it is unloaded, until it is asked again; None: never.
    """

    def __init__(self, model: VisionLanguageModel, unload_after: float | None = None) -> None:
        self.model = model
        self.error: Exception | None = None
        """Why the engine has stopped, of itself."""
        self._unload_after = unload_after
        self._preparing = threading.Lock()
        self._wake = threading.Condition()
        self._asked: deque[tuple[str, AsyncGeneration]] = deque()
        """What the thread has not done yet: to submit an answer, or to cancel it."""
        self._at_work: set[AsyncGeneration] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="pascalvl engine", daemon=True)

    async def __aenter__(self) -> AsyncModel:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()
        await asyncio.to_thread(self._thread.join)

    def close(self) -> None:
        """Take no more questions, and end what is at work after the thread's present step."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()

    async def submit(self, request: Request) -> AsyncGeneration:
        """Begin an answer; the prompt is made in a thread of its own, beside the steps.

        Raises:
            UserError: as `VisionLanguageModel.generate` does.
        """
        return self.begin(await asyncio.to_thread(self._prepare, request))

    def begin(self, sequence: TokenSequence, arrived: asyncio.Event | None = None) -> AsyncGeneration:
        """Begin the answer to what `VisionLanguageModel.sequence` made of a request.

        Args:
            sequence: it.
            arrived: is set with whatever comes of it; one of its own if None.
        """
        answer = AsyncGeneration(self, sequence, arrived or asyncio.Event())
        self.ask("submit", answer)
        return answer

    def _prepare(self, request: Request) -> TokenSequence:
        with self._preparing:
            return self.model.sequence(request)

    def ask(self, what: str, answer: AsyncGeneration) -> None:
        """Have an answer submitted or cancelled; raises `UserError` when the model is closed."""
        with self._wake:
            if self._is_closed:
                raise _closed()
            self._asked.append((what, answer))
            self._wake.notify()

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with Idle(self.model, self._unload_after) as idle:
                while self._wait():
                    with idle.busy():
                        self._work()
        except BaseException as error:  # whatever it is, a library's panic, too: those who wait are told
            log.error("the engine stopped", exc_info=True)
            self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        finally:
            self.close()
            try:
                for answer in self._at_work:
                    self.model.scheduler.cancel(answer.sequence)
            finally:
                self._fail(self.error or _closed())

    def _wait(self) -> bool:
        """Until there is something to do; returns False at the end."""
        with self._wake:
            while not self._asked and not self._is_closed:
                self._wake.wait()
            return not self._is_closed

    def _work(self) -> None:
        """Run all there is to run."""
        try:
            self.model.load()
        except (UserError, MemoryError) as error:  # of a model that was unloaded: it may be loaded later
            log.warning("the model cannot be loaded again: %s", str(error) or "memory has run out")
            self._fail(error)
            return
        while self._take():
            try:
                self.model.scheduler.step()
            except MemoryError as error:
                log.warning("there is not enough memory for a step: the answer that began last is ended")
                if not self.model.scheduler.end_latest(error):
                    raise
            self._deliver()

    def _take(self) -> bool:
        """Do what was asked; returns whether there is something to run."""
        with self._wake:
            asked = list(self._asked)
            self._asked.clear()
        for what, answer in asked:
            if what == "submit":
                self._at_work.add(answer)
                self.model.scheduler.submit(answer.sequence)
            elif answer in self._at_work:
                self._at_work.remove(answer)
                self.model.scheduler.cancel(answer.sequence)
        return bool(self._at_work) and not self._is_closed

    def _deliver(self) -> None:
        """Hand over what has come of answers since."""
        news = []
        for answer in list(self._at_work):
            sequence = answer.sequence
            text, tokens = "".join(sequence.take_pieces()), len(sequence.generation.token_ids)
            if tokens > answer.delivered or sequence.is_finished:
                news.append((answer, News(text, tokens, sequence.is_finished), sequence.error))
                answer.delivered = tokens
            if sequence.is_finished:
                self._at_work.remove(answer)
        if news:
            self._loop.call_soon_threadsafe(_hand_out, news)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            waiting = {answer for _, answer in self._asked} | self._at_work
            self._asked.clear()
            self._at_work.clear()
        news: list[tuple[AsyncGeneration, News, Exception | None]]
        news = [(answer, News("", len(answer.generation.token_ids), True), error) for answer in waiting]
        with contextlib.suppress(RuntimeError):  # a loop that has ended waits for nothing
            self._loop.call_soon_threadsafe(_hand_out, news)


def _closed() -> UserError:
    return UserError("the model is closed: no further questions are taken.")


@dataclasses.dataclass(frozen=True)
class News:
    """What has come of an answer since the last time."""

    text: str
    tokens: int
    """Of the answer, up to here."""
    is_finished: bool


def _hand_out(news: list[tuple[AsyncGeneration, News, Exception | None]]) -> None:
    for answer, new, error in news:
        answer.take(new, error)


class AsyncGeneration:
    """An answer being written: iterate over it for its text; `generation` fills while that goes on."""

    def __init__(self, model: AsyncModel, sequence: TokenSequence, arrived: asyncio.Event) -> None:
        self._model, self.sequence = model, sequence
        self.delivered = 0
        """Tokens that the thread has handed over."""
        self._arrived = arrived
        self._text: list[str] = []
        self._tokens = self._told = 0
        self._error: Exception | None = None
        self._is_finished = False

    @property
    def generation(self) -> Generation:
        return self.sequence.generation

    async def __aiter__(self) -> AsyncIterator[str]:
        """The text, piece by piece; who stops before the end cancels it. Raises what went wrong with it."""
        try:
            while True:
                if (news := self.poll()) and news.text:
                    yield news.text
                if self._is_finished and not self._text:
                    break
                if news is None:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def poll(self) -> News | None:
        """What has come since this was called last; None: nothing. Raises what went wrong, behind the rest."""
        if not self._text and self._tokens == self._told:
            if self._error is not None:
                raise self._error
            return None
        text, self._text, self._told = "".join(self._text), [], self._tokens
        if text:
            self.generation.add(text)
        return News(text, self._tokens, self._is_finished and self._error is None)

    def cancel(self) -> None:
        """End it; its place is free at the next step."""
        if not self._is_finished:
            self._is_finished = True
            self._arrived.set()
            with contextlib.suppress(UserError):  # a model that is closed has ended it
                self._model.ask("cancel", self)

    def take(self, news: News, error: Exception | None) -> None:
        """What has come, in the event loop's thread."""
        if self._is_finished:
            return
        if news.text:
            self._text.append(news.text)
        self._tokens, self._is_finished, self._error = news.tokens, news.is_finished, error
        self._arrived.set()
