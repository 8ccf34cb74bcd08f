"""Who is let in: places for answers and memory for what requests hold, both bounded."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType

from pascalvl.runtime.server.errors import APIError, shutting_down

_MOST_RETRY_SECONDS = 30
_SECONDS_TO_BE_TOLD = 5
"""That answers which were ended are waited for."""
_WEIGHT = 0.2
"""Of the latest answer in the mean of what answers take."""


class Admission:
    """Places and bytes that requests take and give back.

    Args:
        places: answers at work and waiting, at most.
        at_once: of which so many are at work.
        nbytes: of bodies and decoded pictures, at most.
    """

    def __init__(self, places: int, at_once: int, nbytes: int) -> None:
        self.places, self._at_once, self.nbytes = places, at_once, nbytes
        self.taken = self.taken_bytes = 0
        self.is_closed = False
        """Whether nobody is let in any more."""
        self._lock = threading.Lock()  # bytes are taken where pictures are decoded
        self._mean_seconds = 1.0

    def take(self, places: int, nbytes: int) -> None:
        """Raises `APIError`: 413 for more than there is in all, 429 for what is not free."""
        if places > self.places:
            raise APIError(400, f"the request asks for {places} answers: expected at most {self.places}.", "n")
        if nbytes > self.nbytes:
            raise APIError(413, f"the request takes {nbytes} bytes of memory: expected at most {self.nbytes}.")
        with self._lock:
            is_free = self.taken + places <= self.places and self.taken_bytes + nbytes <= self.nbytes
            if is_free:
                self.taken += places
                self.taken_bytes += nbytes
        if not is_free:
            raise APIError(
                429,
                "the server has as many requests as it takes: ask again later.",
                None,
                "queue_full",
                self.retry_after,
            )

    def give_back(self, places: int, nbytes: int, seconds: float) -> None:
        """What a request took, which lasted so long."""
        with self._lock:
            self.taken -= places
            self.taken_bytes -= nbytes
            self._mean_seconds += _WEIGHT * (seconds - self._mean_seconds)

    @property
    def retry_after(self) -> int:
        """Seconds in which about half of those that are here have ended."""
        return min(_MOST_RETRY_SECONDS, 1 + int(self._mean_seconds * self.taken / self._at_once / 2))

    async def drain(self, seconds: float, end: Callable[[], None]) -> None:
        """Let nobody in any more, and wait until nobody is here; call ``end`` for those that are after so long."""
        self.is_closed = True
        try:
            await asyncio.wait_for(self._emptied(), seconds)
        except asyncio.TimeoutError:
            end()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._emptied(), _SECONDS_TO_BE_TOLD)

    async def _emptied(self) -> None:
        while self.taken:
            await asyncio.sleep(0.05)


class Ticket:
    """What one request has of an `Admission`: a context manager that gives it all back."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._places = self._nbytes = 0
        self._start = time.perf_counter()

    def __enter__(self) -> Ticket:
        if self._admission.is_closed:
            raise shutting_down()
        self.take(places=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._admission.give_back(self._places, self._nbytes, self.seconds)

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._start

    def take(self, places: int = 0, nbytes: int = 0) -> None:
        """Take more; for errors see `Admission.take`."""
        if self._places + places > self._admission.places:
            places += self._places  # for the error, which counts all
        self._admission.take(places, nbytes)
        self._places += places
        self._nbytes += nbytes
