"""Bundles: directories of artefacts with a manifest that says what they are and what bytes they must be.

A *model bundle* (written by export) holds the two ONNX graphs, the checkpoint's config, two tables of embeddings and
the tokenizer's files. An *engine bundle* (written by a build) holds what one backend runs, and the same tables.
`manifest.json` carries:

=================== ====================================================================================================
kind                ``model`` or ``engine``
version             layout version of the bundle, `BUNDLE_VERSION`
source              checkpoint name and hash
model               `ModelConfig`
embeddings          element type and shape of `EMBEDDINGS`, as in the checkpoint
position_embeddings the same of `POSITIONS`
graphs              per graph: opset, IR version, plugin op version, how many nodes of each operator it has, and how
                    many each of its layers
kv_cache            `CacheConfig` that the graphs are for (of a model bundle's, a build can change all but the rank)
weights             `WeightConfig` of the graphs
backend             engine bundles: backend name, its version, and what else its engines depend on
files               per file: size in bytes, and SHA-256 of each `PIECE_BYTES` of it
sha256              of all of the above, see `manifest_digest`
=================== ====================================================================================================
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError, reason, shown
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

BUNDLE_VERSION = 8
MANIFEST = "manifest.json"
EMBEDDINGS = "embeddings.bin"
POSITIONS = "position_embeddings.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
HOST_FILES = (EMBEDDINGS, POSITIONS, TOKENIZER, CHAT_TEMPLATE, GENERATION_CONFIG, IMAGE_PROCESSOR, VIDEO_PROCESSOR)
"""Files the runtime reads itself; a build passes them on unchanged."""
ONNX_FILES = tuple(f"{graph}.onnx{part}" for graph in (bindings.VISION, bindings.DECODER) for part in ("", ".data"))
"""The graphs of a model bundle, and their weights, whose ``doc_string`` is the name that the model has for them."""
CHECKPOINT_CONFIG = "config.json"
"""Hugging Face's config of a model bundle's checkpoint."""
MODEL_FILES = (*HOST_FILES, CHECKPOINT_CONFIG, *ONNX_FILES)

_WRITTEN_BY = {"model": "pascalvl export", "engine": "pascalvl build"}
_EMBEDDING_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_OUT_OF_ROOM = {
    errno.ENOSPC: "the disk is full, free some space",
    errno.EDQUOT: "your quota is used up, free some space",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}
PIECE_BYTES = 1 << 24
"""Of a file, which are hashed by themselves: at the same time, and on their way to where they are needed."""
_PARTIAL, _OLD, _LOCK = ".partial", ".old", ".lock"
"""Ends of names beside a bundle that is being written: the new one, an earlier one, what tells that they are in use."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
"""Linux's, for `renameat2`."""
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_MOST_JSON_BYTES = 1 << 25
"""32 MiB: the largest JSON of a checkpoint is its tokenizer, of 12 MB for Qwen3-VL."""
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`; the module's docstring says what each field means."""

    kind: str
    source: dict[str, str]
    model: ModelConfig
    embeddings: dict[str, Any]
    position_embeddings: dict[str, Any]
    graphs: dict[str, dict[str, Any]]
    kv_cache: CacheConfig
    weights: WeightConfig = FLOAT_WEIGHTS
    backend: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    version: int = BUNDLE_VERSION

    def to_json(self) -> dict[str, Any]:
        data = {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "model": self.model.to_json(),
            "kv_cache": str(self.kv_cache),
            "weights": str(self.weights),
        }
        return {**data, "sha256": manifest_digest(data)}

    @property
    def remedy(self) -> str:
        """What to do about a bundle that is damaged."""
        return _remedy(self.kind)

    @classmethod
    def read(cls, directory: Path, *kinds: str) -> Manifest:
        """Read the manifest in ``directory``; raises `UserError` unless it is a bundle of one of ``kinds``."""
        path = directory / MANIFEST
        expected = " or ".join(f"the {kind} bundle that {_WRITTEN_BY[kind]!r} wrote" for kind in kinds)
        remedy = _remedy(*kinds)
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected {expected}.")
        if not path.exists():
            raise UserError(f"{directory} is not a bundle (it has no {MANIFEST}): expected {expected}.")
        data = read_json(path, remedy)
        if (found := data.get("kind")) not in kinds:
            raise UserError(f"{directory} is a bundle of kind {shown(found)}: expected {expected}.")
        remedy = _remedy(found)
        version = data.get("version")
        if type(version) is not int or version != BUNDLE_VERSION:
            raise UserError(
                f"{directory} has bundle version {shown(version)}, this PascalVL reads version {BUNDLE_VERSION}: "
                f"{remedy}."
            )
        try:
            if (stated := data.pop("sha256", None)) != (digest := manifest_digest(data)):
                raise ValueError(f"it was altered: expected SHA-256 {shown(stated)}, found {digest!r}")
            if unknown := sorted(data.keys() - {field.name for field in dataclasses.fields(cls)}):
                raise ValueError(f"it has the field {shown(unknown[0])}")
            manifest = cls(
                **{
                    **data,
                    "model": ModelConfig.from_json(data["model"]),
                    "kv_cache": CacheConfig.parse(data["kv_cache"]),
                    "weights": WeightConfig.parse(data["weights"]),
                }
            )
            manifest._check_fields()
        except KeyError as error:
            raise UserError(f"{path} cannot be used (it lacks {shown(error.args[0])}): {remedy}.") from error
        except (UserError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} cannot be used ({str(error).rstrip('.')}): {remedy}.") from error
        manifest.require(HOST_FILES if manifest.kind == "engine" else MODEL_FILES)
        for name, table in manifest.tables.items():
            if manifest.files[name]["bytes"] != math.prod(table["shape"]) * _EMBEDDING_BYTES[table["dtype"]]:
                raise UserError(f"{path} cannot be used ({name} is of another size): {remedy}.")
        return manifest

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """What is said of the tables that the runtime maps, by the names of their files."""
        return {EMBEDDINGS: self.embeddings, POSITIONS: self.position_embeddings}

    def weight_bytes(self, *graphs: str) -> int:
        """Bytes of what is run of these graphs: their weights, but for some thousandths."""
        return sum(file["bytes"] for name, file in self.files.items() if name.startswith(graphs))

    def require(self, names: Iterable[str]) -> None:
        """Raise `UserError` unless the manifest lists the files ``names``."""
        if missing := [name for name in names if name not in self.files]:
            raise UserError(f"the {self.kind} bundle's {MANIFEST} does not list the file {missing[0]}: {self.remedy}.")

    def _check_fields(self) -> None:
        """Raise an error, `UserError` for formats of layers, for what is of another form than the runtime relies on."""
        text = self.model.text
        self.kv_cache.layers(text)
        self.weights.layers(text.num_hidden_layers)
        if not all(_is_short(self.source[key]) for key in ("name", "sha256")):
            raise TypeError("source is not a name and a hash")
        for name, shape in table_shapes(self.model).items():
            table, what = self.tables[name], Path(name).stem
            if set(table) != {"dtype", "shape"} or table["dtype"] not in tuple(_EMBEDDING_BYTES):
                raise TypeError(f"{what} are {shown(table)}")
            if table["shape"] != shape:
                raise ValueError(f"{what} of shape {shown(table['shape'])}")
        for name, graph in self.graphs.items():
            counts = graph["opset"], graph["ir_version"], *graph["ops"].values(), *graph["layer_ops"].values()
            if not all(_is_count(count) for count in counts) or not isinstance(graph["plugin"], str):
                raise TypeError(f"the graph {shown(name)} is {shown(graph)}")
        if not all(_is_short(value) for value in self.backend.values()):
            raise TypeError("backend is no object of short texts")
        if not all(_is_file(**file) for file in self.files.values()):
            raise TypeError("files without sizes or hashes")
        if outside := [name for name in self.files if not is_file_name(name)]:
            raise ValueError(f"it lists {shown(outside[0])}, which is no name of a file in the bundle")

    def verify(
        self, directory: Path, progress: Callable[[int], None] = lambda _: None, only_sizes: Iterable[str] = ()
    ) -> None:
        """Check every file's size and hashes; raises `UserError` naming the first that is missing or altered.

        Args:
            directory: where the files are.
            progress: called with numbers of bytes that were hashed, from several threads.
            only_sizes: files of which no hash is checked: `check_piece` is for who reads them.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.exists():
                raise UserError(f"{directory} lacks the file {name}: {self.remedy}.")
            if not path.is_file():
                raise UserError(f"{path} was altered: it is no regular file; {self.remedy}.")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise UserError(f"{path} was altered: expected {expected['bytes']} bytes, found {size}; {self.remedy}.")
        left_out = set(only_sizes)
        pieces = [
            (directory / name, number)
            for name, file in self.files.items()
            if name not in left_out
            for number in range(len(file["sha256"]))
        ]

        def check(place: tuple[Path, int]) -> None:
            content = _read_piece(*place)
            self.check_piece(*place, content)
            progress(len(content))

        with concurrent.futures.ThreadPoolExecutor() as pool:
            for _ in pool.map(check, pieces):
                pass

    def check_piece(self, path: Path, number: int, content: bytes | memoryview) -> None:
        """Check the hash of what was read of a file, piece by piece; raises `UserError` if it was altered."""
        expected, found = self.files[path.name]["sha256"][number], hashlib.sha256(content).hexdigest()
        if found != expected:
            raise UserError(
                f"{path} was altered: expected SHA-256 {expected[:12]}…, found {found[:12]}…"
                f"{f' from byte {number * PIECE_BYTES} on' if number else ''}; {self.remedy}."
            )

    def write(self, directory: Path) -> Manifest:
        """Write `manifest.json` beside the files in ``directory``, adding their sizes and hashes; returns it."""
        paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
        sizes = {path: path.stat().st_size for path in paths}
        pieces = [(path, number) for path, size in sizes.items() for number in range(_count_pieces(size))]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda place: hashlib.sha256(_read_piece(*place)).hexdigest(), pieces))
        found: dict[Path, list[str]] = {path: [] for path in paths}
        for (path, _), digest in zip(pieces, digests, strict=True):
            found[path].append(digest)
        files = {path.name: {"bytes": size, "sha256": found[path]} for path, size in sizes.items()}
        manifest = dataclasses.replace(self, files=files)
        (directory / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
        return manifest


def table_shapes(model: ModelConfig) -> dict[str, list[int]]:
    """Shapes of the tables that the runtime maps, by the names of their files: a row for each token, and one for each
    entry of the vision encoder's position grid.
    """
    text, vision = model.text, model.vision
    return {
        EMBEDDINGS: [text.vocab_size, text.hidden_size],
        POSITIONS: [vision.num_position_embeddings, vision.hidden_size],
    }


def manifest_digest(data: dict[str, Any]) -> str:
    """SHA-256 over what `manifest.json` says besides it: as JSON without blanks, its names sorted, in ASCII."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _remedy(*kinds: str) -> str:
    """What to do about a bundle, of one of ``kinds``, that is damaged."""
    return f"write the bundle again with {' or '.join(repr(_WRITTEN_BY[kind]) for kind in kinds)}"


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_NAME


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 63


def _is_file(bytes: object, sha256: object) -> bool:
    """Whether this says what a file is."""
    return (
        _is_count(bytes)
        and isinstance(sha256, list)
        and len(sha256) == _count_pieces(bytes)
        and all(isinstance(digest, str) for digest in sha256)
    )


def _count_pieces(nbytes: int) -> int:
    return max(1, -(-nbytes // PIECE_BYTES))


def _read_piece(path: Path, number: int) -> bytes:
    with open_regular(path) as file:
        file.seek(number * PIECE_BYTES)
        return file.read(PIECE_BYTES)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; raises `UserError`, which ends with what to do, for what is none, or is too large."""
    try:
        with open_regular(path) as file:
            content = file.read(_MOST_JSON_BYTES + 1)
        if len(content) > _MOST_JSON_BYTES:
            raise ValueError(f"it has more than {_MOST_JSON_BYTES >> 20} MiB")
        data = json.loads(content.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}): {remedy}.") from error
    if not isinstance(data, dict):
        raise UserError(f"expected a JSON object in {path}, found a {type(data).__name__}: {remedy}.")
    return data


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read.

    Raises:
        OSError: that cannot be done, or it is something else: a pipe would wait for its writer, a device may never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.open("rb")


def is_file_name(name: str) -> bool:
    """Whether text from a file names a file of the same folder: no path, and nothing that a file system may refuse."""
    return name == Path(name).name and name.isprintable() and name != ".." and 0 < len(name.encode()) <= _LONGEST_NAME


def sha256(path: Path) -> bytes:
    """SHA-256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.digest()


@contextlib.contextmanager
def atomic_directory(target: Path, kind: str) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` if the block ends well, and vanishes if it does not.

    An earlier bundle of the same ``kind`` at ``target`` is replaced, if it holds nothing but its own files; anything
    else there raises `UserError`, as do a mount point and a full disk. What processes that were killed left of this is
    cleared away first.
    """
    target = target.resolve()
    _clear_leftovers(target)
    _check_replaceable(target, kind)
    with _partial_folder(target) as partial:
        try:
            yield partial
            _check_replaceable(target, kind)  # building takes long enough for something to have been put there
            _replace(partial, target)
        except OSError as error:
            if error.errno in _OUT_OF_ROOM:
                written = sum(path.stat().st_size for path in partial.iterdir())
                raise UserError(
                    f"{target} needs more than the {written / 1e6:.0f} MB that could be written ({error.strerror}): "
                    f"{_OUT_OF_ROOM[error.errno]}, or choose another output directory."
                ) from error
            raise


def _check_replaceable(target: Path, kind: str) -> None:
    """Raise `UserError` if ``target`` cannot be moved, or holds anything but a bundle of ``kind``."""
    if target.is_mount():
        raise UserError(
            f"{target} is a mount point, which cannot be replaced: choose an output directory in it, {target / kind}."
        )
    try:
        names = sorted(path.name for path in target.iterdir()) if target.is_dir() else [target.name]
    except FileNotFoundError:  # another process replaces it just now
        return
    if not target.exists() or not names:
        return
    try:
        data = read_json(target / MANIFEST, "")
        found, own = data["kind"], {MANIFEST, *data.get("files", ())}
    except (UserError, LookupError, TypeError):
        found, own = None, set()
    if found != kind:
        raise UserError(f"{target} exists and is no {kind} bundle: choose another output directory, or remove it.")
    if others := [name for name in names if name not in own]:
        raise UserError(
            f"{target} holds {others[0]!r} beside its {kind} bundle, which would be lost: choose another output "
            "directory, or move that away."
        )


@contextlib.contextmanager
def _partial_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, which is removed at the end."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock, descriptor = _new_lock(target)
        partial = lock.with_suffix(_PARTIAL)
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent} ({error.strerror}): choose another output directory."
        ) from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(lock.with_suffix(_OLD), ignore_errors=True)
        if not lock.with_suffix(_OLD).exists():  # else the next process finds it by the lock
            lock.unlink(missing_ok=True)
        os.close(descriptor)


def _new_lock(target: Path) -> tuple[Path, int]:
    """A new file beside ``target``, locked until its file descriptor is closed, as the process's end does, too."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_LOCK, dir=target.parent)
        with contextlib.suppress(OSError):  # a file system without locks; nobody can then tell that it is left over
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.exists(name):
            return Path(name), descriptor
        os.close(descriptor)  # another process took it for left over before it was locked


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes left beside ``target``; a bundle that one had moved away from there comes back."""
    ours = re.compile(rf"{re.escape(f'.{target.name}.')}[a-z0-9_]{{8}}{re.escape(_LOCK)}")
    try:
        locks = [path for path in target.parent.iterdir() if ours.fullmatch(path.name)]
    except OSError:
        return
    for lock in locks:
        with contextlib.suppress(OSError):  # in use, of another user, or gone
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                old = lock.with_suffix(_OLD)
                if old.exists() and not target.exists():
                    old.rename(target)
                for folder in (old, lock.with_suffix(_PARTIAL)):
                    shutil.rmtree(folder, ignore_errors=True)
                lock.unlink()
            finally:
                os.close(descriptor)


def _replace(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``; what was there, if anything, is beside it then.

    In one step where that can be done. Where it takes two, `_clear_leftovers` undoes what is killed in between.
    """
    old = partial.with_suffix(_OLD)
    try:
        while not _rename_to_free(partial, target) and not _exchange(partial, target):
            shutil.rmtree(old, ignore_errors=True)  # there was another process in between
            with contextlib.suppress(FileNotFoundError):  # there is
                target.rename(old)
    except BaseException:
        with contextlib.suppress(OSError):
            old.rename(target)
        raise


def _rename_to_free(partial: Path, target: Path) -> bool:
    """Rename a folder; returns whether there was nothing, or an empty folder, in its way."""
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _exchange(partial: Path, target: Path) -> bool:
    """Let two folders change places in one step; returns whether the C library, kernel and file system can do that."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(partial), None, str(target))
