"""What may be shown of work that is under way, beside its result."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

_LOGGER = logging.getLogger("pascalvl")


def is_plain() -> bool:
    """Whether terminals get no escape codes: none are wanted (https://no-color.org), or none are known there."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") in ("dumb", "unknown")


def shows_notices() -> bool:
    """Whether what nobody has to act on is told: as long as warnings are logged, which --quiet ends."""
    return _LOGGER.isEnabledFor(logging.WARNING)


def shows_progress() -> bool:
    """Whether there are bars: stderr is a terminal that can draw them anew."""
    return sys.stderr.isatty() and not is_plain() and shows_notices()


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Bars on stderr, where there may be some, that go when they have come to their end."""
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not shows_progress())
