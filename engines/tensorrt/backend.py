"""The backend for the cards: both graphs as TensorRT plans, attention by the FlashAttention2 plugin, all in float32.

For Pascal TensorRT 8.6 or 9, for cards from Turing on also 10. The calls are those that all of these versions have.
A plan is for the version of TensorRT and the compute capability that it was built with, and for all plugins of one
contract (the ops' versions, what lies in plans and caches), which the manifest notes and `open_engine` checks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import logging
import mmap
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pascalvl.engines.tensorrt import cuda_libraries

cuda_libraries.preload()

# ruff: noqa: E402 - what TensorRT is linked with comes first
# isort: split
import tensorrt as trt

from pascalvl.engines.device.gpu import INSTALL_TENSORRT_8, PASCAL, TENSORRT_10_CAPABILITY, Gpu, find_gpu
from pascalvl.engines.tensorrt.options import BuildOptions
from pascalvl.engines.tensorrt.profiles import Limits, Shapes, profiles
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear
from pascalvl.plugins.tensorrt import build as plugin_build
from pascalvl.plugins.terminal import progress_bars
from pascalvl.plugins.user_cache import cache_folder, open_cache_folder

if TYPE_CHECKING:
    from rich.progress import Progress

    from pascalvl.engines.tensorrt.engine import TensorRTEngine

log = logging.getLogger(__name__)

NAME = "tensorrt"
_WITHOUT = "--backend cuda needs no TensorRT"
_GRAPHS = (bindings.VISION, bindings.DECODER)
FILES = tuple(f"{graph}.plan" for graph in _GRAPHS)
"""What an engine bundle holds beside `HOST_FILES`."""
_CUDA_MAJORS = (12, 13, 11)
_LIBRARY = "libnvinfer.so"
_OLDEST_TENSORRT = (8, 6)
_MOST_OF_WEIGHTS, _REST_OF_PLAN = 1.2, 64_000_000
"""A plan is expected to have up to so many times the bytes of its weights, and up to so many besides."""
_CUDA_CONTEXT = 300_000_000
"""Bytes that CUDA and TensorRT's libraries take of a card before any weight, roughly."""


def unavailable() -> str | None:
    """Why there is nothing here that this backend runs on; None: there is."""
    try:
        return _mismatch(find_gpu())
    except UserError as error:
        return str(error).removesuffix(".")


def depends_on() -> dict[str, str]:
    """What a bundle's engines are for, besides the model; raises `UserError` where there is no card."""
    return {
        "version": trt.__version__,
        "capability": _dotted(find_gpu().capability),
        "contract": plugin_build.contract(),
    }


def build(
    model_bundle: Path,
    directory: Path,
    manifest: Manifest,
    cache: CacheConfig,
    options: BuildOptions | None = None,
) -> dict[str, str]:
    """Write the plans for ``cache`` into ``directory``, and return the manifest's description.

    Raises:
        UserError: a card or a version of TensorRT that do not fit, options that it does not know, or its own error.
    """
    options = options or BuildOptions()
    gpu = find_gpu()
    if mismatch := _mismatch(gpu):
        raise UserError(f"{mismatch}; {_WITHOUT}.")
    _check_memory(manifest, gpu)
    limits = _limits(manifest.model, options)
    sources = options.tactic_sources if options.tactic_sources is not None else default_tactic_sources()
    settings = {
        "max_aux_streams": 0,  # what runs beside something else needs memory of its own
        "tactic_sources": _members("TacticSource", "tactic source", sources),
        "preview_features": _members("PreviewFeature", "preview feature", _preview_features(gpu, options)),
    }
    timing_cache = _timing_cache(gpu, options)
    plugin = _load_plugin()
    for graph in _GRAPHS:
        ranges = profiles(graph, manifest.model, cache, limits)
        log.info("building %s for %s with TensorRT %s, profiles %s", graph, gpu.sm, trt.__version__, ranges)
        _write_plan(model_bundle, directory, graph, manifest, cache, ranges, settings, timing_cache)
    return {
        "name": NAME,
        **depends_on(),
        "cuda": _dotted(_cuda_version() or gpu.driver_cuda),
        "gpu": gpu.name,
        "plugin": plugin_build.source_hash(plugin),
        **{name: str(limit) for name, limit in dataclasses.asdict(limits).items()},
    }


def open_engine(directory: Path, manifest: Manifest, marked_layers: bool) -> TensorRTEngine:
    """See `pascalvl.engines.open_engine`."""
    if marked_layers:
        raise UserError(
            f"{directory} holds TensorRT plans, which do not return the hidden states of layers: bisect with "
            "a bundle that was built with --backend reference instead."
        )
    built = manifest.backend
    gpu = find_gpu()
    _check_same(directory, "by TensorRT", built.get("version"), trt.__version__)
    _check_same(directory, "for compute capability", built.get("capability"), _dotted(gpu.capability))
    plugin = _load_plugin()
    _check_same(directory, "for the contract", built.get("contract"), plugin_build.contract())
    sources = built.get("plugin"), plugin_build.source_hash(plugin)
    log.info("the plans were built with the plugin of sources %s; here they are %s", *sources)

    from pascalvl.engines.device.memory import CudaDevice
    from pascalvl.engines.tensorrt.engine import TensorRTEngine

    engines = {graph: _deserialise(directory / f"{graph}.plan", gpu) for graph in _GRAPHS}
    return TensorRTEngine(directory, manifest, engines, CudaDevice(plugin), marked_layers)


# What is here ---------------------------------------------------------------------------------------------------------


def _version() -> tuple[int, int]:
    major, minor = trt.__version__.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)


def _cuda_version() -> tuple[int, int] | None:
    """Of the CUDA runtime that TensorRT has loaded; None: it has one inside."""
    for major in _CUDA_MAJORS:
        try:
            runtime = ctypes.CDLL(f"libcudart.so.{major}", mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        version = ctypes.c_int()
        runtime.cudaRuntimeGetVersion(ctypes.byref(version))
        return version.value // 1000, version.value % 1000 // 10
    return None


def _mismatch(gpu: Gpu) -> str | None:
    """Why this version of TensorRT with the plugin cannot serve ``gpu``: a sentence without its full stop, or None."""
    if gpu.capability < PASCAL:
        return (
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, and the kernels need "
            f"{_dotted(PASCAL)} or newer: use another card or --backend onnxruntime"
        )
    if _version() < _OLDEST_TENSORRT:
        oldest = _dotted(_OLDEST_TENSORRT)
        return f"TensorRT {trt.__version__} is too old, expected {oldest} or newer: {INSTALL_TENSORRT_8}"
    if _version() >= (10, 0) and gpu.capability < TENSORRT_10_CAPABILITY:
        return (
            f"TensorRT {trt.__version__} does not serve {gpu.sm} ({gpu.name}): install 8.6.1, the last release that "
            f"does, on Python 3.10 or 3.11, with {INSTALL_TENSORRT_8}"
        )
    return None


def _check_memory(manifest: Manifest, gpu: Gpu) -> None:
    """Raise `UserError` if the card cannot hold the engines' weights.

    A lower bound, so that nothing is refused that would work: a run keeps both plans' weights on the card, which are
    the graphs', beside CUDA's own part. At build, kernels are timed with one layer's weights at a time, and
    the further copies of all are in the host's memory (TensorRT Developer Guide, "How TensorRT Works: Memory").
    """
    weights = sum(manifest.files[f"{graph}.onnx.data"]["bytes"] for graph in _GRAPHS)
    if (needed := weights + _CUDA_CONTEXT) > gpu.total_memory:
        raise UserError(
            f"{gpu.name} has {gpu.total_memory / 1e9:.1f} GB of memory, and the engines of this model take at least "
            f"{needed / 1e9:.1f} GB ({weights / 1e9:.1f} GB of weights): export it with --weights auto, or take a card "
            "with more, a smaller model, or --backend onnxruntime."
        )
    if needed > gpu.free_memory:
        log.warning(
            "of %s's %.1f GB only %.1f GB are free, and the engines take at least %.1f GB: end what else uses the card",
            *(gpu.name, gpu.total_memory / 1e9, gpu.free_memory / 1e9, needed / 1e9),
        )


def _check_same(directory: Path, what: str, expected: str | None, found: str) -> None:
    if expected != found:
        raise UserError(
            f"the engines in {directory} were built {what} {expected}, found {found}: build them again with "
            f"'pascalvl build --backend {NAME}'."
        )


# The plugin -----------------------------------------------------------------------------------------------------------


def _load_plugin() -> Path:
    """Put the plugin's creator into TensorRT's registry; returns its library."""
    major = max(known for known in plugin_build.MAJORS if known <= _version()[0])
    library = plugin_build.cached(major, Target.CUDA)
    _register(library)
    return library


def _register(library: Path) -> None:
    """Load a plugin's library; raises `UserError` unless TensorRT's registry has its creator afterwards."""
    _expose_tensorrt()
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        raise UserError(
            f"the plugin's library cannot be loaded ({error}): remove {library}, it is then made anew."
        ) from error
    # Deprecated in TensorRT 10 in favour of get_creator, which 8.6 and 9 lack.
    for op in (flash_attention, quant_linear):
        if trt.get_plugin_registry().get_plugin_creator(op.OP_NAME, op.OP_VERSION, "") is None:
            raise UserError(
                f"TensorRT {trt.__version__} did not take the plugin {op.OP_NAME} from {library}: install a version "
                f"that is served, for Pascal: {INSTALL_TENSORRT_8}."
            )


def _expose_tensorrt() -> None:
    """Let libraries that are loaded later find TensorRT's symbols; its Python package loads it for itself alone."""
    name = f"{_LIBRARY}.{_version()[0]}"
    try:
        # By its soname, the one that is loaded already: a second copy would have a registry of its own.
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL | os.RTLD_NOLOAD)
    except OSError as error:
        raise UserError(
            f"the package tensorrt {trt.__version__} did not load {name} ({error}): install it again, for Pascal: "
            f"{INSTALL_TENSORRT_8}."
        ) from error


# Choices --------------------------------------------------------------------------------------------------------------


def _limits(model: ModelConfig, options: BuildOptions) -> Limits:
    """What the engines take at most; raises `UserError` for what the model cannot have."""
    longest = model.text.max_position_embeddings
    if options.prefill_chunk > longest:
        raise UserError(
            f"prefill_chunk is out of range: expected at most the model's {longest} tokens, found "
            f"{options.prefill_chunk}."
        )
    merged = model.vision.spatial_merge_size**2
    patches = options.max_pixels // model.vision.patch_size**2 // merged * merged
    if patches < merged:
        smallest = merged * model.vision.patch_size**2
        raise UserError(f"max_pixels is out of range: expected at least {smallest}, found {options.max_pixels}.")
    return Limits(options.prefill_chunk, patches, min(options.max_context, longest))


def _preview_features(gpu: Gpu, options: BuildOptions) -> tuple[str, ...] | None:
    return options.preview_features if options.preview_features is not None else default_preview_features(gpu)


def default_preview_features(gpu: Gpu) -> tuple[str, ...] | None:
    """What is enabled unless told otherwise; None: as TensorRT has it.

    TensorRT 8.6: PROFILE_SHARING_0806, without which a second session finds the profiles taken; from 9 on they are
    always shared. On Pascal not DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, which its own default (NvInfer.h) has:
    without cuBLAS transformers are up to 85% slower on these cards (github.com/NVIDIA/TensorRT/issues/3826), or shapes
    of theirs have no kernel at all (issue 3209).
    """
    if _version() != (8, 6):
        return None
    external = "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805"
    return tuple(name for name in trt.PreviewFeature.__members__ if name != external or gpu.capability[0] != 6)


def default_tactic_sources() -> tuple[str, ...] | None:
    """Which libraries' kernels are tried unless told otherwise; None: as TensorRT has it.

    Before TensorRT 10 those that have products of matrices: there are no convolutions in the graphs.
    """
    return ("CUBLAS", "CUBLAS_LT") if _version() < (10, 0) else None


def _members(enum: str, meaning: str, names: tuple[str, ...] | None) -> list[Any] | None:
    """The values of TensorRT's enum ``enum`` of these names; raises `UserError` for a name that it lacks."""
    if names is None:
        return None
    known = getattr(trt, enum).__members__
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"unknown {meaning} {unknown[0]!r}: TensorRT {trt.__version__} has {', '.join(known) or 'none'}."
        )
    return [known[name] for name in names]


def _timing_cache(gpu: Gpu, options: BuildOptions) -> Path:
    """The timing cache's path, which can be written; TensorRT itself refuses the times of another model of card."""
    card = re.sub(r"\W+", "-", gpu.name)
    path = options.timing_cache or cache_folder() / f"tensorrt-{trt.__version__}-{gpu.sm}-{card}.timing"
    try:
        if options.timing_cache:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            open_cache_folder()
        with path.open("ab"):  # as the build's end would find out
            pass
    except OSError as error:
        raise UserError(
            f"the timing cache {path} cannot be written ({error.strerror}): choose another with --timing-cache."
        ) from error
    return path


# Building -------------------------------------------------------------------------------------------------------------


class _Logger(trt.ILogger):
    """TensorRT's messages in Python's log, and its errors kept for the sentence that a person reads.

    It is called inside of native code, also from other threads, and must not raise.
    """

    _LEVELS = {  # noqa: RUF012 - not a field
        trt.ILogger.Severity.INTERNAL_ERROR: logging.DEBUG,
        trt.ILogger.Severity.ERROR: logging.DEBUG,
        trt.ILogger.Severity.WARNING: logging.INFO,
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.interruption: BaseException | None = None

    def log(self, severity: Any, msg: str) -> None:
        try:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(msg)
            if (level := self._LEVELS.get(severity)) is not None:
                log.log(level, "TensorRT: %s", msg)
        except BaseException as error:
            self.interruption = error

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turn polygraphy's errors inside into a `UserError` with TensorRT's first; raise interruptions that it had."""
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        self.errors.clear()
        self.interruption = None
        failure = None
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # all that it has to say is in its exceptions
            try:
                yield
            except PolygraphyException as error:
                failure = error
        if self.interruption:
            raise self.interruption
        if failure:
            first = self.errors[0] if self.errors else str(failure)
            raise UserError(f"TensorRT {trt.__version__} cannot {what}: {_sentence(first)}; {_WITHOUT}.") from failure


def _sentence(message: str) -> str:
    """A message on one line, without its full stop."""
    return " ".join(message.split()).rstrip(".")


@functools.cache
def _logger() -> _Logger:
    """The only one: TensorRT keeps the first that it is given for as long as the process lives."""
    return _Logger()


def _write_plan(
    model_bundle: Path,
    directory: Path,
    graph: str,
    manifest: Manifest,
    cache: CacheConfig,
    ranges: list[Shapes],
    settings: Mapping[str, Any],
    timing_cache: Path,
) -> None:
    """Build one graph's plan. ``settings`` are further arguments of polygraphy's `CreateConfig`."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, Profile

    logger = _logger()
    with tempfile.TemporaryDirectory() as folder, _progress(f"building {graph}", logger) as monitor:
        network = _parse(_prepare(model_bundle, Path(folder), graph, manifest, cache), logger)
        with logger.attempt(f"build the {graph} engine"):
            wanted = []
            for shapes in ranges:
                profile = Profile()
                for name, (smallest, usual, largest) in shapes.items():
                    profile.add(name, smallest, usual, largest)
                wanted.append(profile)
            config = CreateConfig(
                profiles=wanted, tf32=False, load_timing_cache=str(timing_cache), progress_monitor=monitor, **settings
            )
            plan = EngineBytesFromNetwork(network, config, save_timing_cache=str(timing_cache))()
        with (directory / f"{graph}.plan").open("wb") as file:
            file.write(plan)
            weights = (model_bundle / f"{graph}.onnx.data").stat().st_size
            if file.tell() > _MOST_OF_WEIGHTS * weights + _REST_OF_PLAN:
                log.warning(
                    "the plan of the %s takes %.1f GB, and its weights take %.1f GB, for TensorRT keeps some once a "
                    "profile: if the card's memory is short, export with weights of fewer bits (--weights w8 or w4)",
                    *(graph, file.tell() / 1e9, weights / 1e9),
                )


def _prepare(model_bundle: Path, folder: Path, graph: str, manifest: Manifest, cache: CacheConfig) -> Path:
    """Write a graph as TensorRT takes it into ``folder``, beside a link to its weights; returns its path."""
    import onnx

    from pascalvl.engines import graphs

    name = f"{graph}.onnx"
    with graphs.reading(model_bundle / name, manifest.remedy):
        proto = onnx.load(model_bundle / name, load_external_data=False)
        if graph == bindings.DECODER:
            graphs.set_cache(proto, manifest.model, cache)
        graphs.leave_ops_to_plugins(proto)
        onnx.save(proto, folder / name)
    (folder / f"{name}.data").symlink_to((model_bundle / f"{name}.data").resolve())
    return folder / name


def _parse(path: Path, logger: _Logger) -> tuple[Any, Any, Any]:
    """A builder, its network and the parser, which owns the weights; raises `UserError` with the parser's error."""
    builder = trt.Builder(logger)
    # What 10 always does and no longer lists.
    explicit = 0 if _version() >= (10, 0) else 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    network = builder.create_network(explicit)
    parser = trt.OnnxParser(network, logger)
    with logger.attempt(f"parse {path.name}"):
        parsed = parser.parse_from_file(str(path))
    if not parsed:
        # The parser's own errors do not name the operator before TensorRT 9; its first message does.
        errors = [*logger.errors[:1], *(str(parser.get_error(i)) for i in range(min(parser.num_errors, 1)))]
        found = _sentence(" ".join(errors))
        raise UserError(f"TensorRT {trt.__version__} cannot parse {path.name}: {found}; {_WITHOUT}.")
    return builder, network, parser


@contextlib.contextmanager
def _progress(title: str, logger: _Logger) -> Iterator[Any]:
    """Show on a terminal how far a build is; yields TensorRT's progress monitor, None where it has none (8.6)."""
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with progress_bars(*columns) as bars:
        bars.add_task(title, total=None)
        yield _monitor(bars, logger) if hasattr(trt, "IProgressMonitor") else None


def _monitor(bars: Progress, logger: _Logger) -> Any:
    """Shows TensorRT's phases as bars, and ends the build if the person at the terminal does."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._tasks: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._no_error():
                self._tasks[phase_name] = bars.add_task(f"  {phase_name}", total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._no_error():
                bars.update(self._tasks[phase_name], completed=step + 1)
            return logger.interruption is None

        def phase_finish(self, phase_name: str) -> None:
            with self._no_error():
                bars.remove_task(self._tasks.pop(phase_name))

        @contextlib.contextmanager
        def _no_error(self) -> Iterator[None]:
            try:
                yield
            except BaseException as error:
                logger.interruption = error

    return Monitor()


# Opening --------------------------------------------------------------------------------------------------------------


def _deserialise(path: Path, gpu: Gpu) -> Any:
    """The engine of a plan, its weights on the card; it keeps the runtime that it came from."""
    logger = _logger()
    logger.errors.clear()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        first = _sentence((logger.errors or ["no reason given"])[0])
        raise UserError(
            f"TensorRT {trt.__version__} cannot load {path} ({first}) onto {gpu.name}, of whose "
            f"{gpu.total_memory / 1e9:.1f} GB {gpu.free_memory / 1e9:.1f} GB were free: end what else uses the card, "
            "or build the bundle again."
        )
    return engine
