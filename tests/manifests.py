"""Damage to bundles and checkpoints: altered manifests, numbers out of range, files that are none."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pascalvl.plugins import bundle

OUT_OF_RANGE = (0, -1, 2**31, 2**32, 2**63, 10**9, 10**30, 1.5, True, "3", None, [], float("nan"))
"""For a size; each is refused."""


FILE_NAMES = ("../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "\ud800", "\udc80", "a\nb", "n" * 256)
"""Each is no name of a file in a folder itself."""
SPECIAL = ("pipe", "device", "folder")


def make_special(path: Path, kind: str) -> None:
    """Put something that is no regular file in a file's place."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what a bundle's manifest says; it is then as if it had been written so."""
    path = directory / bundle.MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    del data["sha256"]
    data["sha256"] = bundle.manifest_digest(data)
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
