"""Bundles: directories of artefacts with a manifest that says what they are and what bytes they must be.

A *model bundle* (written by export) holds the two ONNX graphs, the checkpoint's config, the embedding table and the
tokenizer's files. An *engine bundle* (written by a build) holds what one backend runs, and the same tables.
`manifest.json` carries:

========== ===========================================================================================================
kind       ``model`` or ``engine``
version    layout version of the bundle, `BUNDLE_VERSION`
source     checkpoint name and hash
model      `ModelConfig`
embeddings element type and shape of `EMBEDDINGS`
graphs     per graph: opset, IR version, plugin op version, and how many nodes of each operator it has
kv_cache   `CacheConfig` that the graphs are for (of a model bundle's, a build can change all but the ranks)
weights    `WeightConfig` of the graphs
backend    engine bundles: backend name, its version, and what else its engines depend on
files      per file: size in bytes and SHA-256
========== ===========================================================================================================
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig

BUNDLE_VERSION = 4
MANIFEST = "manifest.json"
EMBEDDINGS = "embeddings.bin"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
IMAGE_PROCESSOR = "preprocessor_config.json"
VIDEO_PROCESSOR = "video_preprocessor_config.json"
HOST_FILES = (EMBEDDINGS, TOKENIZER, CHAT_TEMPLATE, GENERATION_CONFIG, IMAGE_PROCESSOR, VIDEO_PROCESSOR)
"""Files the runtime reads itself; a build passes them on unchanged."""
ONNX_FILES = tuple(f"{graph}.onnx{part}" for graph in (bindings.VISION, bindings.DECODER) for part in ("", ".data"))
"""The graphs of a model bundle, and their weights.

The ``doc_string`` of a weight is the name of its checkpoint tensor, with `TRANSPOSED` behind it where the graph has it
transposed; either way it may have been reshaped."""
TRANSPOSED = ".T"
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
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Contents of `manifest.json`; the module's docstring says what each field means."""

    kind: str
    source: dict[str, str]
    model: ModelConfig
    embeddings: dict[str, Any]
    graphs: dict[str, dict[str, Any]]
    kv_cache: CacheConfig
    weights: WeightConfig = FLOAT_WEIGHTS
    backend: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    version: int = BUNDLE_VERSION

    def to_json(self) -> dict[str, Any]:
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "model": self.model.to_json(),
            "kv_cache": str(self.kv_cache),
            "weights": str(self.weights),
        }

    @classmethod
    def read(cls, directory: Path, *kinds: str) -> Manifest:
        """Read the manifest in ``directory``; raises `UserError` unless it is a bundle of one of ``kinds``."""
        path = directory / MANIFEST
        expected = " or ".join(f"the {kind} bundle that {_WRITTEN_BY[kind]!r} wrote" for kind in kinds)
        rewrite = f"write it again with {_WRITTEN_BY[kinds[0]]!r}"
        if not directory.is_dir():
            raise UserError(f"no directory {directory}: expected {expected}.")
        if not path.exists():
            raise UserError(f"{directory} is not a bundle (it has no {MANIFEST}): expected {expected}.")
        data = read_json(path, rewrite)
        if (found := data.get("kind")) not in kinds:
            raise UserError(f"{directory} is a bundle of kind {found!r}: expected {expected}.")
        if data.get("version") != BUNDLE_VERSION:
            raise UserError(
                f"{directory} has bundle version {data.get('version')}, this PascalVL reads version {BUNDLE_VERSION}: "
                f"{rewrite}."
            )
        try:
            manifest = cls(
                **{
                    **data,
                    "model": ModelConfig.from_json(data["model"]),
                    "kv_cache": CacheConfig.parse(data["kv_cache"]),
                    "weights": WeightConfig.parse(data["weights"]),
                }
            )
            manifest._check_types()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not complete ({error}): {rewrite}.") from error
        manifest.require(HOST_FILES if manifest.kind == "engine" else MODEL_FILES)
        if manifest.files[EMBEDDINGS]["bytes"] != manifest._embedding_bytes:
            raise UserError(f"{path} is not complete ({EMBEDDINGS} is of another size): {rewrite}.")
        return manifest

    @property
    def _embedding_bytes(self) -> int:
        return math.prod(self.embeddings["shape"]) * _EMBEDDING_BYTES[self.embeddings["dtype"]]

    def weight_bytes(self, *graphs: str) -> int:
        """Bytes of what is run of these graphs: their weights, but for some thousandths."""
        return sum(file["bytes"] for name, file in self.files.items() if name.startswith(graphs))

    def require(self, names: Iterable[str]) -> None:
        """Raise `UserError` unless the manifest lists the files ``names``."""
        if missing := [name for name in names if name not in self.files]:
            raise UserError(
                f"the {self.kind} bundle's {MANIFEST} does not list the file {missing[0]}: write the bundle again with "
                f"{_WRITTEN_BY[self.kind]!r}."
            )

    def _check_types(self) -> None:
        """Raise `TypeError` or `KeyError` for a field of another form than the runtime relies on."""
        text = self.model.text
        if not all(isinstance(self.source[key], str) for key in ("name", "sha256")):
            raise TypeError("source is not a name and a hash")
        if set(self.embeddings) != {"dtype", "shape"} or self.embeddings["dtype"] not in tuple(_EMBEDDING_BYTES):
            raise TypeError(f"embeddings are {self.embeddings!r}")
        if self.embeddings["shape"] != [text.vocab_size, text.hidden_size]:
            raise TypeError(f"embeddings of shape {self.embeddings['shape']!r}")
        if not all(
            isinstance(graph["ops"], dict) and all(key in graph for key in ("opset", "ir_version", "plugin"))
            for graph in self.graphs.values()
        ):
            raise TypeError("graphs without their operators")
        if not all(isinstance(value, str) for value in self.backend.values()):
            raise TypeError("backend is no object of texts")
        if not all(type(file["bytes"]) is int and isinstance(file["sha256"], str) for file in self.files.values()):
            raise TypeError("files without sizes or hashes")
        if not all(name == Path(name).name for name in self.files):
            raise TypeError("files outside the bundle")

    def verify(self, directory: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        """Check every file's size and hash; raises `UserError` naming the first that is missing or altered.

        ``progress`` is called with the number of bytes hashed since the last call (from several threads).
        """
        remedy = f"write the bundle again with {_WRITTEN_BY[self.kind]!r}"
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise UserError(f"{directory} lacks the file {name}: {remedy}.")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise UserError(f"{path} was altered: expected {expected['bytes']} bytes, found {size}; {remedy}.")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = pool.map(lambda name: sha256(directory / name, progress), self.files)
            for (name, expected), digest in zip(self.files.items(), digests, strict=True):
                if digest != expected["sha256"]:
                    raise UserError(
                        f"{directory / name} was altered: expected SHA-256 {expected['sha256'][:12]}…, "
                        f"found {digest[:12]}…; {remedy}."
                    )

    def write(self, directory: Path) -> Manifest:
        """Write `manifest.json` beside the files in ``directory``, adding their sizes and hashes; returns it."""
        paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256, paths))
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
        manifest = dataclasses.replace(self, files=files)
        (directory / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1) + "\n", encoding="utf-8")
        return manifest


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object; raises `UserError`, which ends with what to do, for what is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {remedy}.") from error
    if not isinstance(data, dict):
        raise UserError(f"expected a JSON object in {path}, found a {type(data).__name__}: {remedy}.")
    return data


def sha256(path: Path, progress: Callable[[int], None] = lambda _: None) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_directory(target: Path, kind: str) -> Iterator[Path]:
    """Yield an empty directory that becomes ``target`` if the block ends well, and vanishes if it does not.

    An earlier bundle of the same ``kind`` at ``target`` is replaced, if it holds nothing but its own files; anything
    else there raises `UserError`, as do a mount point and a full disk.
    """
    target = target.resolve()
    _check_replaceable(target, kind)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write to {target.parent} ({error.strerror}): choose another output directory."
        ) from error
    try:
        partial.chmod(0o755)
        yield partial
        _check_replaceable(target, kind)  # building takes long enough for something to have been put there
        if target.exists():
            _swap(partial, target)
        else:
            partial.rename(target)
    except OSError as error:
        if error.errno in _OUT_OF_ROOM:
            written = sum(path.stat().st_size for path in partial.iterdir())
            raise UserError(
                f"{target} needs more than the {written / 1e6:.0f} MB that could be written ({error.strerror}): "
                f"{_OUT_OF_ROOM[error.errno]}, or choose another output directory."
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(target: Path, kind: str) -> None:
    """Raise `UserError` if ``target`` cannot be moved, or holds anything but a bundle of ``kind``."""
    if target.is_mount():
        raise UserError(
            f"{target} is a mount point, which cannot be replaced: choose an output directory in it, {target / kind}."
        )
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    try:
        data = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        found, own = data["kind"], {MANIFEST, *data.get("files", ())}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        found, own = None, set()
    if found != kind:
        raise UserError(f"{target} exists and is no {kind} bundle: choose another output directory, or remove it.")
    if others := sorted(path.name for path in target.iterdir() if path.name not in own):
        raise UserError(
            f"{target} holds {others[0]!r} beside its {kind} bundle, which would be lost: choose another output "
            "directory, or move that away."
        )


def _swap(partial: Path, target: Path) -> None:
    """Put ``partial`` in the place of ``target``, which comes back if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    try:
        target.rename(old / target.name)
        try:
            partial.rename(target)
        except BaseException:
            (old / target.name).rename(target)
            raise
    finally:
        shutil.rmtree(old)
