"""What may crash, TensorRT and the plugin in it, is tried here in a process of its own:
``python -m pascalvl.engines.doctor.probe [PLUGIN]``."""

from __future__ import annotations

import ctypes
import json
import sys

from pascalvl.engines.doctor.rows import numbers, one_line
from pascalvl.engines.tensorrt import cuda_libraries
from pascalvl.plugins.ops.flash_attention.op import OP_NAME, OP_VERSION


def _load(library: str | None) -> dict[str, str]:
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


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory, whatever it holds
    print(json.dumps(_load(sys.argv[1] if len(sys.argv) > 1 else None)))
