"""Runs a fuzzer's cases until its time is up: what is damaged is refused in one sentence, or used.

A case is a function of a `random.Random`. It fails by a traceback, by hanging, or by an assertion about what it got.
Every case is told by its seed: ``pytest tests/fuzz -k NAME --fuzz-seed SEED`` repeats it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from pascalvl.plugins.errors import UserError

Result = TypeVar("Result")

MOST_CASE_SECONDS = 30
"""After which a case hangs; on a busy machine the slowest, templates that are ended, take a tenth of that."""
MOST_SENTENCE = 1000


class Fuzzer:
    """One fuzzer's run; see the fixture ``fuzz``.

    Attributes:
        refused: cases in which something was refused.
        used: cases in which nothing was.
    """

    def __init__(self, seconds: float, seed: int | None) -> None:
        self._seconds = seconds
        self._seed = seed
        self._any_refused = False
        self.refused = self.used = 0

    def __call__(self, case: Callable[[random.Random], None]) -> None:
        """Run ``case`` on one seed after the other."""
        end = time.monotonic() + self._seconds
        seeds = range(1 << 62) if self._seed is None else [self._seed]
        for seed in seeds:
            if self.refused + self.used and time.monotonic() > end:
                break
            self._any_refused = False
            try:
                with _limited(MOST_CASE_SECONDS):
                    case(random.Random(seed))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # of the tokenizers library, too, whose panics are no Exception
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            if self._any_refused:
                self.refused += 1
            else:
                self.used += 1
        print(f"{self.refused} cases refused, {self.used} used")

    def attempt(self, action: Callable[[], Result]) -> Result | None:
        """The result of ``action``; None if it is refused, which is to be done in one sentence."""
        try:
            return action()
        except UserError as error:
            check_sentence(str(error))
            self._any_refused = True
            return None


def check_sentence(text: str) -> None:
    """Fail unless ``text`` is one line that can be printed, is not too long to read, and ends as a sentence does."""
    assert re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]+\.", text), f"no sentence: {text[:2000]!r}"
    assert len(text) <= MOST_SENTENCE, f"a sentence of {len(text)} characters: {text[:2000]!r}"
    text.encode()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(4 * seconds, exit=True)  # of what never comes back to Python
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzzer_of(config: pytest.Config) -> Fuzzer:
    """As the command line says."""
    return Fuzzer(config.getoption("--fuzz-seconds"), config.getoption("--fuzz-seed"))
