"""Builds the kernels' library: ``python -m pascalvl.plugins.kernels.build OUTPUT [--target emulator]``.

CUDA: NVRTC 12.9, the last compiler for SM61 (package nvidia-cuda-nvrtc-cu12), makes a cubin for sm_61 and PTX for
compute_61, which newer GPUs' drivers compile; g++ puts both into the library. Emulator: g++ compiles the same kernels
for the CPU. Neither needs a GPU or a CUDA toolkit.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import enum
import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.user_cache import cache_folder, locked, open_cache_folder, require_private

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(path.stem for path in FOLDER.glob("*.cu")))
"""Files of kernels; each becomes one CUDA module, as ``kernels.h`` lists them."""
ABI = tuple(FOLDER / f"{name}.cpp" for name in ("library", "attention", "linear"))
"""Files of the C ABI, which are the same for CUDA and the emulator."""
NVRTC_PACKAGE = "nvidia-cuda-nvrtc-cu12>=12.4,<13"
CXX_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-pthread")
PACKAGED = FOLDER.parent / "native"
"""Where a wheel has the libraries, compiled when it was made."""
_RESOURCES = "resources.json"
"""Beside the images: what `resources` tells."""


class Target(enum.Enum):
    """What runs the kernels; the value is the name on the command line."""

    CUDA = "cuda"
    EMULATOR = "emulator"


_LIBRARIES = {Target.CUDA: "libpascalvl.so", Target.EMULATOR: "libpascalvl_emulated.so"}


def build(output: Path, target: Target, flags: Sequence[str] = (), more: Sequence[Path] = ()) -> None:
    """Write the shared library ``output``: the kernels, compiled once for all libraries, and what comes to them.

    Args:
        output: the library's path; it appears there complete.
        target: what is to run the kernels.
        flags: further ones for g++, for ``more``.
        more: further C++ files of the library.

    Raises:
        UserError: g++ or NVRTC is missing, or they refuse the sources; or there is no room in the cache folder.
    """
    compile_library(output, [kernels_object(target), *more], flags)


def kernels_object(target: Target) -> Path:
    """The kernels and their C ABI as one object file, in the user's cache folder; for errors see `build`."""
    name = "kernels.o" if target is Target.CUDA else "kernels_emulated.o"
    return cached_file(name, source_files(), lambda output: _build_object(output, target))


def _build_object(output: Path, target: Target) -> None:
    own = FOLDER / "emulated.cpp" if target is Target.EMULATOR else FOLDER / "driver.cpp"
    images = [] if target is Target.EMULATOR else [kernel_images()]
    compile_library(output, [*ABI, own, *images], kind="-r")


def kernel_images() -> Path:
    """The kernels' cubins and PTX as one object file, in the user's cache folder; for errors see `build`."""
    return cached_file("images.o", source_files(), _build_images)


def _build_images(output: Path) -> None:
    compiler_command()  # told before the minute that NVRTC takes
    with tempfile.TemporaryDirectory() as work:
        images = _images(Path(work))
        taken = {kernel: dataclasses.asdict(resources) for kernel, resources in _resources().items()}
        (output.parent / _RESOURCES).write_text(json.dumps(taken), encoding="utf-8")
        compile_library(output, [images], kind="-r")


def compile_library(output: Path, sources: Sequence[Path], flags: Sequence[str] = (), kind: str = "-shared") -> None:
    """Compile C++ files and link objects to a shared library, or with ``kind`` -r to one object, which appears at
    ``output`` complete; for errors see `build`."""
    compiler = compiler_command()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_partial_prefix(output.name), dir=output.parent) as work:
        made = Path(work) / output.name
        files = [f"-I{FOLDER.parents[1]}", *map(str, sources), *["-ldl"] * (kind == "-shared"), "-o", str(made)]
        command = [*compiler, *CXX_FLAGS, kind, *flags, *files]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise UserError(f"{shlex.join(compiler)} failed to build {output.name} ({first_error(result.stderr)}).")
        made.chmod(0o755)  # whatever the umask: others must not be able to write it
        made.replace(output)


def _partial_prefix(name: str) -> str:
    """How the folder is called in which a library of this name is made."""
    return f".{name}.partial-"


def first_error(report: str) -> str:
    """The line of a compiler's report that says what is wrong; the whole is logged."""
    log.info("%s", report)
    lines = report.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it does not say why").strip()


def compiler_command() -> list[str]:
    """The C++ compiler's command, of one or more words; raises `UserError` where it is not there."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(compiler[0]):
        raise UserError(f"the C++ compiler {compiler[0]!r} was not found: install g++ or set CXX.")
    return compiler


def cached(target: Target) -> Path:
    """The library that the wheel has, or else in the user's cache folder, built on first use; see `cached_file`."""
    return cached_file(_LIBRARIES[target], source_files(), lambda library: build(library, target))


def find_cached(target: Target) -> Path | None:
    """The library that `cached` gives, if it is there already; raises `UserError` where others can write it."""
    if (packaged := PACKAGED / _LIBRARIES[target]).exists():
        return packaged
    library = cache_folder() / f"kernels-{source_hash(source_files())}" / _LIBRARIES[target]
    if not library.exists():
        return None
    for path in (cache_folder(), library.parent, library):
        require_private(path)
    return library


def source_files() -> list[Path]:
    """What the library depends on, this file among it: it holds the compilers' options."""
    return [*FOLDER.glob("*.c*"), *FOLDER.glob("*.h"), *(FOLDER.parent / "emulator").glob("*.h"), Path(__file__)]


def source_hash(sources: Sequence[Path]) -> str:
    """Of the names and contents of files, in any order."""
    digest = hashlib.sha256()
    for source in sorted(sources, key=lambda path: path.name):
        digest.update(source.name.encode() + b"\0" + hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:16]


def cached_file(name: str, sources: Sequence[Path], make: Callable[[Path], None]) -> Path:
    """The path of what ``make`` wrote for these sources: where a wheel has it, or in the user's cache folder.

    ``$XDG_CACHE_HOME`` (or ``~/.cache``) ``/pascalvl/kernels-<hash of the sources>/``. What compiles is not hashed, so
    that a file carried from another machine serves where NVRTC and g++ are missing. Of several processes that want
    it at once, one makes it and the others wait.

    Raises:
        UserError: see `build`; or there is no room; or others could have written there.
    """
    if (packaged := PACKAGED / name).exists():
        return packaged
    folder = f"kernels-{source_hash(sources)}"
    try:
        library = open_cache_folder(folder) / name
        if not library.exists():
            with locked(library.with_name(f".{name}.lock")):
                if not library.exists():  # nobody made it while this process waited
                    for partial in library.parent.glob(f"{_partial_prefix(name)}*"):  # of a process that was killed
                        shutil.rmtree(partial, ignore_errors=True)
                    log.info("Compiling %s; this takes about a minute, once.", library)
                    make(library)
        require_private(library)
    except OSError as error:
        raise UserError(
            f"{name} cannot be written to {cache_folder() / folder} ({error.strerror}): set XDG_CACHE_HOME to a folder "
            "with 20 MB free that can be written."
        ) from error
    return library


def _images(directory: Path) -> Path:
    """Compile all sources and write the assembler file that embeds them."""
    lines = [".section .rodata", '.section .note.GNU-stack,"",@progbits', ".section .rodata"]
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(compile_cuda, (FOLDER / f"{source}.cu" for source in SOURCES))
        for source, images in zip(SOURCES, compiled, strict=True):
            for kind, content in (("cubin", images.cubin), ("ptx", images.ptx)):
                image = directory / f"{source}.{kind}"
                image.write_bytes(content)
                symbol = f"pascalvl_{source}_{kind}"
                lines += [f".global {symbol}", ".balign 16", f"{symbol}:", f'.incbin "{image}"', ".byte 0"]
    assembler = directory / "images.S"
    assembler.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return assembler


def _nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia.cuda_nvrtc") if importlib.util.find_spec("nvidia") else None
    folders = [Path(folder) / "lib" for folder in (spec and spec.submodule_search_locations) or ()]
    found = [library for folder in folders for library in folder.glob("libnvrtc.so.12")]
    if not found:
        raise UserError(f"NVRTC 12, which compiles for SM61, was not found: pip install '{NVRTC_PACKAGE}'.")
    return ctypes.CDLL(str(found[0]))


@dataclasses.dataclass(frozen=True)
class Images:
    """What a CUDA source file was compiled to."""

    cubin: bytes
    """For sm_61."""
    ptx: bytes
    """For compute_61."""
    report: str
    """ptxas's, on registers, spills and shared memory."""


@functools.cache
def compile_cuda(path: Path) -> Images:
    """Compile a CUDA source file; raises `UserError` if NVRTC is missing or refuses it."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None)
    if created:
        raise UserError(f"NVRTC could not start (error {created}).")
    options = ["--std=c++17", f"--include-path={FOLDER.parents[1]}", "--extra-device-vectorization"]
    options += ["--gpu-architecture=sm_61", "--ptxas-options=-v"]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    report = _read(nvrtc, program, "ProgramLog").decode().rstrip("\0\n")
    try:
        if failed:
            raise UserError(f"NVRTC refused {path.name} ({first_error(report)}).")
        return Images(_read(nvrtc, program, "CUBIN"), _read(nvrtc, program, "PTX"), report)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


_FUNCTION = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
_ENTRY = re.compile(r"\.entry (?P<kernel>\w+)\(.*?\.maxntid (?P<threads>\d+).*?\n\{(?P<body>.*?)\n\}", re.DOTALL)
_MULTIPLY_ADD, _SHARED_LOAD = re.compile(r"\bfma\.rn\.f32|\bdp4a"), re.compile(r"\bld\.shared")
_FEW = 64  # multiply-adds: fewer are no inner loop of arithmetic


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a kernel takes of an SM61."""

    threads: int
    """Of a block."""
    registers: int
    """Of a thread."""
    spills: int
    """Bytes that a thread stores and loads for want of registers."""
    shared: int
    """Bytes of a block's shared memory."""
    multiply_adds_per_load: float | None
    """FFMA and DP4A for each load from shared memory in its inner loops; None: there is no loop of arithmetic."""


def resources() -> dict[str, Resources]:
    """What each kernel takes, by ptxas for sm_61 and, for its inner loops, by the PTX, which is unrolled already.

    As the compilers said when the kernels were compiled; for errors see `build`.
    """
    path = kernel_images().parent / _RESOURCES
    return {kernel: Resources(**taken) for kernel, taken in json.loads(path.read_text(encoding="utf-8")).items()}


def _resources() -> dict[str, Resources]:
    entries, found = {}, {}
    for source in SOURCES:
        images = compile_cuda(FOLDER / f"{source}.cu")
        for entry in _ENTRY.finditer(images.ptx.decode()):
            entries[entry["kernel"]] = int(entry["threads"]), _multiply_adds_per_load(entry["body"])
        for match in _FUNCTION.finditer(images.report):
            threads, multiply_adds_per_load = entries[match["kernel"]]
            found[match["kernel"]] = Resources(
                threads=threads,
                registers=int(match["registers"]),
                spills=int(match["stores"]) + int(match["loads"]),
                shared=int(match["shared"] or 0),
                multiply_adds_per_load=multiply_adds_per_load,
            )
    return found


def _multiply_adds_per_load(body: str) -> float | None:
    """Over the basic blocks that have at least half as many multiply-adds as the one with most."""
    blocks = re.split(r"\n\$L\w+:", body)
    counts = [(len(_MULTIPLY_ADD.findall(block)), len(_SHARED_LOAD.findall(block))) for block in blocks]
    most = max(multiply_adds for multiply_adds, _ in counts)
    inner = [(multiply_adds, loads) for multiply_adds, loads in counts if 2 * multiply_adds >= most]
    loads = sum(loads for _, loads in inner)
    return sum(multiply_adds for multiply_adds, _ in inner) / loads if most >= _FEW and loads else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="path of the library")
    parser.add_argument("--target", choices=[target.value for target in Target], default=Target.CUDA.value)
    options = parser.parse_args()
    try:
        build(options.output, Target(options.target))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
