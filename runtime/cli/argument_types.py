"""What arguments are turned into; errors are for who typed them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pascalvl.plugins.errors import UserError, shown

AUTO = "auto"
STANDARD_OUTPUT = "-"
_LEAST_GIGABYTES = 0.1


def unicode_text(argument: str) -> str:
    """The argument, if it is UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise UserError(f"expected text in UTF-8, found {shown(argument.encode(errors='surrogateescape'))}.") from None
    return argument


def own_path(argument: str) -> Path:
    """A folder of ours: its path, unlike a picture's, goes through libraries that take UTF-8 alone."""
    unicode_text(os.path.abspath(argument))
    return Path(argument)


def json_file(argument: str) -> Path | str:
    """A path to write JSON to, or `STANDARD_OUTPUT`."""
    return argument if argument == STANDARD_OUTPUT else own_path(argument)


def names(argument: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in argument.split(",") if name.strip())


def counts(argument: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, each once."""
    parts = [part.strip() for part in argument.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UserError(f"expected whole numbers with commas between them, such as 0,4096, found {shown(argument)}.")
    return tuple(dict.fromkeys(map(int, parts)))


def duration(argument: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", argument, re.ASCII)
    if not found:
        raise UserError(f"expected a time such as 90s, 10m or 2h, found {shown(argument)}.")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def gigabytes(argument: str) -> float:
    """Of a folder, at least what a page of a large model's cache takes."""
    found = re.fullmatch(r"\d{1,6}(?:\.\d{1,3})?", argument, re.ASCII)
    if not found or float(argument) < _LEAST_GIGABYTES:
        raise UserError(f"expected gigabytes from {_LEAST_GIGABYTES}, such as 4, found {shown(argument)}.")
    return float(argument)


def cache_config(text: str) -> Any:
    """A `CacheConfig`."""
    from pascalvl.plugins.kv_format import CacheConfig

    return CacheConfig.parse(text)


def weight_config(text: str) -> Any:
    """A `WeightConfig`."""
    from pascalvl.plugins.weight_format import WeightConfig

    return WeightConfig.parse(text)


def weights_or_auto(text: str) -> Any:
    """A `WeightConfig`, or `AUTO`."""
    return text if text == AUTO else weight_config(text)
