"""Builds the TensorRT plugin: ``python -m pascalvl.plugins.tensorrt.build OUTPUT [--major 8] [--headers FOLDER]``.

One library a major version, for their plugin creators differ in memory: 8 serves TensorRT 8.6 and 9.x. The kernels are
inside. Without TensorRT's headers the project's own declarations serve (interface.h), which are the same in memory:
``--check-layout`` compares them with headers, for which those of CUDA are needed too.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pascalvl.plugins import kv_format
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import build as kernels_build
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import ROTATED_DIM, KVFormat
from pascalvl.plugins.ops.flash_attention import op as flash_attention
from pascalvl.plugins.ops.quant_linear import op as quant_linear

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / f"{name}.cpp" for name in ("flash_attention", "quant_linear"))
MAJORS = (8, 10)
_FACTS = [Path(inspect.getfile(module)) for module in (flash_attention, kv_format, quant_linear)]
_OPS = "FlashAttention2", "QuantLinear"
_SPACE = "pascalvl::{anonymous}::"
_CLASSES = {op: f"{_SPACE}{op}" for op in _OPS} | {f"Creator<{op}>": f"{_SPACE}Creator<{_SPACE}{op}>" for op in _OPS}
_STRUCTS = (
    *("PluginTensorDesc", "DynamicPluginTensorDesc", "DimsExprs", "PluginField", "PluginFieldCollection"),
    "IExprBuilder",
)


def build(output: Path, major: int, headers: Sequence[Path] = (), target: Target = Target.CUDA) -> None:
    """Write the plugin's library ``output`` for a major version of TensorRT.

    Args:
        output: the library's path; it appears there complete.
        major: one of `MAJORS`.
        headers: folders of TensorRT's and CUDA's headers; none: the project's own declarations.
        target: what is to run the kernels.

    Raises:
        UserError: g++ or NVRTC is missing, or they refuse the sources.
    """
    kernels_build.build(output, target, _flags(major, headers), SOURCES)


def build_packaged(folder: Path) -> None:
    """Write what a wheel has in `kernels_build.PACKAGED`: the kernels' library, and plugins that find it beside them.

    Raises:
        UserError: see `build`.
    """
    kernels = folder / "libpascalvl.so"
    sources = [*kernels_build.ABI, kernels_build.FOLDER / "driver.cpp", kernels_build.kernel_images()]
    kernels_build.compile_library(kernels, sources, ["-s", f"-Wl,-soname,{kernels.name}"])
    for major in MAJORS:
        flags = [*_flags(major, []), "-s", "-Wl,-rpath,$ORIGIN"]
        kernels_build.compile_library(folder / _name(major), [*SOURCES, kernels], flags)


def cached(major: int, target: Target) -> Path:
    """The library for the project's own declarations: the wheel's, or else in the user's cache folder, built there on
    first use."""
    name = _name(major, "_emulated" if target is Target.EMULATOR else "")
    return kernels_build.cached_file(name, _source_files(), lambda library: build(library, major, target=target))


def source_hash(library: Path) -> str:
    """Hash of the sources of a library that `cached` gave: equal where equal ones were compiled by other compilers."""
    if library.parent == kernels_build.PACKAGED:
        return kernels_build.source_hash(_source_files())
    return library.parent.name.rpartition("-")[2]  # as `cached_file` names its folder


def _name(major: int, emulated: str = "") -> str:
    return f"libpascalvl_plugin{major}{emulated}.so"


def _source_files() -> list[Path]:
    return [*kernels_build.source_files(), *FOLDER.glob("*.cpp"), *FOLDER.glob("*.h"), *_FACTS, Path(__file__)]


def contract() -> str:
    """What a plan and the plugins that run it must have in common, besides TensorRT: a text, equal where they fit."""
    ops = [f"{op.OP_NAME} {op.OP_VERSION} layout {op.SERIALISED_LAYOUT}" for op in (flash_attention, quant_linear)]
    return ", ".join([*ops, f"cache rows {kv_format.ROW_LAYOUT}"])


def _flags(major: int, headers: Sequence[Path]) -> list[str]:
    flags = [
        f"-DPASCALVL_{prefix}{name}={value if isinstance(value, int) else json.dumps(value)}"
        for prefix, op in (("", flash_attention), ("LINEAR_", quant_linear))
        for name, value in vars(op).items()
        if name.startswith(("OP_", "ATTR_")) or name == "SERIALISED_LAYOUT"
    ]
    formats = ",".join(f'{{"{f.value}",{int(f.rows[0])},{int(f.rows[1])}}}' for f in KVFormat)
    flags += [f"-DPASCALVL_KV_FORMATS={formats}", f"-DPASCALVL_ROTATED_DIM={ROTATED_DIM}"]
    flags.append(f"-DPASCALVL_TENSORRT_MAJOR={major}")
    if headers:
        # Newer headers call the one interface that all versions share deprecated.
        flags += ["-DPASCALVL_TENSORRT_HEADERS", "-Wno-deprecated-declarations", *(f"-isystem{f}" for f in headers)]
    return flags


def layout(major: int, headers: Sequence[Path] = ()) -> dict[str, list[str]]:
    """The virtual functions of the plugin's classes in order, and the sizes of the structs it is given."""
    with tempfile.TemporaryDirectory() as folder:
        dump, text = Path(folder) / "classes", ""
        for source in SOURCES:
            command = ["g++", "-std=c++17", "-c", *_flags(major, headers), f"-I{FOLDER.parents[1]}", str(source)]
            command += [f"-fdump-lang-class={dump}", "-o", f"{folder}/plugin.o"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise UserError(f"g++ refused {source.name} ({kernels_build.first_error(result.stderr)}).")
            text += dump.read_text(encoding="utf-8")
    found = {}
    for name, full in _CLASSES.items():
        table = next(re.finditer(rf"Vtable for {re.escape(full)}\n.*?\n\n", text, re.DOTALL))[0]
        found[name] = re.findall(r"(~?\w+)$", table.split("\n", 4)[4], re.MULTILINE)
    for name in _STRUCTS:
        found[name] = sorted(set(re.findall(rf"^Class nvinfer1::{name}\n   size=(\d+)", text, re.MULTILINE)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", help="path of the library")
    parser.add_argument("--major", type=int, choices=MAJORS, default=MAJORS[0], help="of TensorRT; 8 is for 9.x too")
    parser.add_argument("--headers", type=Path, action="append", default=[], help="folder of headers; can be repeated")
    parser.add_argument("--check-layout", action="store_true", help="only compare the declarations with the headers")
    options = parser.parse_args()
    if options.check_layout != (options.output is None) or (options.check_layout and not options.headers):
        parser.error("give either a library's path or --check-layout with --headers")
    try:
        if options.check_layout:
            own, theirs = layout(options.major), layout(options.major, options.headers)
            if own != theirs:
                different = ", ".join(name for name in own if own[name] != theirs[name])
                raise UserError(f"interface.h differs from these headers in {different}.")
            print(f"interface.h and the headers agree: {', '.join(own)}")
        else:
            build(options.output, options.major, options.headers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
