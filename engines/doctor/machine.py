"""Checks of what GPU backends have in common: driver, card, cuda-bindings, what compiles; and of what needs no GPU."""

from __future__ import annotations

from pascalvl.engines.device.gpu import PASCAL, TENSORRT_10_CAPABILITY, Gpu, install
from pascalvl.engines.doctor.facts import Driver, Plugin
from pascalvl.engines.doctor.rows import Row, State, dotted, numbers, sentence
from pascalvl.plugins.kernels.build import NVRTC_PACKAGE

LAST_PASCAL_BRANCH = 580
FIRST_CUDA12_BRANCH = 525
PTX_CUDA, PTX_BRANCH = (12, 9), 575
"""The first driver that compiles the PTX of NVRTC 12.9, which GPUs other than SM61 run."""


def check_driver(driver: Driver | None, gpu: Gpu | None) -> Row:
    name = "NVIDIA driver"
    take = f"install branch {LAST_PASCAL_BRANCH}, the last that serves Pascal cards"
    if driver is None:
        if gpu:
            return Row(name, f"of unknown version, runs CUDA {dotted(gpu.driver_cuda)}")
        return Row(name, "none", State.MISSING, f"{sentence(take)}.")
    runs = driver.cuda or (gpu and gpu.driver_cuda)
    found = driver.version + (f", runs CUDA {dotted(runs)}" if runs else "")
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
        return Row("GPU", "none that CUDA can use", State.MISSING, sentence(problem))
    found = f"{gpu.name}, compute capability {dotted(gpu.capability)}"
    if gpu.capability < PASCAL:
        remedy = f"The kernels need compute capability {dotted(PASCAL)} or higher: use another card."
        return Row("GPU", found, State.MISSING, remedy)
    if gpu.capability == PASCAL:
        return Row("GPU", found)
    found += f" (kernels through PTX for {dotted(PASCAL)})"
    if gpu.driver_cuda < PTX_CUDA:
        remedy = (
            f"To compile the kernels' PTX for this card takes a driver that runs CUDA {dotted(PTX_CUDA)}: install "
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
    major = numbers(version)[0]
    if runs and major > runs[0]:
        remedy = f"The driver runs CUDA {dotted(runs)}, these are for CUDA {major}: {command}."
        return Row(name, version, State.MISSING, remedy)
    if major > 12 and gpu and gpu.capability < TENSORRT_10_CAPABILITY:
        return Row(name, version, State.WARNING, f"CUDA {major} has dropped this card: {command}.")
    return Row(name, version)


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
