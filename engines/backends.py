"""Which backends there are, and how one is chosen."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from pascalvl.engines.engine import DeviceMemory, Engine
from pascalvl.engines.tensorrt.options import BuildOptions
from pascalvl.plugins.bundle import HOST_FILES, Manifest, atomic_directory
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig

log = logging.getLogger(__name__)

AUTO = "auto"
BACKENDS = {
    "tensorrt": "pascalvl.engines.tensorrt.backend",
    "cuda": "pascalvl.engines.cuda.backend",
    "onnxruntime": "pascalvl.engines.onnxruntime.backend",
    "torch": "pascalvl.engines.torch.backend",
    "reference": "pascalvl.engines.reference.backend",
}
"""Backends by name, the fastest first; the value is the module, which is imported only when it is chosen.

A module has `NAME`, `FILES`, `build` and `open_engine`, and may have `unavailable`, which says why this machine cannot
run it though it is installed, `BuildOptions`, a further argument of its `build`, and `CHECKED_WHEN_READ`, files whose
hashes its `open_engine` checks, which then takes ``progress``, too. For `memory` see `device_memory`, for `depends_on`
see `target`.
"""
_FOR_JUDGING = ("torch", "reference")
"""What the others are judged by; `AUTO` never takes them."""
AUTOMATIC = tuple(name for name in BACKENDS if name not in _FOR_JUDGING)
"""What `AUTO` takes one of, the fastest first."""


def build(
    model_bundle: Path,
    output: Path,
    backend: str = AUTO,
    cache: CacheConfig | None = None,
    options: BuildOptions | None = None,
    tell: Callable[[str], None] = log.info,
) -> Manifest:
    """Build the engine bundle ``output`` from a model bundle; returns its manifest.

    Args:
        model_bundle: what an export wrote.
        output: folder to write.
        backend: one of `BACKENDS`, or `AUTO`.
        cache: what the KV cache is like; None: `CacheConfig`'s defaults. Its rank is the one that the model was
            exported with, and need not be given.
        options: for backend ``tensorrt`` alone; None: its defaults.
        tell: called with what `AUTO` took, and why nothing faster.

    Raises:
        UserError: a model bundle that is damaged or not one, an unknown or missing backend, options for another one,
            a cache that the model cannot have, what the backend cannot build, or a full disk.
    """
    module = _backend_module(backend, tell)
    if options is not None and not hasattr(module, "BuildOptions"):
        raise UserError(
            f"these options are for backend tensorrt, and the backend is {module.NAME}: leave them out, or give "
            "--backend tensorrt."
        )
    manifest = Manifest.read(model_bundle, "model")
    exported = manifest.kv_cache
    cache = (cache or CacheConfig()).with_rank_of(exported)
    if cache.value_rank != exported.value_rank:
        raise UserError(
            f"the KV cache {cache} has another rank than the model was exported with ({exported}): export it with --kv "
            f"{cache}, or give no rank."
        )
    cache.layers(manifest.model.text)
    manifest.verify(model_bundle)
    with atomic_directory(output, "engine") as directory:
        for name in HOST_FILES:
            shutil.copyfile(model_bundle / name, directory / name)
        given = () if options is None else (options,)
        description = module.build(model_bundle, directory, manifest, cache, *given)
        return dataclasses.replace(manifest, kind="engine", kv_cache=cache, backend=description).write(directory)


def target(backend: str = AUTO, tell: Callable[[str], None] = log.info) -> dict[str, str]:
    """The backend that is taken here, as ``name``, and what else an engine bundle that is built here depends on.

    Raises `UserError` for an unknown or missing backend.
    """
    module = _backend_module(backend, tell)
    return {"name": module.NAME, **getattr(module, "depends_on", dict)()}


def open_engine(
    directory: Path,
    backend: str = AUTO,
    marked_layers: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Engine:
    """Load an engine bundle.

    Args:
        directory: the bundle.
        backend: the backend it must be for, or `AUTO` for whichever it was built for.
        marked_layers: make the decoder return `bindings.hidden_states` of every layer as well.
        progress: called with numbers of bytes, from several threads, as the bundle's files are checked.

    Raises:
        UserError: not an engine bundle, altered files, another backend than asked for, or one that is not installed.
    """
    manifest = Manifest.read(directory, "engine")
    built_for = manifest.backend.get("name")
    if backend not in (AUTO, built_for):
        _backend_module(backend)
        raise UserError(
            f"{directory} was built for backend {built_for!r}, not {backend!r}: build it with --backend {backend}."
        )
    module = _backend_module(str(built_for))
    manifest.require(module.FILES)
    checked_when_read = getattr(module, "CHECKED_WHEN_READ", ())
    manifest.verify(directory, progress, checked_when_read)
    given = (progress,) if checked_when_read else ()
    return module.open_engine(directory, manifest, marked_layers, *given)


def device_memory(directory: Path, manifest: Manifest, capacities: Sequence[int]) -> list[DeviceMemory]:
    """What an engine bundle will take of this machine's GPU, for each of some capacities; none if its backend does not
    tell.

    Args:
        directory: the bundle.
        manifest: its own.
        capacities: slots of the cache of a sequence.

    Raises:
        UserError: no GPU can be used, or the bundle is not one that can be run.
    """
    name = manifest.backend.get("name")
    tell = getattr(_backend_module(name), "memory", None) if name in BACKENDS else None
    return tell(directory, manifest, capacities) if tell else []


def unavailable(name: str) -> str:
    """Why one of `BACKENDS` cannot be used here; empty: it is installed and finds what it needs."""
    module, reason = _imported(name)
    return reason or getattr(module, "unavailable", lambda: None)() or ""


def automatic(why_not: Callable[[str], str] = unavailable) -> tuple[str | None, dict[str, str]]:
    """What `AUTO` takes, None if no backend can be used; and by name why faster ones are skipped.

    Args:
        why_not: tells of a backend what `unavailable` does.
    """
    skipped: dict[str, str] = {}
    for name in AUTOMATIC:
        if not (reason := why_not(name)):
            return name, skipped
        skipped[name] = reason
    return None, skipped


def _backend_module(name: str, tell: Callable[[str], None] = log.info) -> ModuleType:
    """Import a backend's module; `AUTO` is the first that is installed and finds what it needs."""
    if name not in (AUTO, *BACKENDS):
        raise UserError(f"unknown backend {name!r}: expected one of {', '.join((AUTO, *BACKENDS))}.")
    if name == AUTO:
        taken, skipped = automatic()
        if taken is None:
            reasons = ", ".join(f"{backend} ({reason})" for backend, reason in skipped.items())
            raise UserError(f"no backend can be used: {reasons}; install one with pip.")
        others = AUTOMATIC[AUTOMATIC.index(taken) + 1 :]
        other = f"; --backend {others[0]} would be the next" if others else ""
        tell(f"backend {taken}: the fastest that can be used here{_told(skipped)}{other}")
        name = taken
    module, reason = _imported(name)
    if module is None:
        raise UserError(f"backend not installed: {name} ({reason}); install it with pip, or choose another --backend.")
    return module


def _imported(name: str) -> tuple[ModuleType | None, str]:
    """A backend's module, or why it cannot be imported."""
    try:
        return importlib.import_module(BACKENDS[name]), ""
    except ModuleNotFoundError as error:
        return None, f"needs the package {error.name}"
    except ImportError as error:  # a library that the package loads
        return None, str(error)


def _told(skipped: Mapping[str, str]) -> str:
    """Why backends are skipped, each reason once."""
    by_reason: dict[str, list[str]] = {}
    for backend, reason in skipped.items():
        by_reason.setdefault(reason, []).append(backend)
    return "".join(
        f"; {' and '.join(names)} {'is' if len(names) == 1 else 'are'} skipped: {reason}"
        for reason, names in by_reason.items()
    )
