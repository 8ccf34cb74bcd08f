"""The GPU that there is, as its driver tells."""

from __future__ import annotations

import ctypes
import dataclasses
import shlex

from pascalvl.engines.device import driver
from pascalvl.plugins.errors import UserError

PASCAL = (6, 1)
"""The compute capability that the kernels are for, and the lowest that they run on."""
TENSORRT_10_CAPABILITY = (7, 5)
"""The lowest that TensorRT 10 builds for."""
CUDNN, CUBLAS, CUDA_RUNTIME = "nvidia-cudnn-cu12==8.9.*", "nvidia-cublas-cu12", "nvidia-cuda-runtime-cu12"
TENSORRT_8 = (
    *("tensorrt==8.6.1.post1", "tensorrt_bindings==8.6.1", "tensorrt_libs==8.6.1"),
    *(CUDNN, CUBLAS, CUDA_RUNTIME, "numpy<2", "ml_dtypes<0.6"),
)
"""The last release that serves Pascal cards, for Python 3.8 to 3.11, and what it was made for."""


def install(*packages: str) -> str:
    """The command that installs packages."""
    return f"pip install {shlex.join(packages)}"


INSTALL_TENSORRT_8 = install("--extra-index-url", "https://pypi.nvidia.com", *TENSORRT_8)


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


def count_gpus() -> int:
    """How many GPUs this process may use; none without a driver. It takes no memory of them."""
    try:
        return driver.load().get("cuDeviceGetCount", ctypes.c_int)
    except UserError:
        return 0


def find_gpu() -> Gpu:
    """CUDA's current device; raises `UserError` where there is none that can be used."""
    context = driver.context()
    name = ctypes.create_string_buffer(256)
    context.driver.call("cuDeviceGetName", name, len(name), context.device)
    major, minor = (
        context.driver.get("cuDeviceGetAttribute", ctypes.c_int, attribute, context.device)
        for attribute in (driver.CAPABILITY_MAJOR, driver.CAPABILITY_MINOR)
    )
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    context.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    version = context.driver.get("cuDriverGetVersion", ctypes.c_int)
    return Gpu(
        name=name.value.decode(),
        capability=(major, minor),
        total_memory=total.value,
        free_memory=free.value,
        driver_cuda=(version // 1000, version % 1000 // 10),
    )
