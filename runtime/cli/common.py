"""What several commands do alike."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from pascalvl.runtime.model import VisionLanguageModel

log = logging.getLogger(__name__)

FINDING = 1
_USER_ERROR = 2
TABLE_WIDTH = 110
"""Of figures that are of no use where they are cut off."""


def fail(sentence: str, code: int = _USER_ERROR) -> int:
    """Tell on stderr, in one line, what went wrong; returns the exit code."""
    log.debug("the error comes from here", exc_info=True)
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"pascalvl: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def notice(line: str) -> None:
    """Tell on stderr what nobody has to act on."""
    print(line, file=sys.stderr)


def report_bundle(output: Path, manifest: Any) -> None:
    """Tell which bundle was written."""
    megabytes = sum(file["bytes"] for file in manifest.files.values()) / 1e6
    print(f"{output}: {manifest.kind} bundle of {manifest.source['name']}, {megabytes:.0f} MB")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then give it its own."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def new_console() -> Console:
    """Standard output for tables; a reader that goes away is left to `main`, where rich would exit with code 1."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise

    return Output(highlight=False, markup=False, emoji=False)


def open_model(args: argparse.Namespace, marked_layers: bool = False) -> VisionLanguageModel:
    """Open the engine bundle, showing how far the check of its files is."""
    from rich.console import Console
    from rich.progress import Progress

    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime.model import VisionLanguageModel

    total = sum(file["bytes"] for file in Manifest.read(args.bundle, "engine").files.values())
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking the bundle", total=total)
        return VisionLanguageModel.open(
            args.bundle,
            args.backend,
            args.context,
            max_pixels=args.max_pixels,
            marked_layers=marked_layers,
            progress=lambda count: progress.advance(task, count),
            cache=args.kv,
            control_tokens_in_text=args.control_tokens_in_text,
        )
