"""The one exception that is meant for the person at the terminal."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

_MOST_SENTENCE = 800
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """Something the user can put right: one sentence saying what was expected, what was found and what to do.

    The command line prints the sentence and exits with code 2; it never prints a traceback for it. Whatever a sentence
    quotes, it is one line of text that a terminal can show, cut short in its middle where it is too long to be read.
    """

    def __init__(self, sentence: str) -> None:
        line = _UNPRINTABLE.sub(lambda match: ascii(match.group())[1:-1], re.sub(r"\s", " ", sentence))
        if len(line) > _MOST_SENTENCE:
            line = f"{line[: _MOST_SENTENCE * 2 // 3]} … {line[-_MOST_SENTENCE // 3 :]}"
        super().__init__(line)


def reason(error: Exception) -> object:
    """What went wrong, without the number and the path that the system's errors name besides."""
    return getattr(error, "strerror", None) or error


@contextlib.contextmanager
def reading(path: Path, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, a bundle's file is read, which may be anything, if only its hash is right.

    Raises `UserError`, which ends with what to do, for Python's errors and for ``kinds``, those of libraries.
    """
    anticipated: tuple[type[Exception], ...] = (
        ValueError, TypeError, LookupError, AttributeError, ArithmeticError, StopIteration, *kinds
    )  # fmt: skip
    try:
        yield
    except anticipated as error:
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {library_reason(error)}): {remedy}."
        ) from error


@contextlib.contextmanager
def panics() -> Iterator[None]:
    """Inside, a panic of a library in Rust is a `RuntimeError`: as Python gets it, it is no `Exception`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(str(error)) from error


def library_reason(error: Exception) -> str:
    """What a library's error says, on one line and cut off: it may quote anything, and be no UTF-8."""
    text = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
    return shown(" ".join(text.split()), 300)


def shown(value: object, most: int = 100) -> str:
    """A value as an error shows it: as Python writes it, cut off after ``most`` characters; never raises."""
    if isinstance(value, str | bytes):
        value = value[: most + 1]  # the whole may be gigabytes
    try:
        text = repr(value)
    except (ValueError, RecursionError, MemoryError):  # a number of too many digits, lists too deep
        text = f"a value of type {type(value).__name__} that is too long to be shown"
    return text if len(text) <= most else f"{text[:most]}…"
