"""What this machine has."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pascalvl.engines.backends import AUTOMATIC, BACKENDS
from pascalvl.engines.device.gpu import Gpu, find_gpu
from pascalvl.engines.doctor.rows import numbers, one_line
from pascalvl.engines.engine import DeviceMemory
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target, compiler_command, find_cached
from pascalvl.plugins.tensorrt import build as plugin_build

_PROBE = "pascalvl.engines.doctor.probe"
PROBE_SECONDS = 300
"""TensorRT's libraries are gigabytes, which a slow disk takes its time to read."""
_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-cu11")
PACKAGES = (
    *("pascalvl", "numpy", "ml_dtypes", "pillow", "tokenizers", "av", "nvidia-cuda-nvrtc-cu12"),
    *("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "onnx", "onnxscript", "polygraphy", *_TENSORRT),
    *("nvidia-cudnn-cu12", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12"),
)
"""Those whose versions matter."""
_TORCH_CUDA = re.compile(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", re.MULTILINE)
_WANTED_CUDNN = re.compile(r"nvidia[-_]cudnn[-_]cu\d+\s*==\s*([\d.]+)")


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
        return numbers(self.version)[0]


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


@dataclasses.dataclass(frozen=True)
class Torch:
    """PyTorch, as its package and, if it is made for CUDA, PyTorch itself tell."""

    version: str = ""
    """Empty: not installed."""
    cuda: str = ""
    """The CUDA version that it was made for; empty: it is for the CPU."""
    cudnn: str = ""
    """The version that its package asks for; empty: none."""
    architectures: tuple[str, ...] = ()
    """What it has code for, such as ``sm_61``; empty: it does not tell, which it does where it sees a GPU."""
    gpu: str = ""
    """Name of the GPU that it sees; empty: it sees none."""
    problem: str = ""
    """Why it cannot be imported; empty: it can, or was not tried."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A library of kernels that is compiled once."""

    library: Path | None = None
    """None: it is not there yet."""
    problem: str = ""
    """Why what is there cannot be used."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """All that checks judge."""

    python: tuple[int, ...]
    packages: Mapping[str, str]
    """Versions of those of `PACKAGES` that are installed."""
    driver: Driver | None = None
    gpu: Gpu | None = None
    gpu_problem: str = ""
    """Why there is no GPU, a sentence."""
    compiler: str | None = None
    """Path of the C++ compiler."""
    kernels: Compiled = Compiled()
    """For CUDA."""
    emulator: Compiled = Compiled()
    torch: Torch = Torch()
    cudnn: str = ""
    """Version of the cuDNN 9 that can be loaded."""
    tensorrt: TensorRT = TensorRT()
    libraries: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What TensorRT 8.6 needs of CUDA: see `find_libraries`."""
    plugin: Plugin = Plugin()
    unavailable: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """By backend why it cannot be used, as `pascalvl.engines.backends.unavailable` says; empty: it can. Of those that
    `AUTO` never takes, only what matters here."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An engine bundle that is to run here."""

    directory: Path
    manifest: Manifest
    context: int
    """Tokens of prompt and answer together."""
    pinned: int
    """Slots of the KV cache for pictures that stay, beside its window."""

    @property
    def slots(self) -> int:
        """Of the KV cache, for that context."""
        return self.manifest.kv_cache.slots(self.context, self.pinned)

    @property
    def backend(self) -> str:
        return str(self.manifest.backend.get("name"))


def find_machine(backend: str | None = None) -> Machine:
    """Look at everything; what may crash, in processes of their own.

    Args:
        backend: a bundle's, which is asked for, too.
    """
    packages, torch = find_packages(), find_torch()
    gpu, gpu_problem = find_usable_gpu()
    tensorrt = find_tensorrt()
    asked = {*AUTOMATIC, backend, *(["torch"] if torch.gpu else [])}
    return Machine(
        python=sys.version_info[:3],
        packages=packages,
        driver=find_driver(),
        gpu=gpu,
        gpu_problem=gpu_problem,
        compiler=find_compiler(),
        kernels=find_compiled(Target.CUDA),
        emulator=find_compiled(Target.EMULATOR),
        torch=torch,
        cudnn=_ask(_PROBE, "cudnn").get("version", "") if "onnxruntime-gpu" in packages else "",
        tensorrt=tensorrt,
        libraries=find_libraries() if tensorrt.version else {},
        plugin=find_plugin(tensorrt) if tensorrt.version else Plugin(),
        unavailable={name: _unavailable(name) for name in BACKENDS if name in asked},
    )


def find_packages() -> dict[str, str]:
    """Versions of those of `PACKAGES` that are installed."""
    return {name: version for name in PACKAGES if (version := installed(name))}


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


def find_usable_gpu() -> tuple[Gpu | None, str]:
    """The GPU, or why there is none that can be used."""
    try:
        return find_gpu(), ""
    except (UserError, MemoryError, RuntimeError) as error:
        return None, one_line(str(error))


def find_compiler() -> str | None:
    """Path of the C++ compiler."""
    try:
        return shutil.which(compiler_command()[0])
    except UserError:
        return None


def find_compiled(target: Target) -> Compiled:
    """The kernels' library, if it was compiled before."""
    try:
        return Compiled(find_cached(target))
    except UserError as error:
        return Compiled(None, one_line(str(error)))


def find_torch() -> Torch:
    """PyTorch; it is asked itself only if it is made for CUDA."""
    try:
        package = importlib.metadata.distribution("torch")
    except importlib.metadata.PackageNotFoundError:
        return Torch()
    try:
        text = Path(str(package.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except OSError as error:
        return Torch(package.version, problem=f"its version.py cannot be read ({error.strerror})")
    match, wanted = _TORCH_CUDA.search(text), _WANTED_CUDNN.search("\n".join(package.requires or ()))
    if match is None:
        return Torch(package.version)
    report = _ask(_PROBE, "torch")
    return Torch(
        version=package.version,
        cuda=match[1],
        cudnn=wanted[1] if wanted else "",
        architectures=tuple(report.get("architectures", "").split()),
        gpu=report.get("gpu", ""),
        problem=report.get("problem", ""),
    )


def find_tensorrt() -> TensorRT:
    """What importing TensorRT gives."""
    version = installed(*_TENSORRT)
    report = probe_tensorrt()
    if "version" in report:
        return TensorRT(report["version"])
    return TensorRT(version, report["problem"]) if version else TensorRT()


def find_plugin(tensorrt: TensorRT) -> Plugin:
    """The plugin's library for this TensorRT, compiled if need be and tried in it."""
    major = 10 if numbers(tensorrt.version)[0] >= 10 else 8
    try:
        library = plugin_build.cached(major, Target.CUDA)
    except UserError as error:
        return Plugin(None, one_line(str(error)))
    except OSError as error:
        return Plugin(None, f"{error.filename or 'a file'} cannot be read or written ({error.strerror or error})")
    return Plugin(library, probe_tensorrt(library).get("problem", "") if tensorrt.usable else "")


def find_libraries() -> dict[str, str]:
    """Load what TensorRT 8.6 needs of CUDA; by library why that cannot be done, empty: it can."""
    report = _ask(cuda_libraries.__name__)
    return dict.fromkeys(cuda_libraries.PACKAGES, report["problem"]) if "problem" in report else report


def probe_tensorrt(library: Path | None = None) -> dict[str, str]:
    """Import TensorRT in a process of its own and look up the op of the plugin's ``library`` in its registry.

    Returns:
        TensorRT's ``version``, and the ``problem``, if any.
    """
    return _ask(_PROBE, "tensorrt", *([str(library)] if library else []))


def find_memory(bundle: Bundle) -> tuple[DeviceMemory | None, str]:
    """What a bundle will take of the GPU, compiling the kernels if need be; or None and why that is not known."""
    report = _ask(_PROBE, "memory", str(bundle.directory), str(bundle.slots), seconds=2 * PROBE_SECONDS)
    if "problem" in report:
        return None, report["problem"]
    return DeviceMemory(**report) if report else None, ""


def _unavailable(backend: str) -> str:
    report = _ask(_PROBE, "backend", backend)
    return one_line(report.get("problem", ""))


def _ask(module: str, *arguments: str, seconds: int = PROBE_SECONDS) -> dict[str, Any]:
    """What a module prints as JSON in a process of its own, or why it does not, as ``problem``."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"problem": f"it does not answer within {seconds} s"}
    if result.returncode:
        told = result.stderr.strip().splitlines()
        return {"problem": f"it ends Python with code {result.returncode}" + (f": {told[-1]}" if told else "")}
    return json.loads(result.stdout.splitlines()[-1])
