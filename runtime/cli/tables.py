"""Tables, facts and sentences on standard output: as wide as they are, but on a terminal no wider than that."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pascalvl.plugins.terminal import is_plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNLIMITED = 10_000
"""Columns of what is no terminal."""
_LEAST_TEXT = 40
"""Columns of text beside a name; with fewer it begins on the name's line and goes on below it."""
Facts = Sequence[tuple[str, str]]
"""Names and what there is to say of them."""


def new_console() -> Console:
    """Standard output; a reader that goes away is left to `main`, where rich would exit with code 1."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise

    width, height = shutil.get_terminal_size() if sys.stdout.isatty() else (_UNLIMITED, 24)
    return Output(
        width=width,
        height=height,
        color_system=None if is_plain() else "auto",
        highlight=False,
        markup=False,
        emoji=False,
    )


def figures_table(title: str, headings: Sequence[str]) -> Table:
    """A table whose first column is names."""
    from rich.table import Table

    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def print_tables(*parts: Table | Facts | str) -> None:
    """Print parts of a result, none of whose figures is cut off or wrapped.

    A table that a terminal has no room for, with its headings on several lines, comes row by row, with a line for each
    figure.
    """
    from rich.table import Table

    console = new_console()
    for part in parts:
        if isinstance(part, str):
            lines = _wrapped(part, console.width)
        elif not isinstance(part, Table):
            lines = "\n".join(_fact_lines(part, console.width))
        elif _fits(part, console):
            console.print(part)
            continue
        else:
            lines = "\n".join(_wrapped(line, console.width) for line in _row_lines(part))
        console.print(lines, soft_wrap=True)


def _fits(table: Table, console: Console) -> bool:
    """Whether there is room for a table; narrows its columns if they have to be."""
    from rich.cells import cell_len
    from rich.measure import Measurement

    options = console.options.update(width=_UNLIMITED)
    if Measurement.get(console, options, table).maximum <= console.width:
        return True
    for column in table.columns:
        column.width = max(map(cell_len, (*str(column.header).split(), *map(str, column.cells))))
    return Measurement.get(console, options, table).maximum <= console.width


def _row_lines(table: Table) -> Iterator[str]:
    """A table as lines: its title, and of each row the first cell, and the others with their headings."""
    first, *headings = (str(column.header) for column in table.columns)
    if table.title:
        yield str(table.title)
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        yield f"{first}: {name}" if first else str(name)
        for heading, cell in zip(headings, cells, strict=True):
            if cell:
                yield f"  {heading}: {cell}" if heading else f"  {cell}"


def _fact_lines(facts: Facts, width: int) -> Iterator[str]:
    indent = max(len(name) for name, _ in facts) + 2
    for name, text in facts:
        if width - indent < _LEAST_TEXT:
            yield _wrapped(f"{name}: {text}" if name else f"  {text}", width)
        else:
            yield _wrapped(name.ljust(indent) + text, width, " " * indent)


def _wrapped(line: str, width: int, indent: str | None = None) -> str:
    """Text of some lines, cut between words alone; ``indent`` is that of all but the first."""
    if indent is None:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
