"""Who imports what: the folders in one direction, the runtime without what only exports and builds need."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("plugins", "export", "engines", "runtime")
FILES = {
    file.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(file.read_text(encoding="utf-8"))
    for folder in FOLDERS
    for file in sorted((ROOT / folder).rglob("*.py"))
}
"""By path, without the suffix."""

OTHERS = {
    "plugins": {"numpy"},
    "plugins/bench": {"matplotlib", "torch"},
    "plugins/ops": {"torch"},
    "plugins/ops/flash_attention/drop_in": {"torch", "transformers"},
    "plugins/kernels/torch_calls": {"torch"},
    "plugins/packaging": {"setuptools"},
    "plugins/terminal": {"rich"},
    "export": {"matplotlib", "numpy", "onnx", "onnx_ir", "onnxscript", "rich", "safetensors", "tokenizers", "torch"}
    | {"transformers"},
    "export/hub": {"httpx2", "huggingface_hub"},
    "engines": {"google", "numpy", "onnx"},
    "engines/cuda": {"numpy", "onnx"},
    "engines/device": {"numpy"},
    "engines/doctor": set(),
    "engines/doctor/probe": {"tensorrt", "torch"},
    "engines/onnxruntime": {"numpy", "onnx", "onnxruntime"},
    "engines/reference": {"numpy", "onnx"},
    "engines/tensorrt": {"onnx", "polygraphy", "rich", "tensorrt"},
    "engines/torch": {"numpy", "onnx", "torch", "transformers"},
    "engines/validation": {"numpy", "polygraphy", "torch", "transformers"},
    "runtime": {"PIL", "av", "jinja2", "numpy", "rich", "tokenizers"},
    "runtime/grammar": {"llguidance", "numpy"},
    "runtime/server": {"PIL", "h11", "prometheus_client", "starlette", "uvicorn"},
    "runtime/cli": {"PIL", "matplotlib", "numpy", "rich", "shtab", "torch"},
}
"""Libraries, by the folder or file, of which the longest name counts."""
FIRST = {
    "plugins": {"plugins"},
    "export": {"export", "plugins"},
    "engines": {"engines", "plugins"},
    "engines/torch": {"engines", "export", "plugins"},
    "engines/validation": {"engines", "export", "plugins"},
    "runtime": {"runtime", "engines", "plugins"},
    "runtime/cli": {"runtime", "export", "engines", "plugins"},
}
"""The project's own folders, likewise; the command line has commands for all of them."""
BESIDE = {
    "cuda": set(),
    "doctor": {"tensorrt"},
    "onnxruntime": set(),
    "reference": {"tensorrt"},
    "tensorrt": set(),
    "torch": set(),
}
"""Other backends that a backend may use: the reference runs in TensorRT's runtime, and the doctor looks at TensorRT."""


def imported(path: str, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, in its functions too if ``everywhere``."""
    found = set()
    nodes = ast.walk(FILES[path]) if everywhere else FILES[path].body
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def rule(rules: dict[str, set[str]], path: str) -> set[str]:
    """That of a file."""
    return rules[max((name for name in rules if path == name or path.startswith(f"{name}/")), key=len)]


@pytest.mark.parametrize("path", FILES)
def test_imports(path):
    modules = {tuple(name.split(".")) for name in imported(path)}
    libraries = {name[0] for name in modules} - set(sys.stdlib_module_names) - {"pascalvl"}
    assert libraries <= rule(OTHERS, path)
    own = {name[1] for name in modules if name[0] == "pascalvl" and len(name) > 1}
    assert own <= rule(FIRST, path)
    folder, _, rest = path.partition("/")
    backends = {name[2] for name in modules if name[:2] == ("pascalvl", "engines") and len(name) > 2} & set(BESIDE)
    if folder == "engines" and "/" in rest:
        backend = rest.split("/")[0]
        assert backends <= BESIDE.get(backend, set()) | {backend}


def test_no_circles():
    """Among what modules import when they are imported."""
    graph = {}
    for path in FILES:
        names = {name.removeprefix("pascalvl.").replace(".", "/") for name in imported(path, everywhere=False)}
        graph[path] = {found for name in names for found in (name, f"{name}/__init__") if found in FILES} - {path}
    while free := {path for path, others in graph.items() if not others & graph.keys()}:
        graph = {path: others for path, others in graph.items() if path not in free}
    assert graph == {}
