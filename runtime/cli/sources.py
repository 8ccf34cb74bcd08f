"""What a model is given as: a bundle, a checkpoint, or its name on the Hugging Face hub; and the engine bundle that is
made of it on first use, in the user's cache folder.

There, ``models/LABEL/`` holds the engine bundles of one source, named by backend, by the source's content and by all
else that they depend on; for each revision of a name that was asked for, the commit that it was; and, while it is
needed, the model bundle between export and build. Backends copy the weights, so that it would take as much again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.terminal import progress_bars
from pascalvl.runtime.cli.argument_types import AUTO, own_path
from pascalvl.runtime.cli.common import notice, write_whole

if TYPE_CHECKING:
    from pascalvl.export.hub import HubCheckpoint
    from pascalvl.export.weight_size import Room
    from pascalvl.plugins.kv_format import CacheConfig
    from pascalvl.plugins.weight_format import WeightConfig

log = logging.getLogger(__name__)

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_NAME = re.compile(
    rf"(?P<repo>(?!.*(?:--|\.\.|\.git(?:@|$))){_PART}/{_PART})(?:@(?P<revision>\w[\w./-]{{0,250}}))?", re.ASCII
)
_COMMIT = re.compile("[0-9a-f]{40}")
_EXPORT_PACKAGES = ("huggingface_hub", "onnx", "onnxscript", "safetensors", "torch", "transformers")
_BUILD_PACKAGES = ("onnx",)
_ON_CARDS = ("tensorrt", "cuda")
_LOCK, _RECORD, _MODEL = "lock", "commit-", "model-"
_SPARE_BYTES = 100_000_000
"""Of a disk, beside what is known to be written."""


@dataclasses.dataclass(frozen=True)
class HubName:
    """A model on the hub: ``ORG/NAME``, or ``ORG/NAME@REVISION``."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def path_or_name(argument: str) -> Path | HubName:
    """A path that exists, or whose folder does, is a path, as is what is no name."""
    path, found = own_path(argument), _NAME.fullmatch(argument)
    if found is None or os.path.lexists(path):
        return path
    if found["revision"] is None and path.parent.is_dir():
        return path  # mistyped, more likely than a name; nobody else is told of it
    return HubName(found["repo"], found["revision"])


# What is wanted -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What the engine bundle is to be.

    Attributes:
        target: the backend as ``name``, and what its engines depend on here.
        cache: without what each run chooses.
        weights: None: those of the checkpoint, or what there is room for.
        card: whose memory weights are to fit into, and its bytes, where they are to; "": this machine.
        reasons: why this backend, where it was not named.
    """

    target: Mapping[str, str]
    cache: CacheConfig
    weights: WeightConfig | None
    card: tuple[str, int] | None
    reasons: Sequence[str]

    def bundle_name(self, identity: str) -> str:
        """Of the engine bundle of a source with this content."""
        from pascalvl.plugins.bundle import BUNDLE_VERSION
        from pascalvl.plugins.ops.flash_attention import op as flash_attention
        from pascalvl.plugins.ops.quant_linear import op as quant_linear

        contract = [BUNDLE_VERSION, *((op.OP_VERSION, op.SERIALISED_LAYOUT) for op in (flash_attention, quant_linear))]
        options = [contract, dict(self.target), str(self.cache), self.weights and str(self.weights), self.card]
        return f"{self.target['name']}-{_digest(identity)}-{_digest(json.dumps(options, sort_keys=True))}"

    def room(self) -> Room | None:
        from pascalvl.export.weight_size import room_of_card, room_of_machine

        if self.card is None:
            return None
        name, nbytes = self.card
        return room_of_card(name, nbytes) if name else room_of_machine(nbytes)

    def bytes_of_bundles(self, checkpoint: Path) -> int:
        """Of the model bundle and the engine bundle together, about; raises what `_bundle_bytes` does."""
        return 2 * _bundle_bytes(checkpoint, self.weights, self.room(), self.cache)


def _wanted(args: argparse.Namespace, has_weights: bool) -> _Wanted:
    """What the options ask for, of a source that may have its weights in their format already."""
    from pascalvl.engines import target
    from pascalvl.engines.device.gpu import find_gpu
    from pascalvl.plugins.kv_format import CacheConfig

    reasons: list[str] = []
    found = target(args.backend, reasons.append)
    cache = dataclasses.replace(args.kv or CacheConfig(), window=None, pin_images=False)
    if has_weights or args.weights not in (None, AUTO):
        return _Wanted(found, cache, None if has_weights else args.weights, None, reasons)
    if found["name"] in _ON_CARDS:
        gpu = find_gpu()
        return _Wanted(found, cache, None, (gpu.name, gpu.total_memory), reasons)
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 10**9  # what kernels take of it differs
    return _Wanted(found, cache, None, ("", gigabytes * 10**9), reasons)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Engine bundles -------------------------------------------------------------------------------------------------------


def engine_bundle(args: argparse.Namespace) -> Path:
    """The engine bundle of what was given: itself, or what is made of it on first use, as stderr is told.

    Raises:
        UserError: nothing that a bundle can be made of, options for something else, packages that are not installed,
            too little room on a disk, or what an export or a build refuses.
    """
    from pascalvl.plugins.bundle import CHECKPOINT_CONFIG, MANIFEST, Manifest

    source = args.bundle
    if args.refresh and not isinstance(source, HubName):
        raise UserError(f"--refresh asks the hub for a newer commit, and {source} is a folder: leave it out.")
    if isinstance(source, HubName):
        return _bundle_of_name(source, _wanted(args, False), args.refresh)
    if not source.is_dir():
        raise UserError(
            f"no directory {source}: expected the engine bundle that 'pascalvl build' wrote, a model bundle, a "
            "checkpoint, or the name of a model on the Hugging Face hub, ORG/NAME."
        )
    if not (source / MANIFEST).exists() and (source / CHECKPOINT_CONFIG).exists():
        return _bundle_of_folder(source, _wanted(args, False))
    manifest = Manifest.read(source, "engine", "model")
    if args.weights is not None:
        raise UserError(
            f"{source} has its weights in a format already ({manifest.weights}), which --weights cannot change: leave "
            "it out, or give the checkpoint."
        )
    return source if manifest.kind == "engine" else _bundle_of_model(source, _wanted(args, True))


def _bundle_of_name(name: HubName, wanted: _Wanted, refresh: bool) -> Path:
    from pascalvl.plugins.user_cache import locked, open_cache_folder

    folder = open_cache_folder(f"models/{name.repo.replace('/', '--')}")
    record = folder / f"{_RECORD}{quote(name.revision or 'main', safe='')}"

    def known() -> str | None:
        """The commit that was taken for this name before; another one is taken only when that is asked for."""
        if name.revision and _COMMIT.fullmatch(name.revision):
            return name.revision
        return record.read_text(encoding="utf-8") if record.is_file() and not refresh else None

    def ready() -> Path | None:
        commit = known()
        return _whole(folder / wanted.bundle_name(commit)) if commit and record.is_file() else None

    if found := ready():
        return found
    _require_packages(str(name), _EXPORT_PACKAGES)
    with locked(folder / _LOCK, _tell):
        if found := ready():
            return found
        from pascalvl.export.hub import find_checkpoint

        checkpoint = find_checkpoint(name.repo, known() or name.revision, _tell)
        bundle = folder / wanted.bundle_name(checkpoint.commit)
        if _whole(bundle):
            _tell(f"{name} is the commit {checkpoint.commit[:12]} still, of which {bundle} was made")
        else:
            _fetch(checkpoint, folder, wanted.bytes_of_bundles(checkpoint.folder))
            _export_and_build(checkpoint.folder, name.repo, bundle, wanted)
        write_whole(record, lambda path: path.write_text(checkpoint.commit, encoding="utf-8"))
        commits = [path.read_text(encoding="utf-8") for path in folder.glob(f"{_RECORD}*")]
        _remove_others(folder, commits)
    return bundle


def _bundle_of_folder(checkpoint: Path, wanted: _Wanted) -> Path:
    from pascalvl.plugins.user_cache import locked

    folder, identity = _cache_of(checkpoint), _content_of(checkpoint)
    bundle = folder / wanted.bundle_name(identity)
    if _whole(bundle):
        return bundle
    _require_packages(str(checkpoint), _EXPORT_PACKAGES)
    with locked(folder / _LOCK, _tell):
        if not _whole(bundle):
            _check_disks({folder: wanted.bytes_of_bundles(checkpoint)})
            _export_and_build(checkpoint, None, bundle, wanted)
            _remove_others(folder, [identity])
    return bundle


def _bundle_of_model(model: Path, wanted: _Wanted) -> Path:
    from pascalvl.plugins.bundle import MANIFEST, sha256
    from pascalvl.plugins.user_cache import locked

    folder, identity = _cache_of(model), sha256(model / MANIFEST).hex()
    bundle = folder / wanted.bundle_name(identity)
    if _whole(bundle):
        return bundle
    _require_packages(str(model), _BUILD_PACKAGES)
    with locked(folder / _LOCK, _tell):
        if not _whole(bundle):
            _check_disks({folder: sum(path.stat().st_size for path in model.iterdir())})
            _build(model, str(model), bundle, wanted)
            _remove_others(folder, [identity])
    return bundle


def _whole(bundle: Path) -> Path | None:
    """The bundle, if it is there and has all its files; their hashes are checked when it is opened."""
    from pascalvl.plugins.bundle import Manifest

    if not bundle.is_dir():
        return None
    try:
        manifest = Manifest.read(bundle, "engine")
        manifest.verify(bundle, only_sizes=manifest.files)
    except UserError:
        log.info("made again", exc_info=True)
        return None
    return bundle


def _cache_of(source: Path) -> Path:
    """The cache folder for what is made of a folder."""
    from pascalvl.plugins.user_cache import open_cache_folder

    path = source.resolve()
    label = path.name.encode()[:100].decode(errors="ignore")
    return open_cache_folder(f"models/{label}-{_digest(str(path))}")


def _content_of(checkpoint: Path) -> str:
    """What changes when a file of a checkpoint does; to hash gigabytes would take seconds at each start."""
    files = sorted(path for path in checkpoint.iterdir() if path.suffix in (".json", ".jinja", ".safetensors"))
    states = [(path.name, path.stat()) for path in files]
    return repr([(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states])


def _export_and_build(checkpoint: Path, name: str | None, bundle: Path, wanted: _Wanted) -> None:
    """Write the engine bundle of a checkpoint, which may have a name; the caller holds the lock of its folder."""
    from pascalvl.export import export_checkpoint
    from pascalvl.plugins.bundle import Manifest
    from pascalvl.runtime.cli.convert import check_host_files

    weights = wanted.weights
    if room := wanted.room():
        from pascalvl.export.weight_size import fitting_weights
        from pascalvl.runtime.model import DEFAULT_CONTEXT_LENGTH

        fitting = fitting_weights(checkpoint, room, wanted.cache, DEFAULT_CONTEXT_LENGTH)
        weights = fitting.weights
        _tell(f"weights: {fitting.reason}")
    model = bundle.with_name(f"{_MODEL}{bundle.name}")
    for other in bundle.parent.iterdir():
        if other.name.startswith((f".{_MODEL}", _MODEL)) and model.name not in other.name:
            _remove(other)  # of a start with other options that was interrupted
    try:
        Manifest.read(model, "model").verify(model)
    except UserError:
        _tell(f"exporting {name or checkpoint}")
        shutil.rmtree(model, ignore_errors=True)
        export_checkpoint(checkpoint, model, check_host_files, cache=wanted.cache, weights=weights, source_name=name)
    _build(model, name or str(checkpoint), bundle, wanted)
    shutil.rmtree(model)


def _build(model: Path, source: str, bundle: Path, wanted: _Wanted) -> None:
    from pascalvl.engines import build

    for told in (*wanted.reasons, f"building {source} for backend {wanted.target['name']}"):
        _tell(told)
    _remove(bundle)  # what is there cannot be used
    manifest = build(model, bundle, wanted.target["name"], wanted.cache)
    nbytes = sum(file["bytes"] for file in manifest.files.values())
    _tell(f"{bundle} ({_gigabytes(nbytes)}) is kept, and taken from now on; it may be removed at any time")


def _remove_others(folder: Path, identities: list[str]) -> None:
    """Remove the bundles of what the source was before."""
    kept = {_digest(identity) for identity in identities}
    for path in folder.glob("*-*-*"):
        if path.is_dir() and not path.name.startswith((".", _MODEL)) and path.name.rsplit("-", 2)[1] not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _require_packages(what: str, packages: tuple[str, ...]) -> None:
    """Raise `UserError` unless a bundle can be made here."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{what} has to be made into an engine bundle first, which takes the package {missing[0]}: pip install "
            "'pascalvl[export,engines]', or give an engine bundle that was built elsewhere."
        )


# Checkpoints ----------------------------------------------------------------------------------------------------------


def checkpoint_folder(source: Path | HubName, output: Path, weights: WeightConfig | None) -> tuple[Path, str | None]:
    """The checkpoint that an export to ``output`` reads, the newest commit if it is a name, and its name if that says
    more than the folder's."""
    if isinstance(source, HubName):
        _require_packages(str(source), _EXPORT_PACKAGES)
        from pascalvl.export.hub import find_checkpoint

        checkpoint = find_checkpoint(source.repo, source.revision, _tell)
        _fetch(checkpoint, output, _bundle_bytes(checkpoint.folder, weights))
        return checkpoint.folder, source.repo
    if not source.is_dir():
        raise UserError(
            f"no checkpoint directory at {source}: give the folder of a Qwen3-VL model, or its name on the Hugging "
            "Face hub, ORG/NAME."
        )
    return source, None


def _fetch(checkpoint: HubCheckpoint, folder: Path, more: int) -> None:
    """Download what is missing of a checkpoint, if there is room for that, and for ``more`` bytes in ``folder``."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    missing = checkpoint.missing_bytes
    _check_disks({checkpoint.folder: missing, folder: more})
    if not missing:
        return
    _tell(f"downloading {checkpoint.repo} ({_gigabytes(missing)}) to {checkpoint.folder}")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with progress_bars(*columns, TimeRemainingColumn()) as bars:
        task = bars.add_task("downloading", total=missing)
        checkpoint.download(lambda count: bars.advance(task, count))


def _bundle_bytes(
    checkpoint: Path, weights: WeightConfig | None, room: Room | None = None, cache: CacheConfig | None = None
) -> int:
    """Bytes of a bundle of a checkpoint, of which the config is here, about: of its tables and its weights, in this
    format, or the one that there is room for.

    Raises `UserError` where there is no room for its weights on the card or in the machine's memory.
    """
    from pascalvl.export.checkpoint import read_config_file
    from pascalvl.export.weight_size import fitting_weights_of_config, weight_bytes_of_config
    from pascalvl.plugins.bundle import CHECKPOINT_CONFIG
    from pascalvl.plugins.weight_format import FLOAT_WEIGHTS, WeightConfig
    from pascalvl.runtime.model import DEFAULT_CONTEXT_LENGTH

    config, quantization = read_config_file(checkpoint / CHECKPOINT_CONFIG)
    if quantization and weights is None:
        weights = WeightConfig.parse("w4")  # at least: codes of 4 bits stay, and those of 8 become floats
    elif room and cache:
        weights = fitting_weights_of_config(config, room, cache, DEFAULT_CONTEXT_LENGTH).weights
    text: Any = config.text_config
    return weight_bytes_of_config(config, weights or FLOAT_WEIGHTS) + 2 * text.vocab_size * text.hidden_size


def _check_disks(needed: Mapping[Path, int]) -> None:
    """Raise `UserError` where so many bytes cannot be written below these folders, which need not be there yet."""
    by_disk: dict[int, tuple[Path, int]] = {}
    for folder, nbytes in needed.items():
        there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
        device = there.stat().st_dev
        by_disk[device] = there, nbytes + by_disk.get(device, (there, 0))[1]
    for there, nbytes in by_disk.values():
        if nbytes and (free := shutil.disk_usage(there).free) < nbytes + _SPARE_BYTES:
            raise UserError(
                f"the disk of {there} has {_gigabytes(free)} free, and {_gigabytes(nbytes)} are needed for what is "
                "downloaded and made: free some space, set HF_HOME and XDG_CACHE_HOME to folders of another disk, or "
                "give smaller --weights."
            )


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.1f} MB"


def _tell(sentence: str) -> None:
    """Tell on stderr what takes time, and where it is kept."""
    notice(f"pascalvl: {sentence}")
