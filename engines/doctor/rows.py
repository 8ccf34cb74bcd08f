"""What the doctor tells, and how it writes it."""

from __future__ import annotations

import dataclasses
import enum
import re


class State(enum.Enum):
    """The value is what is shown."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"
    """What the row's section is about, such as a backend, cannot run."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: what was looked for, what was found, and, unless that is `State.OK`, one sentence on what to do."""

    name: str
    found: str
    state: State = State.OK
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """Checks of what belongs together: the machine, a backend, a bundle."""

    name: str
    rows: tuple[Row, ...]
    about: str = ""
    """What holds for all of them."""

    @property
    def missing(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.state is State.MISSING)


def numbers(version: str) -> tuple[int, ...]:
    """``8.6.1.post1``: (8, 6, 1); (0,) if it begins with no number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def one_line(text: str) -> str:
    return " ".join(text.split())


def sentence(text: str) -> str:
    """With a capital letter, unless it begins with the name of a file or package."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text
