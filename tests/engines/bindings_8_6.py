"""TensorRT 8.6.1's own Python bindings, without its libraries: ``python -m tests.engines.bindings_8_6 FOLDER``.

What the extension module is linked with is stood in for by libraries in FOLDER whose functions do nothing. Prints, as
JSON, the first line of what each member in `MEMBERS` says of itself, and what the backend makes of this version.
"""

import ctypes
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

MEMBERS = {
    "Builder": ["__init__", "create_network", "create_builder_config", "create_optimization_profile"],
    "IBuilderConfig": [
        *("add_optimization_profile", "clear_flag", "create_timing_cache", "get_timing_cache", "set_timing_cache"),
        *("max_aux_streams", "profiling_verbosity", "set_preview_feature", "set_tactic_sources"),
    ],
    "ICudaEngine": [
        *("device_memory_size", "create_execution_context_without_device_memory", "get_tensor_profile_shape"),
    ],
    "IExecutionContext": [
        *("device_memory", "execute_async_v3", "set_input_shape", "set_optimization_profile_async"),
        "set_tensor_address",
    ],
    "ILogger": ["__init__", "Severity"],
    "IOptimizationProfile": ["set_shape"],
    "IPluginRegistry": ["get_plugin_creator"],
    "ITimingCache": ["combine", "serialize"],
    "OnnxParser": ["__init__", "get_error", "num_errors", "parse_from_file"],
    "Runtime": ["__init__", "deserialize_cuda_engine"],
}
"""What the backend uses, and polygraphy for it, by class."""
LINKED = ("nvinfer", "nvinfer_plugin", "nvonnxparser", "nvparsers")


def stand_in(module: Path, folder: Path) -> None:
    """Load libraries under the names that ``module`` needs, with the functions that it does not bring itself."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listed.splitlines() if line.split()[0] == "U" and "@" not in line]
    own = [symbol for symbol in symbols if not symbol.startswith(("Py", "_Py"))]
    for name in LINKED:
        source = "".join(f"void {symbol}(void) {{}}\n" for symbol in own if name == LINKED[0])
        path = folder / f"lib{name}.so.8"
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{path.name}", "-x", "c", "-", "-o", path]
        subprocess.run(command, input=source, text=True, check=True)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def first_line(member: object) -> str:
    """Of its docstring, without the module's name; of a property its kind."""
    if isinstance(member, property):
        return "property" if member.fset is None else "writable"
    return (member.__doc__ or "").strip().split("\n")[0].replace("tensorrt_bindings.tensorrt.", "")


def main() -> None:
    package = Path(importlib.util.find_spec("tensorrt_bindings").origin).parent
    stand_in(package / "tensorrt.so", Path(sys.argv[1]))
    import tensorrt_bindings as trt

    sys.modules["tensorrt"] = trt
    from pascalvl.engines.device.gpu import Gpu
    from pascalvl.engines.tensorrt import backend as tensorrt_backend

    pascal, volta = (Gpu("", capability, 0, 0, (12, 0)) for capability in ((6, 1), (7, 0)))
    print(
        json.dumps(
            {
                "version": trt.__version__,
                "members": {c: {m: first_line(getattr(getattr(trt, c), m)) for m in ms} for c, ms in MEMBERS.items()},
                "names": dir(trt),
                "flags": list(trt.NetworkDefinitionCreationFlag.__members__),
                "severities": list(trt.ILogger.Severity.__members__),
                "tactics": list(trt.TacticSource.__members__),
                "default tactics": tensorrt_backend.default_tactic_sources(),
                "default features": [tensorrt_backend.default_preview_features(gpu) for gpu in (pascal, volta)],
                "logger": isinstance(tensorrt_backend._logger(), trt.ILogger),
                "monitor": hasattr(trt, "IProgressMonitor"),
            }
        )
    )


if __name__ == "__main__":
    main()
