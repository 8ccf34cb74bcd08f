"""CUDA's libraries as NVIDIA's packages bring them, loaded before TensorRT 8.6 looks for them.

Its own package does not know where those lie. ``python -m pascalvl.engines.tensorrt.cuda_libraries`` prints, as JSON,
which cannot be loaded and why.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import sys
from pathlib import Path

from pascalvl.engines.device.gpu import CUBLAS, CUDA_RUNTIME, CUDNN

PACKAGES = {
    "libcudart.so.12": (CUDA_RUNTIME, "cuda_runtime"),
    "libcublasLt.so.12": (CUBLAS, "cublas"),
    "libcublas.so.12": (CUBLAS, "cublas"),
    "libcudnn.so.8": (CUDNN, "cudnn"),
}
"""What TensorRT 8.6 needs, in the order in which one needs the other: how pip is asked for the package that has
it, and its folder there."""


def preload() -> None:
    """Load those that packages have by their paths; for others the system's loader is asked when they are needed."""
    for library in PACKAGES:
        if path := _path(library):
            _problem(str(path))


def problems() -> dict[str, str]:
    """By library why it cannot be loaded, from its package or else by the system's loader; empty: it can."""
    return {library: _problem(str(_path(library) or library)) for library in PACKAGES}


def name(package: str) -> str:
    """Of a package, without the versions that pip is asked for."""
    return package.partition("=")[0]


def _path(library: str) -> Path | None:
    package, folder = PACKAGES[library]
    try:
        path = Path(str(importlib.metadata.distribution(name(package)).locate_file(f"nvidia/{folder}/lib/{library}")))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _problem(library: str) -> str:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return " ".join(str(error).split())
    return ""


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, whatever it holds
    print(json.dumps(problems()))
