"""What this machine has."""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

from pascalvl.engines.device.gpu import Gpu, find_gpu
from pascalvl.engines.doctor.rows import numbers, one_line
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.tensorrt import build as plugin_build

_PROBE = "pascalvl.engines.doctor.probe"
PROBE_SECONDS = 300
"""TensorRT's libraries are gigabytes, which a slow disk takes its time to read."""


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
    except ImportError:
        return None, "cuda-bindings, which would tell, is not there: install it."
    except (UserError, MemoryError, RuntimeError) as error:
        return None, one_line(str(error))


def find_tensorrt() -> TensorRT:
    """What importing TensorRT gives."""
    version = installed("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-cu11")
    report = probe()
    if "version" in report:
        return TensorRT(report["version"])
    return TensorRT(version, report["problem"]) if version else TensorRT()


def find_plugin(tensorrt: TensorRT) -> Plugin:
    """The plugin's library for this TensorRT (8.6 if there is none), compiled if need be and tried in it."""
    major = 10 if tensorrt.version and numbers(tensorrt.version)[0] >= 10 else 8
    try:
        library = plugin_build.cached(major, Target.CUDA)
    except UserError as error:
        return Plugin(None, one_line(str(error)))
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
    return _ask(_PROBE, *([str(library)] if library else []))


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
