"""What may crash, and what would stay in memory, is tried here in a process of its own, which prints JSON.

``python -m pascalvl.engines.doctor.probe WHAT [ARGUMENT...]``, where WHAT is one of `PROBES`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

from pascalvl.engines.backends import device_memory, unavailable
from pascalvl.engines.doctor.rows import numbers, one_line
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION

_CUDNN = "libcudnn.so.9"


def tensorrt(library: str | None = None) -> dict[str, str]:
    """Import TensorRT; look up the op of the plugin's ``library`` in its registry."""
    cuda_libraries.preload()
    try:
        import tensorrt
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return {"problem": f"it cannot be imported ({one_line(str(error))})"}
    report = {"version": str(tensorrt.__version__)}
    if library is None:
        return report
    try:
        # Python's import keeps the library's symbols to itself; the plugin needs them.
        ctypes.CDLL(f"libnvinfer.so.{numbers(report['version'])[0]}", mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(library)
    except OSError as error:
        return {**report, "problem": f"it cannot be loaded ({one_line(str(error))})"}
    if tensorrt.get_plugin_registry().get_plugin_creator(OP_NAME, OP_VERSION, "") is None:
        return {**report, "problem": f"TensorRT does not find {OP_NAME} {OP_VERSION} in it"}
    return report


def torch() -> dict[str, str]:
    """What PyTorch has code for, and the GPU that it sees."""
    try:
        import torch
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        return {"problem": f"it cannot be imported ({one_line(str(error))})"}
    if not torch.cuda.is_available():
        return {}
    return {"architectures": " ".join(torch.cuda.get_arch_list()), "gpu": torch.cuda.get_device_name()}


def cudnn() -> dict[str, str]:
    """The version of the cuDNN 9 that a package has, or else the system's loader finds."""
    try:
        package = importlib.metadata.distribution("nvidia-cudnn-cu12")
        path = Path(str(package.locate_file(f"nvidia/cudnn/lib/{_CUDNN}")))
    except importlib.metadata.PackageNotFoundError:
        path = Path(_CUDNN)
    try:
        library = ctypes.CDLL(str(path if path.is_file() else _CUDNN))
    except OSError:
        return {}
    library.cudnnGetVersion.restype = ctypes.c_size_t
    version = library.cudnnGetVersion()
    return {"version": f"{version // 10000}.{version // 100 % 100}.{version % 100}"}


def backend(name: str) -> dict[str, str]:
    """Why a backend cannot be used here."""
    return {"problem": unavailable(name)}


def memory(directory: str, slots: str) -> dict[str, object]:
    """What an engine bundle will take of the GPU with so many slots in the cache."""
    bundle = Path(directory)
    try:
        found = device_memory(bundle, Manifest.read(bundle, "engine"), [int(slots)])
    except (UserError, MemoryError) as error:
        return {"problem": str(error) or "there is not enough memory"}
    return dataclasses.asdict(found[0]) if found else {}


PROBES = {probe.__name__: probe for probe in (tensorrt, torch, cudnn, backend, memory)}


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, whatever it holds
    print(json.dumps(PROBES[sys.argv[1]](*sys.argv[2:])))
