"""What several commands do alike."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.plugins.errors import UserError, reason
from pascalvl.plugins.terminal import progress_bars, shows_notices
from pascalvl.runtime.cli.argument_types import STANDARD_OUTPUT

if TYPE_CHECKING:
    from pascalvl.runtime.model import VisionLanguageModel

log = logging.getLogger(__name__)

FINDING = 1
_USER_ERROR = 2


def fail(sentence: str, code: int = _USER_ERROR) -> int:
    """Tell on stderr, in one line, what went wrong; returns the exit code."""
    log.debug("the error comes from here", exc_info=True)
    with contextlib.suppress(OSError):  # nobody can be told
        print(f"pascalvl: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def notice(line: str) -> None:
    """Tell on stderr what nobody has to act on, unless that is not wanted."""
    if shows_notices():
        print(line, file=sys.stderr, flush=True)


def report_bundle(output: Path, manifest: Any, *more: str) -> None:
    """Tell which bundle was written, and lines on how, unless that is not wanted."""
    megabytes = sum(file["bytes"] for file in manifest.files.values()) / 1e6
    if shows_notices():
        print(f"{output}: {manifest.kind} bundle of {manifest.source['name']}, {megabytes:.0f} MB", *more, sep="\n")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, then give it its own."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(path: Path, what: str) -> None:
    """Raise `UserError` unless ``what`` can be put into a file at ``path``; leaves nothing there."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        if path.exists() and not os.access(path, os.W_OK):  # the folder alone would let it be replaced
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        with tempfile.NamedTemporaryFile(prefix=f".{what.replace(' ', '_')}.", dir=path.parent):
            pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise UserError(f"{what} cannot be saved to {path} ({reason(error)}): choose another file.") from error


def check_json(file: Path | str | None) -> None:
    """Raise `UserError`, before any work, if `write_json` could not write there."""
    if file is not None and file != STANDARD_OUTPUT:
        check_writable(Path(file), "JSON")


def write_json(file: Path | str, figures: object) -> None:
    """Write figures whole to a file or `STANDARD_OUTPUT`; numbers that JSON does not have are null there."""
    text = json.dumps(_finite(figures), indent=1, allow_nan=False) + "\n"
    if file == STANDARD_OUTPUT:
        print(text, end="")
    else:
        write_whole(Path(file), lambda path: path.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    """The same, with None for NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def model_with_cache(args: argparse.Namespace, sequences: int = 1) -> Iterator[VisionLanguageModel]:
    """`open_model` with what is kept in the folder `--cache`, where all is kept in the end, also of an interrupt."""
    model = open_model(args, sequences=sequences, cache_folder=args.cache, cache_bytes=round(1e9 * args.cache_gb))
    try:
        yield model
    except Exception:
        raise
    except BaseException:
        _save_cache(args, model)
        raise
    _save_cache(args, model)


def check_cache(args: argparse.Namespace) -> None:
    """Raise `UserError`, before any work, if the folder `--cache` cannot be used."""
    from pascalvl.runtime.page_files import check_folder

    if args.cache:
        check_folder(args.cache)


def _save_cache(args: argparse.Namespace, model: VisionLanguageModel) -> None:
    if not args.cache:
        return
    with progress_bars() as progress:
        task = progress.add_task("keeping the KV cache", total=None)
        model.save_cache(lambda done, of: progress.update(task, completed=done, total=of))


def open_model(
    args: argparse.Namespace, marked_layers: bool = False, sequences: int = 1, **cache: Any
) -> VisionLanguageModel:
    """Open the engine bundle, showing how far the check of its files is; ``cache`` is what `VisionLanguageModel.open`
    takes of the cache's folder."""
    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime.model import VisionLanguageModel

    total = sum(file["bytes"] for file in Manifest.read(args.bundle, "engine").files.values())
    with progress_bars() as progress:
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
            sequences=sequences,
            **cache,
        )
