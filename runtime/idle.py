"""A model that is unloaded while nobody asks it anything."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.model import VisionLanguageModel

log = logging.getLogger(__name__)


class Idle:
    """Unloads a model some time after it was last used; a context manager, at whose end it does so no more.

    Args:
        model: which. It is used inside `busy` alone.
        seconds: after which it is unloaded; None: never.
    """

    def __init__(self, model: VisionLanguageModel, seconds: float | None) -> None:
        self._model, self._seconds = model, seconds
        self._in_use = threading.Lock()
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Idle:
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        with self._in_use:
            self._stop()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While the model is asked something."""
        with self._in_use:
            self._stop()
            try:
                yield
            finally:
                self._wait()

    def _stop(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _wait(self) -> None:
        if self._seconds is not None:
            self._timer = threading.Timer(self._seconds, self._unload)
            self._timer.daemon = True
            self._timer.start()

    def _unload(self) -> None:
        if self._in_use.acquire(blocking=False):  # else it has just been asked something
            try:
                self._model.unload()
            except (UserError, MemoryError) as error:
                log.warning("the model was not unloaded as it should be: %s", str(error) or "memory has run out")
            finally:
                self._in_use.release()
