"""A model that many coroutines ask: one thread runs the scheduler, coroutines only submit, read and cancel."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.generation import Generation
from pascalvl.runtime.model import Request, VisionLanguageModel
from pascalvl.runtime.sequence import TokenSequence

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)


class AsyncModel:
    """Answers requests of coroutines of one event loop, many at once; an asynchronous context manager.

    Args:
        model: which; nobody else uses it until the end.
    """

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
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
        """Cancel what is at work, and wait for the thread's last step."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def submit(self, request: Request) -> AsyncGeneration:
        """Begin an answer; the prompt is made in a thread of its own, beside the steps.

        Raises:
            UserError: as `VisionLanguageModel.generate` does.
        """
        sequence = await asyncio.to_thread(self._prepare, request)
        answer = AsyncGeneration(self, sequence)
        self.ask("submit", answer)
        return answer

    def _prepare(self, request: Request) -> TokenSequence:
        with self._preparing:
            return self._model.sequence(request)

    def ask(self, what: str, answer: AsyncGeneration) -> None:
        """Have an answer submitted or cancelled; raises `UserError` when the model is closed."""
        with self._wake:
            if self._is_closed:
                raise UserError("the model is closed: no further questions are taken.")
            self._asked.append((what, answer))
            self._wake.notify()

    # In the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        scheduler = self._model.scheduler
        try:
            while self._take():
                self._model.load()
                scheduler.step()
                for answer in list(self._at_work):
                    self._deliver(answer)
        except Exception as error:  # whatever it is: those who wait are told
            log.error("the engine stopped", exc_info=True)
            self._fail(error)
        finally:
            for answer in self._at_work:
                scheduler.cancel(answer.sequence)

    def _take(self) -> bool:
        """Do what was asked, and wait while there is nothing to do; returns False at the end."""
        with self._wake:
            while not self._asked and not self._at_work and not self._is_closed:
                self._wake.wait()
            asked = list(self._asked)
            self._asked.clear()
        for what, answer in asked:
            if what == "submit":
                self._at_work.add(answer)
                self._model.scheduler.submit(answer.sequence)
            elif answer in self._at_work:
                self._at_work.remove(answer)
                self._model.scheduler.cancel(answer.sequence)
        return not self._is_closed

    def _deliver(self, answer: AsyncGeneration) -> None:
        """Hand over what has come of an answer since."""
        sequence = answer.sequence
        pieces = sequence.take_pieces()
        is_finished = sequence.is_finished
        if pieces or is_finished:
            self._loop.call_soon_threadsafe(answer.take, pieces, is_finished, sequence.error)
        if is_finished:
            self._at_work.remove(answer)

    def _fail(self, error: Exception) -> None:
        with self._wake:
            self._is_closed = True
            waiting = {answer for _, answer in self._asked} | self._at_work
        for answer in waiting:
            self._loop.call_soon_threadsafe(answer.take, [], True, error)


class AsyncGeneration:
    """An answer being written: iterate over it for its text; `generation` fills while that goes on."""

    def __init__(self, model: AsyncModel, sequence: TokenSequence) -> None:
        self._model, self.sequence = model, sequence
        self._pieces: deque[str] = deque()
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._is_finished = False

    @property
    def generation(self) -> Generation:
        return self.sequence.generation

    async def __aiter__(self) -> AsyncIterator[str]:
        """The text, piece by piece; who stops before the end cancels it. Raises what went wrong with it."""
        try:
            while True:
                while self._pieces:
                    yield self.generation.add(self._pieces.popleft())
                if self._is_finished:
                    break
                self._news.clear()
                await self._news.wait()
        finally:
            self.cancel()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """End it; its place is free at the next step."""
        if not self._is_finished:
            self._is_finished = True
            self._news.set()
            with contextlib.suppress(UserError):  # a model that is closed has ended it
                self._model.ask("cancel", self)

    def take(self, pieces: list[str], is_finished: bool, error: Exception | None) -> None:
        """What has come, in the event loop's thread."""
        self._pieces += pieces
        self._is_finished = self._is_finished or is_finished
        self._error = error
        self._news.set()
