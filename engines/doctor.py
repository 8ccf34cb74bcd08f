"""What a machine has of what the tensorrt backend needs, and how to put right what it lacks.

Each ``check_*`` judges facts that it is given and returns a `Row`; `diagnose` gathers the facts of this machine. What
may crash, TensorRT and the plugin in it, is tried in a process of its own: ``python -m pascalvl.engines.doctor
[PLUGIN]``.
"""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pascalvl.engines.device.gpu import (
    CUBLAS,
    CUDA_RUNTIME,
    CUDNN,
    INSTALL_TENSORRT_8,
    PASCAL,
    TENSORRT_10_CAPABILITY,
    Gpu,
    find_gpu,
    install,
)
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import NVRTC_PACKAGE, Target
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt import build as plugin_build

BACKEND = "tensorrt"
LAST_PASCAL_BRANCH = 580
FIRST_CUDA12_BRANCH = 525
PTX_CUDA, PTX_BRANCH = (12, 9), 575
"""The first driver that compiles the PTX of NVRTC 12.9, which GPUs other than SM61 run."""
TENSORRT_8_CAPABILITY = (9, 0)
"""The highest that TensorRT 8.6 and 9.x know."""
INSTALL_10 = install("tensorrt-cu12>=10,<11")
CUDA_PACKAGES = {"CUDA runtime": CUDA_RUNTIME, "cuBLAS": CUBLAS, "cuDNN": CUDNN}
"""By row: the packages that have what TensorRT 8.6 needs of CUDA."""
PROBE_SECONDS = 300
"""TensorRT's libraries are gigabytes, which a slow disk takes its time to read."""


class State(enum.Enum):
    """The value is what is shown."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"
    """The tensorrt backend cannot run."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One check: what was looked for, what was found, and, unless that is `State.OK`, one sentence on what to do."""

    name: str
    found: str
    state: State = State.OK
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Driver:
    """The NVIDIA driver."""

    version: str
    cuda: tuple[int, int] | None
    """The newest CUDA version that it runs, if it tells."""
    open_modules: bool = False
    """Whether its kernel modules are the open ones, which begin with Turing."""

    @property
    def branch(self) -> int:
        return _numbers(self.version)[0]


@dataclasses.dataclass(frozen=True)
class TensorRT:
    """TensorRT as Python imports it."""

    version: str = ""
    """Of the package, even if it cannot be imported; empty: not installed."""
    problem: str = ""
    """Why it cannot be imported; empty: it can."""

    @property
    def usable(self) -> bool:
        return bool(self.version) and not self.problem


@dataclasses.dataclass(frozen=True)
class Plugin:
    """The plugin's library."""

    library: Path | None = None
    problem: str = ""
    """Why there is no library, or why TensorRT does not find the op in it; empty: it does, or was not tried."""


def diagnose(manifest: Manifest | None = None) -> list[Row]:
    """Check this machine, and whether it runs the engine bundle of ``manifest`` if that is given."""
    driver = find_driver()
    gpu, gpu_problem = _find_gpu()
    onnxruntime = installed("onnxruntime", "onnxruntime-gpu")
    tensorrt = find_tensorrt()
    plugin = find_plugin(tensorrt)
    rows = [
        check_python(sys.version_info[:3], tensorrt),
        check_driver(driver, gpu),
        check_gpu(gpu, gpu_problem),
        *([check_memory(gpu)] if gpu else []),
        check_cuda_bindings(installed("cuda-bindings"), driver, gpu),
        check_tensorrt(tensorrt, gpu),
        check_numpy(installed("numpy"), tensorrt, gpu),
        *check_libraries(find_libraries(), tensorrt, gpu),
        check_plugin(plugin, tensorrt),
        check_compiler(shutil.which(os.environ.get("CXX", "g++")), plugin),
        check_nvrtc(installed("nvidia-cuda-nvrtc-cu12"), plugin),
        check_onnxruntime(onnxruntime),
    ]
    if manifest:
        rows += check_engine(manifest.backend, tensorrt, gpu, driver, plugin, onnxruntime)
    return rows


# Facts ----------------------------------------------------------------------------------------------------------------


def installed(*distributions: str) -> str:
    """Version of the first of these packages that is installed; empty if none is."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def find_driver(proc: Path = Path("/proc/driver/nvidia/version")) -> Driver | None:
    """By its management library, which tells even if CUDA cannot be used, or else by the kernel module's own file."""
    try:
        text = proc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    match = re.search(r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s", text)
    open_modules = "Open Kernel Module" in text
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        nvml = None
    if nvml and nvml.nvmlInit_v2() == 0:
        version, cuda = ctypes.create_string_buffer(80), ctypes.c_int()
        told = nvml.nvmlSystemGetDriverVersion(version, len(version)) == 0
        runs = nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda)) == 0
        nvml.nvmlShutdown()
        if told:
            known = (cuda.value // 1000, cuda.value % 1000 // 10) if runs else None
            return Driver(version.value.decode(), known, open_modules)
    return Driver(match[1], None, open_modules) if match else None


def _find_gpu() -> tuple[Gpu | None, str]:
    """The GPU, or why there is none that can be used."""
    try:
        return find_gpu(), ""
    except ImportError:
        return None, "cuda-bindings, which would tell, is not there: install it."
    except (UserError, MemoryError, RuntimeError) as error:
        return None, _one_line(str(error))


def find_tensorrt() -> TensorRT:
    """What importing TensorRT gives."""
    version = installed("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-cu11")
    report = probe()
    if "version" in report:
        return TensorRT(report["version"])
    return TensorRT(version, report["problem"]) if version else TensorRT()


def find_plugin(tensorrt: TensorRT) -> Plugin:
    """The plugin's library for this TensorRT (8.6 if there is none), compiled if need be and tried in it."""
    major = 10 if tensorrt.version and _numbers(tensorrt.version)[0] >= 10 else 8
    try:
        library = plugin_build.cached(major, Target.CUDA)
    except UserError as error:
        return Plugin(None, _one_line(str(error)))
    except OSError as error:
        return Plugin(None, f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error})")
    return Plugin(library, probe(library).get("problem", "") if tensorrt.usable else "")


def find_libraries() -> dict[str, str]:
    """Load what TensorRT 8.6 needs of CUDA; by library why that cannot be done, empty: it can."""
    report = _ask(cuda_libraries.__name__)
    return dict.fromkeys(cuda_libraries.PACKAGES, report["problem"]) if "problem" in report else report


def probe(library: Path | None = None) -> dict[str, str]:
    """Import TensorRT in a process of its own and look up the op of the plugin's ``library`` in its registry.

    Returns:
        TensorRT's ``version``, and the ``problem``, if any.
    """
    return _ask(__name__, *([str(library)] if library else []))


def _ask(module: str, *arguments: str) -> dict[str, str]:
    """What a module prints as JSON in a process of its own, or why it does not, as ``problem``."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return {"problem": f"it does not answer within {PROBE_SECONDS} s"}
    if result.returncode:
        told = result.stderr.strip().splitlines()
        return {"problem": f"it ends Python with code {result.returncode}" + (f": {told[-1]}" if told else "")}
    return json.loads(result.stdout.splitlines()[-1])


# Checks ---------------------------------------------------------------------------------------------------------------


def check_python(version: Sequence[int], tensorrt: TensorRT) -> Row:
    found = ".".join(map(str, version))
    if tuple(version[:2]) > (3, 11) and not tensorrt.version:
        remedy = "TensorRT 8.6 has packages for Python 3.8 to 3.11: make the environment with Python 3.10 or 3.11."
        return Row("Python", found, State.WARNING, remedy)
    return Row("Python", found)


def check_driver(driver: Driver | None, gpu: Gpu | None) -> Row:
    name = "NVIDIA driver"
    take = f"install branch {LAST_PASCAL_BRANCH}, the last that serves Pascal cards"
    if driver is None:
        if gpu:
            return Row(name, f"of unknown version, runs CUDA {_dotted(gpu.driver_cuda)}")
        return Row(name, "none", State.MISSING, f"{_sentence(take)}.")
    runs = driver.cuda or (gpu and gpu.driver_cuda)
    found = driver.version + (f", runs CUDA {_dotted(runs)}" if runs else "")
    if driver.branch < FIRST_CUDA12_BRANCH:
        remedy = f"CUDA 12 needs branch {FIRST_CUDA12_BRANCH} or newer: {take}."
        return Row(name, found, State.MISSING, remedy)
    if driver.open_modules and gpu is None:
        remedy = f"It sees no GPU, and its open kernel modules begin with Turing: {take}, with the proprietary ones."
        return Row(name, f"{found}, open kernel modules", State.MISSING, remedy)
    if driver.branch > LAST_PASCAL_BRANCH and gpu is None:
        remedy = f"It sees no GPU, and branch {LAST_PASCAL_BRANCH} is the last that serves Pascal cards: install that."
        return Row(name, found, State.MISSING, remedy)
    return Row(name, found)


def check_gpu(gpu: Gpu | None, problem: str) -> Row:
    """``problem``: a sentence on why there is no GPU."""
    if gpu is None:
        return Row("GPU", "none that CUDA can use", State.MISSING, _sentence(problem))
    found = f"{gpu.name}, compute capability {_dotted(gpu.capability)}"
    if gpu.capability < PASCAL:
        remedy = f"The kernels need compute capability {_dotted(PASCAL)} or higher: use another card."
        return Row("GPU", found, State.MISSING, remedy)
    if gpu.capability == PASCAL:
        return Row("GPU", found)
    found += f" (kernels through PTX for {_dotted(PASCAL)})"
    if gpu.driver_cuda < PTX_CUDA:
        remedy = (
            f"To compile the kernels' PTX for this card takes a driver that runs CUDA {_dotted(PTX_CUDA)}: install "
            f"branch {PTX_BRANCH} or newer."
        )
        return Row("GPU", found, State.MISSING, remedy)
    return Row("GPU", found)


def check_memory(gpu: Gpu) -> Row:
    found = f"{gpu.total_memory / 1e9:.1f} GB, {gpu.free_memory / 1e9:.1f} GB free"
    if 2 * gpu.free_memory < gpu.total_memory:
        remedy = "Other programs hold more than half of it: close those that nvidia-smi lists."
        return Row("GPU memory", found, State.WARNING, remedy)
    return Row("GPU memory", found)


def check_cuda_bindings(version: str, driver: Driver | None, gpu: Gpu | None) -> Row:
    name, command = "cuda-bindings", install("cuda-bindings>=12.6,<13")
    if not version:
        return Row(name, "not installed", State.MISSING, f"Install it: {command}.")
    runs = (gpu and gpu.driver_cuda) or (driver and driver.cuda)
    major = _numbers(version)[0]
    if runs and major > runs[0]:
        remedy = f"The driver runs CUDA {_dotted(runs)}, these are for CUDA {major}: {command}."
        return Row(name, version, State.MISSING, remedy)
    if major > 12 and gpu and gpu.capability < TENSORRT_10_CAPABILITY:
        return Row(name, version, State.WARNING, f"CUDA {major} has dropped this card: {command}.")
    return Row(name, version)


def check_tensorrt(tensorrt: TensorRT, gpu: Gpu | None) -> Row:
    name, command = "TensorRT", _install_tensorrt(gpu)
    if not tensorrt.version:
        return Row(name, "not installed", State.MISSING, f"Install it: {command}.")
    version = _numbers(tensorrt.version)
    if version < (8, 6) or version >= (11,):
        remedy = f"The plugin is for TensorRT 8.6, 9.x and 10.x: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if version >= (10,) and gpu and gpu.capability < TENSORRT_10_CAPABILITY:
        remedy = f"TensorRT 10 refuses compute capability {_dotted(gpu.capability)}, 8.6.1 does not: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if version < (10,) and gpu and gpu.capability > TENSORRT_8_CAPABILITY:
        remedy = f"It does not know compute capability {_dotted(gpu.capability)}, TensorRT 10 does: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if tensorrt.problem:
        for library, (package, _) in cuda_libraries.PACKAGES.items():
            if library in tensorrt.problem:
                command = install(package)
        return Row(name, f"{tensorrt.version}, unusable", State.MISSING, f"{_sentence(tensorrt.problem)}: {command}.")
    return Row(name, tensorrt.version)


def check_numpy(version: str, tensorrt: TensorRT, gpu: Gpu | None) -> Row:
    if _major(tensorrt, gpu) < 10 and version and _numbers(version) >= (2,):
        remedy = "TensorRT 8.6's Python package was compiled for NumPy 1: pip install 'numpy<2' 'ml_dtypes<0.6'."
        return Row("NumPy", version, State.WARNING, remedy)
    return Row("NumPy", version or "not found by pip")


def check_libraries(problems: Mapping[str, str], tensorrt: TensorRT, gpu: Gpu | None) -> Iterator[Row]:
    """What TensorRT 8.6 needs of CUDA, by what `find_libraries` found when it loaded that."""
    for name, package in CUDA_PACKAGES.items():
        libraries = sorted(library for library, (owner, _) in cuda_libraries.PACKAGES.items() if owner == package)
        distribution = cuda_libraries.name(package)
        version = installed(distribution)
        failed = [problem for library in libraries if (problem := problems[library])]
        if not failed:
            yield Row(name, ", ".join(libraries) + (f" ({distribution} {version})" if version else ""))
        elif _major(tensorrt, gpu) >= 10:
            yield Row(name, f"{version or 'none'}; TensorRT 10 needs none")
        else:
            remedy = f"TensorRT 8.6 needs it ({failed[0]}): {install(package)}."
            yield Row(name, version or "none", State.MISSING, remedy)


def check_plugin(plugin: Plugin, tensorrt: TensorRT) -> Row:
    if plugin.library is None:
        return Row("plugin", "cannot be compiled", State.MISSING, _sentence(plugin.problem))
    if plugin.problem:
        remedy = f"{_sentence(plugin.problem)}: remove {plugin.library} and run this again."
        return Row("plugin", f"{plugin.library.name}, unusable", State.MISSING, remedy)
    if not tensorrt.usable:
        remedy = "It is compiled, but there is no TensorRT to try it in: install that first."
        return Row("plugin", plugin.library.name, State.WARNING, remedy)
    return Row("plugin", f"{plugin.library.name}; TensorRT finds {OP_NAME} {OP_VERSION} in it")


def check_compiler(path: str | None, plugin: Plugin) -> Row:
    if path:
        return Row("C++ compiler", path)
    if plugin.library:
        return Row("C++ compiler", "none; the plugin is compiled already")
    remedy = "The plugin is compiled with it, once: install g++, or set CXX."
    return Row("C++ compiler", "none", State.WARNING, remedy)


def check_nvrtc(version: str, plugin: Plugin) -> Row:
    if version:
        return Row("NVRTC", version)
    if plugin.library:
        return Row("NVRTC", "none; the plugin is compiled already")
    remedy = f"The plugin's kernels are compiled with it, once: pip install '{NVRTC_PACKAGE}'."
    return Row("NVRTC", "none", State.WARNING, remedy)


def check_onnxruntime(version: str) -> Row:
    if version:
        return Row("onnxruntime", f"{version}, the backend on the CPU")
    remedy = "It is what runs without TensorRT: pip install 'pascalvl[runtime]'."
    return Row("onnxruntime", "not installed", State.WARNING, remedy)


def check_engine(
    backend: Mapping[str, object],
    tensorrt: TensorRT,
    gpu: Gpu | None,
    driver: Driver | None,
    plugin: Plugin,
    onnxruntime: str,
) -> list[Row]:
    """What an engine bundle was built for, ``backend`` of its manifest, beside what is here."""
    name = str(backend.get("name"))
    if name != BACKEND:
        if name == "onnxruntime" and not onnxruntime:
            remedy = "Its backend is not installed: pip install 'pascalvl[runtime]'."
            return [Row("engine", f"for {name}", State.MISSING, remedy)]
        return [Row("engine", f"for {name}, which needs none of TensorRT and its plugin")]
    again = f"build it again here with --backend {BACKEND}"

    def compare(what: str, wanted: object, here: str, fits: bool) -> Row:
        if wanted is None:
            remedy = f"Its manifest does not say: {again}."
            return Row(f"engine's {what}", "unknown", State.WARNING, remedy)
        if not here:
            remedy = "There is nothing here to compare it with: see above."
            return Row(f"engine's {what}", str(wanted), State.WARNING, remedy)
        if fits:
            return Row(f"engine's {what}", str(wanted))
        return Row(f"engine's {what}", str(wanted), State.MISSING, f"Here it is {here}: {again}.")

    version, cuda, capability = (backend.get(key) for key in ("version", "cuda", "capability"))
    here = tensorrt.version
    rows = [compare("TensorRT", version, here, _numbers(str(version))[:3] == _numbers(here)[:3])]
    runs = (gpu and gpu.driver_cuda) or (driver and driver.cuda)
    rows.append(compare("CUDA", cuda, _dotted(runs) if runs else "", bool(runs) and _numbers(str(cuda))[:1] <= runs))
    here = _dotted(gpu.capability) if gpu else ""
    rows.append(compare("compute capability", capability, here, str(capability) == here))
    here = plugin_build.contract()
    rows.append(compare("contract", backend.get("contract"), here, backend.get("contract") == here))
    # The plugin of other sources runs what this one wrote as long as the contract is the same.
    here = plugin_build.source_hash(plugin.library) if plugin.library else "none"
    rows.append(Row("engine's plugin", f"sources {backend.get('plugin', 'unknown')}, here {here}"))
    return rows


def _install_tensorrt(gpu: Gpu | None) -> str:
    return INSTALL_10 if gpu and gpu.capability >= TENSORRT_10_CAPABILITY else INSTALL_TENSORRT_8


def _major(tensorrt: TensorRT, gpu: Gpu | None) -> int:
    """Of the TensorRT that is here and can stay, or of the one to install."""
    if gpu and gpu.capability < TENSORRT_10_CAPABILITY:
        return 8
    if tensorrt.version:
        return _numbers(tensorrt.version)[0]
    return 10 if gpu else 8


def _numbers(version: str) -> tuple[int, ...]:
    """``8.6.1.post1``: (8, 6, 1); (0,) if it begins with no number."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else (0,)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    """With a capital letter, unless it begins with the name of a file or package."""
    return text[0].upper() + text[1:] if re.match(r"[a-z]+ ", text) else text


# The other process ----------------------------------------------------------------------------------------------------


def _load(library: str | None) -> dict[str, str]:
    cuda_libraries.preload()
    try:
        import tensorrt
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return {"problem": f"it cannot be imported ({_one_line(str(error))})"}
    report = {"version": str(tensorrt.__version__)}
    if library is None:
        return report
    try:
        # Python's import keeps the library's symbols to itself; the plugin needs them.
        ctypes.CDLL(f"libnvinfer.so.{_numbers(report['version'])[0]}", mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library)
    except OSError as error:
        return {**report, "problem": f"it cannot be loaded ({_one_line(str(error))})"}
    if tensorrt.get_plugin_registry().get_plugin_creator(OP_NAME, OP_VERSION, "") is None:
        return {**report, "problem": f"TensorRT does not find {OP_NAME} {OP_VERSION} in it"}
    return report


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, whatever it holds
    print(json.dumps(_load(sys.argv[1] if len(sys.argv) > 1 else None)))
