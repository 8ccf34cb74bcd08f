"""Checks of what backend tensorrt needs, and of the bundles that were built for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pascalvl.engines.device.gpu import (
    CUBLAS,
    CUDA_RUNTIME,
    CUDNN,
    INSTALL_TENSORRT_8,
    TENSORRT_10_CAPABILITY,
    Gpu,
    install,
)
from pascalvl.engines.doctor.facts import Driver, Plugin, TensorRT
from pascalvl.engines.doctor.rows import Row, State, dotted, numbers, sentence
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION
from pascalvl.plugins.tensorrt import build as plugin_build

BACKEND = "tensorrt"
TENSORRT_8_CAPABILITY = (9, 0)
"""The highest that TensorRT 8.6 and 9.x know."""
INSTALL_10 = install("tensorrt-cu12>=10,<11")
CUDA_PACKAGES = {"CUDA runtime": CUDA_RUNTIME, "cuBLAS": CUBLAS, "cuDNN": CUDNN}
"""By row: the packages that have what TensorRT 8.6 needs of CUDA."""


def environment(tensorrt: TensorRT, gpu: Gpu | None) -> str:
    """What the environment must be like; empty: as for the other backends."""
    if _major(tensorrt, gpu) >= 10:
        return ""
    return "TensorRT 8.6 wants an environment of its own: Python 3.10 or 3.11, NumPy 1, cuDNN 8.9"


def check_python(version: tuple[int, ...], tensorrt: TensorRT, gpu: Gpu | None) -> Row:
    found = dotted(version)
    if version[:2] > (3, 11) and not tensorrt.version and _major(tensorrt, gpu) < 10:
        remedy = "TensorRT 8.6 has packages for Python 3.8 to 3.11: make the environment with Python 3.10 or 3.11."
        return Row("Python", found, State.WARNING, remedy)
    return Row("Python", found)


def check_tensorrt(tensorrt: TensorRT, gpu: Gpu | None) -> Row:
    name, command = "TensorRT", _install_tensorrt(gpu)
    if not tensorrt.version:
        return Row(name, "not installed", State.MISSING, f"Install it: {command}.")
    version = numbers(tensorrt.version)
    if version < (8, 6) or version >= (11,):
        remedy = f"The plugin is for TensorRT 8.6, 9.x and 10.x: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if version >= (10,) and gpu and gpu.capability < TENSORRT_10_CAPABILITY:
        remedy = f"TensorRT 10 refuses compute capability {dotted(gpu.capability)}, 8.6.1 does not: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if version < (10,) and gpu and gpu.capability > TENSORRT_8_CAPABILITY:
        remedy = f"It does not know compute capability {dotted(gpu.capability)}, TensorRT 10 does: {command}."
        return Row(name, tensorrt.version, State.MISSING, remedy)
    if tensorrt.problem:
        for library, (package, _) in cuda_libraries.PACKAGES.items():
            if library in tensorrt.problem:
                command = install(package)
        return Row(name, f"{tensorrt.version}, unusable", State.MISSING, f"{sentence(tensorrt.problem)}: {command}.")
    return Row(name, tensorrt.version)


def check_numpy(version: str, tensorrt: TensorRT, gpu: Gpu | None) -> Row:
    if _major(tensorrt, gpu) < 10 and version and numbers(version) >= (2,):
        remedy = "TensorRT 8.6's Python package was compiled for NumPy 1: pip install 'numpy<2' 'ml_dtypes<0.6'."
        return Row("NumPy", version, State.WARNING, remedy)
    return Row("NumPy", version or "not found by pip")


def check_libraries(
    problems: Mapping[str, str], packages: Mapping[str, str], tensorrt: TensorRT, gpu: Gpu | None
) -> Iterator[Row]:
    """What TensorRT 8.6 needs of CUDA, by what `find_libraries` found when it loaded that."""
    for name, package in CUDA_PACKAGES.items():
        libraries = sorted(library for library, (owner, _) in cuda_libraries.PACKAGES.items() if owner == package)
        distribution = cuda_libraries.name(package)
        version = packages.get(distribution, "")
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
        return Row("plugin", "cannot be compiled", State.MISSING, sentence(plugin.problem))
    if plugin.problem:
        remedy = f"{sentence(plugin.problem)}: remove {plugin.library} and run this again."
        return Row("plugin", f"{plugin.library.name}, unusable", State.MISSING, remedy)
    if not tensorrt.usable:
        remedy = "It is compiled, but there is no TensorRT to try it in: install that first."
        return Row("plugin", plugin.library.name, State.WARNING, remedy)
    return Row("plugin", f"{plugin.library.name}; TensorRT finds {OP_NAME} {OP_VERSION} in it")


def check_engine(
    backend: Mapping[str, object], tensorrt: TensorRT, gpu: Gpu | None, driver: Driver | None, plugin: Plugin
) -> list[Row]:
    """What an engine bundle was built for, ``backend`` of its manifest, beside what is here."""
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
    rows = [compare("TensorRT", version, here, numbers(str(version))[:3] == numbers(here)[:3])]
    runs = (gpu.driver_cuda if gpu else None) or (driver.cuda if driver else None) or ()
    rows.append(compare("CUDA", cuda, dotted(runs), bool(runs) and numbers(str(cuda))[:1] <= runs))
    here = dotted(gpu.capability) if gpu else ""
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
        return numbers(tensorrt.version)[0]
    return 10 if gpu else 8
