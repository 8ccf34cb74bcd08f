"""Checks of PyTorch and ONNX Runtime: what of them still has code for Pascal, and what does not go together."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pascalvl.engines.device.gpu import PASCAL, Gpu, install
from pascalvl.engines.doctor.facts import Compiled, TensorRT, Torch
from pascalvl.engines.doctor.rows import Row, State, dotted, numbers, sentence

OLDEST_TORCH = "2.11"
"""What exports and backend ``torch`` need at least."""
LAST_TORCH, LAST_TORCH_OF_PYPI = "2.14.1", "2.7.1"
"""The last wheels with code for Pascal: of PyTorch's cu126 index, and of PyPI."""
LAST_CUDA_OF_TORCH = (12, 6)
"""PyTorch's wheels for newer CUDA have none."""
LAST_ONNXRUNTIME, LAST_ONNXRUNTIME_OF_PYTHON_310 = "1.26.0", "1.23.2"
"""The last onnxruntime-gpu with code for Pascal, and the last of them that has packages for Python 3.10."""
CUDNN_9_ONNXRUNTIME = (1, 19)
"""The first onnxruntime-gpu that loads cuDNN 9."""
FIRST_CUDNN_WITHOUT_PASCAL = (9, 11)
_VOLTA = (7, 0)
_TAKE_TORCH = f"take {OLDEST_TORCH} to {LAST_TORCH} from PyTorch's cu126 index"


def check_torch(torch: Torch, gpu: Gpu | None) -> Row:
    """Whether it computes on the card found, or would on a Pascal card if there is none."""
    card = gpu.capability if gpu else None
    name, here = "torch", State.MISSING if card else State.WARNING
    take = _TAKE_TORCH if _for_pascal(card) else "install one that is made for it"
    if not torch.version:
        remedy = f"Backend torch needs it, as exports do: {install('pascalvl[export,engines]')}"
        if _for_pascal(card):
            remedy += f", and for a Pascal card {_TAKE_TORCH}"
        return Row(name, "not installed", State.MISSING, f"{remedy}.")
    if torch.problem:
        return Row(name, f"{torch.version}, unusable", State.MISSING, f"{sentence(torch.problem)}: {take}.")
    if not torch.cuda:
        return Row(name, f"{torch.version}, for the CPU", here, f"It does not compute on a card: {take}.")
    found = f"{torch.version}, for CUDA {torch.cuda}"
    if torch.architectures:
        found += f", with code for {', '.join(torch.architectures)}"
    if not _has_code(torch, card or PASCAL):
        if _for_pascal(card):
            remedy = (
                f"It has no code for Pascal, and the last that have are {LAST_TORCH_OF_PYPI} of PyPI and {LAST_TORCH} "
                f"of PyTorch's cu126 index: {take}."
            )
        else:
            remedy = f"It has no code for compute capability {dotted(card or PASCAL)}: {take}."
        return Row(name, found, here, remedy)
    if card and not torch.gpu:
        return Row(name, found, State.MISSING, f"It sees no GPU, and CUDA does: {take}.")
    if numbers(torch.version) < numbers(OLDEST_TORCH):
        return Row(name, found, State.WARNING, f"PascalVL is made for {OLDEST_TORCH} or newer: {take}.")
    return Row(name, found)


def check_onnxruntime(packages: Mapping[str, str]) -> Row:
    """The backend on the CPU."""
    name, version, version_gpu = "onnxruntime", packages.get("onnxruntime"), packages.get("onnxruntime-gpu")
    if version and version_gpu:
        found = f"{version}, and onnxruntime-gpu {version_gpu} in its place"
        remedy = (
            f"Both are one module: pip uninstall onnxruntime onnxruntime-gpu, then {install('onnxruntime>=1.20,<2')}."
        )
        return Row(name, found, State.WARNING, remedy)
    if version or version_gpu:
        return Row(name, f"{version}, the backend on the CPU" if version else "as onnxruntime-gpu")
    remedy = f"It is what runs where there is no card: {install('onnxruntime>=1.20,<2')}."
    return Row(name, "not installed", State.MISSING, remedy)


def check_onnxruntime_gpu(version: str, python: tuple[int, ...], gpu: Gpu | None) -> Row:
    """``version``: of onnxruntime-gpu, which is installed."""
    here = State.MISSING if gpu else State.WARNING
    last = LAST_ONNXRUNTIME_OF_PYTHON_310 if python[:2] <= (3, 10) else LAST_ONNXRUNTIME
    if _for_pascal(gpu.capability if gpu else None) and numbers(version) > numbers(last):
        remedy = (
            f"The last with code for Pascal are {LAST_ONNXRUNTIME_OF_PYTHON_310} (Python 3.10) and {LAST_ONNXRUNTIME}: "
            f"{install(f'onnxruntime-gpu=={last}')}, or use backend cuda, which needs none."
        )
        return Row("onnxruntime-gpu", version, here, remedy)
    return Row("onnxruntime-gpu", version)


def check_cudnn(version: str, onnxruntime_gpu: str, gpu: Gpu | None) -> Row:
    """cuDNN 9, of which onnxruntime-gpu, which is installed, loads what it finds; ``version`` is empty if there is
    none."""
    name, for_pascal = "cuDNN 9", _for_pascal(gpu.capability if gpu else None)
    pin = f"nvidia-cudnn-cu12>=9,<{dotted(FIRST_CUDNN_WITHOUT_PASCAL) if for_pascal else 10}"
    if numbers(onnxruntime_gpu) < CUDNN_9_ONNXRUNTIME:
        first = dotted(CUDNN_9_ONNXRUNTIME)
        return Row(name, f"{version or 'none'}; onnxruntime-gpu before {first} needs cuDNN 8.9 instead")
    if not version:
        return Row(name, "none", State.MISSING, f"Package onnxruntime-gpu {onnxruntime_gpu} loads it: {install(pin)}.")
    if for_pascal and numbers(version) >= FIRST_CUDNN_WITHOUT_PASCAL:
        first = dotted(FIRST_CUDNN_WITHOUT_PASCAL)
        remedy = f"From {first} on it has no code for Pascal: {install(pin)}."
        return Row(name, version, State.MISSING if gpu else State.WARNING, remedy)
    return Row(name, version)


def check_environment(tensorrt: TensorRT, torch: Torch, onnxruntime_gpu: str) -> Row | None:
    """What wants another cuDNN than TensorRT 8.6 does; None if all can be in one environment."""
    if not tensorrt.version or numbers(tensorrt.version)[0] >= 10:
        return None
    others = []
    if onnxruntime_gpu and numbers(onnxruntime_gpu) >= CUDNN_9_ONNXRUNTIME:
        others.append(f"onnxruntime-gpu {onnxruntime_gpu}")
    if numbers(torch.cudnn)[0] >= 9:
        others.append(f"torch {torch.version}")
    if not others:
        return None
    remedy = (
        f"TensorRT {tensorrt.version} wants cuDNN 8.9 and {' and '.join(others)} cuDNN 9, of which an environment has "
        "one: make an environment for each."
    )
    return Row("environment", f"for TensorRT {tensorrt.version} and {' and '.join(others)}", State.WARNING, remedy)


def check_emulator(emulator: Compiled, compiler: str | None) -> Row:
    """What backends ``torch`` and ``reference`` run the kernels with where there is no GPU."""
    name = "emulator of the kernels"
    if emulator.problem:
        return Row(name, "unusable", State.MISSING, f"What is there cannot be used: {emulator.problem}")
    if emulator.library or compiler:
        return Row(name, emulator.library.name if emulator.library else "compiled on first use, in a minute")
    remedy = "The kernels are compiled for the CPU with a C++ compiler, once: install g++, or set CXX."
    return Row(name, "not compiled", State.MISSING, remedy)


def _for_pascal(capability: tuple[int, int] | None) -> bool:
    """Whether what has code for Pascal matters: for a card before Volta, and where there is none."""
    return capability is None or capability < _VOLTA


def _has_code(torch: Torch, capability: tuple[int, int]) -> bool:
    """By the architectures that it names: binaries run on their minor versions from theirs on, PTX on all that are
    newer. If it names none, by what is known of its wheels."""
    if not torch.architectures:
        newest = numbers(torch.cuda)[:2] <= LAST_CUDA_OF_TORCH and numbers(torch.version) <= numbers(LAST_TORCH)
        return newest or capability >= _VOLTA
    for architecture in torch.architectures:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)", architecture):
            made_for = int(match[2]), int(match[3])
            same = match[1] == "compute" or made_for[0] == capability[0]
            if same and made_for <= capability:
                return True
    return False
