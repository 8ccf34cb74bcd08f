"""Manifests that say something else, and numbers that no field of one or of a config may have."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pascalvl.plugins import bundle

OUT_OF_RANGE = (0, -1, 2**31, 2**32, 2**63, 10**9, 10**30, 1.5, True, "3", None, [], float("nan"))
"""For a size; each is refused."""


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what a bundle's manifest says; it is then as if it had been written so."""
    path = directory / bundle.MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def integers(data: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where JSON has whole numbers, or lists of them."""
    for name, value in data.items():
        if isinstance(value, dict):
            yield from integers(value, (*path, name))
        elif type(value) is int or (isinstance(value, list) and value and type(value[0]) is int):
            yield *path, name


def put(data: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    """Set what `integers` found."""
    for name in path[:-1]:
        data = data[name]
    data[path[-1]] = value
