"""The user's cache folder: compiled libraries, the times of TensorRT's kernels, what interrupted runs have done."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pascalvl.plugins.errors import UserError

log = logging.getLogger(__name__)

_OTHERS_WRITE = 0o022
_ROOT = 0


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/pascalvl``, or ``~/.cache/pascalvl``: a relative path there is ignored, as the XDG Base
    Directory Specification asks for. Raises `UserError` where there is no home either."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pascalvl"
    except RuntimeError:
        raise UserError(
            "this user has no home folder: set XDG_CACHE_HOME to a folder for compiled libraries."
        ) from None


def open_cache_folder(name: str = "") -> Path:
    """The cache folder, or the folder ``name`` in it, made for this user alone where it is missing.

    Raises:
        UserError: it is there, and others may have put something into it, see `require_private`.
        OSError: it cannot be made.
    """
    top = cache_folder()
    folder = top / name
    for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)  # another process may be doing the same
    for path in (top, folder):
        require_private(path)
    return folder


def require_private(path: Path) -> None:
    """Raise `UserError` where another user than root and this one owns, or can write, what code is loaded from."""
    status = path.stat()
    if status.st_uid not in (_ROOT, os.geteuid()):
        found, remedy = f"belongs to another user (number {status.st_uid})", "remove it"
    elif status.st_mode & _OTHERS_WRITE:
        found = f"can be written by other users (mode {status.st_mode & 0o777:o})"
        remedy = "remove it, run chmod go-w on it if you trust what is there"
    else:
        return
    raise UserError(
        f"{path} {found}, and code is loaded from there: {remedy}, or set XDG_CACHE_HOME to a folder of your own."
    )


@contextlib.contextmanager
def locked(path: Path, tell: Callable[[str], None] = log.info) -> Iterator[None]:
    """Hold the lock of a file, which is made where it is missing and stays. A process that ends, however, lets go.

    ``tell`` is called where another process has it, before this one waits.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)  # children do not inherit it
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process, which holds {path}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
