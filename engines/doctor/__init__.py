"""What a machine has of what the tensorrt backend needs, and how to put right what it lacks.

Each ``check_*`` judges facts that it is given and returns a `Row`; `diagnose` gathers the facts of this machine.
"""

from __future__ import annotations

import os
import shutil
import sys

from pascalvl.engines.doctor.facts import (
    find_driver,
    find_libraries,
    find_plugin,
    find_tensorrt,
    find_usable_gpu,
    installed,
)
from pascalvl.engines.doctor.machine import (
    check_compiler,
    check_cuda_bindings,
    check_driver,
    check_gpu,
    check_memory,
    check_nvrtc,
    check_onnxruntime,
)
from pascalvl.engines.doctor.rows import Row, State
from pascalvl.engines.doctor.tensorrt import (
    check_engine,
    check_libraries,
    check_numpy,
    check_plugin,
    check_python,
    check_tensorrt,
)
from pascalvl.plugins.bundle import Manifest

__all__ = ["Row", "State", "diagnose"]


def diagnose(manifest: Manifest | None = None) -> list[Row]:
    """Check this machine, and whether it runs the engine bundle of ``manifest`` if that is given."""
    driver = find_driver()
    gpu, gpu_problem = find_usable_gpu()
    onnxruntime = installed("onnxruntime", "onnxruntime-gpu")
    tensorrt = find_tensorrt()
    plugin = find_plugin(tensorrt)
    rows = [
        check_python(sys.version_info[:3], tensorrt),
        check_driver(driver, gpu),
        check_gpu(gpu, gpu_problem),
        *([check_memory(gpu)] if gpu else []),
        check_cuda_bindings(installed("cuda-bindings"), driver, gpu),
        check_tensorrt(tensorrt, gpu),
        check_numpy(installed("numpy"), tensorrt, gpu),
        *check_libraries(find_libraries(), tensorrt, gpu),
        check_plugin(plugin, tensorrt),
        check_compiler(shutil.which(os.environ.get("CXX", "g++")), plugin),
        check_nvrtc(installed("nvidia-cuda-nvrtc-cu12"), plugin),
        check_onnxruntime(onnxruntime),
    ]
    if manifest:
        rows += check_engine(manifest.backend, tensorrt, gpu, driver, plugin, onnxruntime)
    return rows
