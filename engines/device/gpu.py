"""The GPU that there is, as the CUDA runtime tells."""

from __future__ import annotations

import dataclasses
import os
import shlex

from pascalvl.plugins.errors import UserError

PASCAL = (6, 1)
"""The compute capability that the kernels are for, and the lowest that they run on."""
TENSORRT_10_CAPABILITY = (7, 5)
"""The lowest that TensorRT 10 builds for."""
CUDNN, CUBLAS, CUDA_RUNTIME = "nvidia-cudnn-cu12==8.9.*", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12"
TENSORRT_8 = (
    *("tensorrt==8.6.1.post1", "tensorrt_bindings==8.6.1", "tensorrt_libs==8.6.1"),
    *(CUDNN, CUBLAS, CUDA_RUNTIME, "cuda-bindings>=12.6,<13", "numpy<2", "ml_dtypes<0.6"),
)
"""The last release that serves Pascal cards, for Python 3.8 to 3.11, and what it was made for."""


def install(*packages: str) -> str:
    """The command that installs packages."""
    return f"pip install {shlex.join(packages)}"


INSTALL_TENSORRT_8 = install("--extra-index-url", "https://pypi.nvidia.com", *TENSORRT_8)
# Kernels are loaded when they are first run: less memory of a small card. Read when CUDA is initialised.
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a build and a run need to know of CUDA's current device; memory in bytes."""

    name: str
    capability: tuple[int, int]
    total_memory: int
    free_memory: int
    driver_cuda: tuple[int, int]
    """The newest CUDA version that the driver runs."""

    @property
    def sm(self) -> str:
        """For example ``sm_61``."""
        return "sm_{}{}".format(*self.capability)


def find_gpu() -> Gpu:
    """CUDA's current device; raises `UserError` where there is none that can be used."""
    from cuda.bindings import runtime

    _, version = check(runtime.cudaDriverGetVersion())
    if version == 0:
        raise UserError(
            "no NVIDIA driver was found (libcuda.so.1): install one; the last that serves Pascal cards is branch 580."
        )
    error, count = runtime.cudaGetDeviceCount()
    if error != runtime.cudaError_t.cudaSuccess or count == 0:
        reason = runtime.cudaGetErrorString(error)[1].decode() if count in (None, 0) and int(error) else "it sees none"
        raise UserError(
            f"no NVIDIA GPU can be used ({reason}): check nvidia-smi, and CUDA_VISIBLE_DEVICES if it is set."
        )
    _, device = check(runtime.cudaGetDevice())
    _, properties = check(runtime.cudaGetDeviceProperties(device))
    _, free, total = check(runtime.cudaMemGetInfo())
    return Gpu(
        name=properties.name.decode().rstrip("\0"),
        capability=(properties.major, properties.minor),
        total_memory=total,
        free_memory=free,
        driver_cuda=(version // 1000, version % 1000 // 10),
    )


def check(result: tuple) -> tuple:
    """A CUDA runtime call's result, if it did not fail; out of memory is `MemoryError`, all else `UserError`."""
    from cuda.bindings import runtime

    error = result[0]
    if error == runtime.cudaError_t.cudaSuccess:
        return result
    reason = runtime.cudaGetErrorString(error)[1].decode()
    if error == runtime.cudaError_t.cudaErrorMemoryAllocation:
        raise MemoryError("the GPU's memory")
    raise UserError(f"CUDA failed: {reason} ({error.name}); check nvidia-smi, and that no other program has the card.")
