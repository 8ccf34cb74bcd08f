"""Pages of the KV cache in a folder, which later processes find again: system prompts, pictures, conversations."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pascalvl.engines import Session
from pascalvl.plugins.bundle import open_regular
from pascalvl.plugins.errors import UserError, reason
from pascalvl.plugins.kv_format import PAGE_SLOTS

log = logging.getLogger(__name__)

Rows = Mapping[str, np.ndarray]
"""Of one page, as `Session.read` gives it."""

_KIND = "PascalVL KV cache 3"
_NAME = re.compile("[0-9a-f]{16}-[0-9a-f]{32}[.]kv")
"""Of the engine, and of the page and those before it."""
_IDENTITIES = "identities"
_MOST_HEADER_BYTES = 1 << 20
_PARTIAL = ".kv_cache."
"""What the names of files that are being written begin with."""
_SECONDS_OF_PARTIAL_FILES = 3600
"""After which nobody writes to them any more."""


@dataclasses.dataclass(frozen=True, eq=False)
class StoredPage:
    """A page that is in the folder."""

    key: bytes
    parent: bytes
    """Key of the page before it; of the first, `PageFiles.root`."""
    identities: np.ndarray
    """int64 ``[n]``, of its tokens, see `pascalvl.runtime.sequence.token_identities`."""


class PageFiles:
    """Pages of one engine in a folder, a file each, which is named by what the page and those before it hold.

    A file is a line of JSON (`_header`), the bytes of the arrays that it lists, and the SHA-256 of all that. Several
    processes, and other engines, may have theirs in the same folder. What is damaged is removed, and computed again.

    Args:
        folder: it is made where it is missing.
        engine: digest, 64 hexadecimal digits, of what computed the pages.
        session: of that engine.
        most_bytes: of all files in the folder; those that were not used the longest go first.

    Raises:
        UserError: nothing can be written there.
    """

    def __init__(self, folder: Path, engine: str, session: Session, most_bytes: int) -> None:
        self._folder, self._engine, self._most_bytes = folder, engine, most_bytes
        self.root = bytes.fromhex(engine)
        self._layout = {b.name: (b.dtype, (1, *session.shape_of(b)[1:])) for b in session.stored}
        check_folder(folder)
        self._bytes = 0
        self.trim()

    @property
    def page_bytes(self) -> int:
        """Of a page's rows."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._layout.values())

    @property
    def most_bytes(self) -> int:
        return self._most_bytes

    def pages(self) -> list[StoredPage]:
        """What is there, each page behind the one before it; nothing is read of them but of what tokens they are.

        What is damaged is removed; what follows a page that is not there, as another process may be about to write,
        is left out.
        """
        found, names = [], [path for path in self._files() if path.name.startswith(self._engine[:16])]
        for path in names:
            with self._removing_damaged(path), open_regular(path) as file:
                found.append(self._begin(file, path)[1])
        children: dict[bytes, list[StoredPage]] = {}
        for page in found:
            children.setdefault(page.parent, []).append(page)
        reached = children.pop(self.root, [])
        for page in reached:
            reached += children.pop(page.key, [])
        return reached

    def has(self, key: bytes) -> bool:
        """Whether a page is there."""
        return self._path(key).exists()

    def read(self, key: bytes) -> Rows | None:
        """A page; None: it is not there any more, or was damaged and is removed."""
        path = self._path(key)
        with self._removing_damaged(path):
            with open_regular(path) as file:
                rows = self._read(file, path)
            os.utime(path)
            return rows
        return None

    def write(self, key: bytes, parent: bytes, identities: np.ndarray, rows: Rows) -> None:
        """Put a page there, in one go; raises `UserError` if that cannot be."""
        arrays = identities, *rows.values()
        parts = itertools.chain([self._header(parent, len(identities))], (array.tobytes() for array in arrays))
        with (
            _saving(self._folder),
            tempfile.NamedTemporaryFile(prefix=_PARTIAL, dir=self._folder, delete=False) as file,
        ):
            try:
                digest = hashlib.sha256()
                for part in parts:
                    file.write(part)
                    digest.update(part)
                file.write(digest.digest())
                self._bytes += file.tell()
                file.close()
                Path(file.name).replace(self._path(key))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
        if self._bytes > self._most_bytes:
            self.trim()

    def touch(self, keys: list[bytes]) -> None:
        """Note a use of pages, of the last one last."""
        now = time.time_ns() - len(keys)
        for number, key in enumerate(keys):
            with contextlib.suppress(OSError):
                os.utime(self._path(key), ns=(now + number, now + number))

    def remove(self, key: bytes) -> None:
        """Have a page there no more."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def trim(self) -> None:
        """Remove those that were not used the longest until the rest is small enough."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):  # another process has removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        self._bytes = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self._bytes <= self._most_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            self._bytes -= size

    def _files(self) -> list[Path]:
        """Of all engines; what a process that was killed has left of others goes."""
        found = []
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                if _NAME.fullmatch(path.name):
                    found.append(path)
                elif path.name.startswith(_PARTIAL):
                    with contextlib.suppress(OSError):
                        if time.time() - path.stat().st_mtime > _SECONDS_OF_PARTIAL_FILES:
                            path.unlink()
        return found

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{self._engine[:16]}-{key.hex()}.kv"

    @contextlib.contextmanager
    def _removing_damaged(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s is damaged (%s): it is removed, and computed again", path, reason(error))
            with contextlib.suppress(OSError):
                path.unlink()

    def _header(self, parent: bytes, tokens: int) -> bytes:
        layout = {_IDENTITIES: (np.dtype(np.int64), (tokens,)), **self._layout}
        arrays = [[name, dtype.str, shape] for name, (dtype, shape) in layout.items()]
        header = {"kind": _KIND, "engine": self._engine, "parent": parent.hex(), "tokens": tokens, "arrays": arrays}
        return json.dumps(header).encode() + b"\n"

    def _begin(self, file: BinaryIO, path: Path) -> tuple[bytes, StoredPage]:
        """What a file begins with, and what it says: all that can be checked without the rows is checked here.

        Types, shapes and sizes are those that the session has, never the file's: the header need only say the same.

        Raises:
            ValueError: what is wrong with the file.
        """
        line = file.readline(_MOST_HEADER_BYTES)
        try:
            header = json.loads(line)
            parent, tokens = bytes.fromhex(header["parent"]), header["tokens"]
        except (ValueError, RecursionError, TypeError, KeyError):
            raise ValueError("it does not begin as one") from None
        if type(tokens) is not int or not 0 < tokens <= PAGE_SLOTS or line != self._header(parent, tokens):
            raise ValueError("its arrays have other names, types or shapes than the engine's cache")
        expected = len(line) + 8 * tokens + self.page_bytes + hashlib.sha256().digest_size
        if (found := os.fstat(file.fileno()).st_size) != expected:
            raise ValueError(f"it has {found} bytes instead of {expected}")
        content = file.read(8 * tokens)
        page = StoredPage(key_of(parent, content), parent, np.frombuffer(content, np.int64))
        if self._path(page.key) != path:
            raise ValueError("its name is not that of its tokens")
        return line + content, page

    def _read(self, file: BinaryIO, path: Path) -> Rows:
        """As `_begin`, but all of it."""
        begin, _ = self._begin(file, path)
        digest, rows = hashlib.sha256(begin), {}
        for name, (dtype, shape) in self._layout.items():
            content = bytearray(file.read(dtype.itemsize * math.prod(shape)))
            digest.update(content)
            rows[name] = np.frombuffer(content, dtype).reshape(shape)
        if file.read() != digest.digest():
            raise ValueError("its checksum is not that of its content")
        return rows


def key_of(parent: bytes, identities: bytes) -> bytes:
    """16 bytes that name a page behind another: a hash of what both hold."""
    return hashlib.sha256(parent + identities).digest()[:16]


def check_folder(folder: Path) -> None:
    """Make a folder for pages where there is none; raises `UserError` if nothing can be written there."""
    with _saving(folder):
        if folder.exists() and not folder.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=_PARTIAL, dir=folder):
            pass


@contextlib.contextmanager
def _saving(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise UserError(f"the KV cache cannot be kept in {folder} ({reason(error)}): choose another folder.") from error
