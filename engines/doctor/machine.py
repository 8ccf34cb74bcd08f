"""Checks of what GPU backends have in common: driver, card, the kernels and what compiles them."""

from __future__ import annotations

from pascalvl.engines.device.gpu import PASCAL, Gpu, install
from pascalvl.engines.doctor.facts import Compiled, Driver
from pascalvl.engines.doctor.rows import Row, State, dotted, sentence
from pascalvl.plugins.kernels.build import NVRTC_PACKAGE

LAST_PASCAL_BRANCH = 580
"""The last branch of the driver that serves Pascal."""
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


def check_kernels(kernels: Compiled) -> Row:
    """The library that backends ``cuda`` and ``torch`` run on a GPU."""
    if kernels.problem:
        return Row("kernels", "unusable", State.MISSING, f"What is there cannot be used: {kernels.problem}")
    return Row("kernels", kernels.library.name if kernels.library else "compiled on first use, which takes two minutes")


def check_compiler(path: str | None, kernels: Compiled) -> Row:
    name = "C++ compiler"
    if path:
        return Row(name, path)
    if kernels.library:
        return Row(name, "none; the kernels are compiled already")
    return Row(name, "none", State.MISSING, "The kernels are compiled with it, once: install g++, or set CXX.")


def check_nvrtc(version: str, kernels: Compiled) -> Row:
    if version:
        return Row("NVRTC", version)
    if kernels.library:
        return Row("NVRTC", "none; the kernels are compiled already")
    remedy = f"The kernels are compiled with it, once: {install(NVRTC_PACKAGE)}."
    return Row("NVRTC", "none", State.MISSING, remedy)
