"""The kernels on the emulator, under sanitizers, which see every CUDA thread as a thread."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines.device.memory import available_target
from pascalvl.plugins.kernels import build as kernels_build
from pascalvl.plugins.kernels.build import Target
from tests.plugins.kernels.reference import PAIRS

SANITIZERS = {
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "libasan.so"),
    "thread": (("-fsanitize=thread",), "libtsan.so"),
}
SERIAL = ("-DPASCALVL_EMULATOR_SERIAL", "-g1", "-O0")
ROOT = Path(__file__).parents[3]
SECONDS = 600
"""After which a program hangs; it takes a tenth of that."""


def sweep(library: Path, sanitizer: str, every: int) -> subprocess.CompletedProcess:
    """Build the emulator's library with a sanitizer, and run small cases on it."""
    build(library, sanitizer)
    return run("plugins.kernels.sweep", library, sanitizer, every)


def build(library: Path, sanitizer: str) -> None:
    flags, _ = SANITIZERS[sanitizer]
    sources = [*kernels_build.ABI, kernels_build.FOLDER / "emulated.cpp"]
    kernels_build.compile_library(library, sources, (*SERIAL, *flags))


def run(program: str, library: Path, sanitizer: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a program of the tests on a library that was built with a sanitizer."""
    _, runtime = SANITIZERS[sanitizer]
    # Exceptions, with which the library refuses, are the sanitizer's business where libstdc++ is there from the start.
    commands = [["g++", f"-print-file-name={name}"] for name in (runtime, "libstdc++.so.6")]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() for command in commands]
    preload = " ".join(found)
    # Python leaks by design, and NumPy's own threads are none of the sanitizer's business.
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.{program}", str(library), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS
    )


@pytest.fixture(scope="module", params=SANITIZERS)
def sanitized(request, tmp_path_factory) -> tuple[str, Path]:
    """A sanitizer, and the library built with it."""
    library = tmp_path_factory.mktemp(request.param) / "lib.so"
    build(library, request.param)
    return request.param, library


@pytest.mark.parametrize(
    ("program", "arguments"), [("plugins.kernels.sweep", ()), ("plugins.kernels.made_up", ("emulator", 1))]
)
def test_kernels_are_clean(sanitized, program, arguments):
    """On inputs that mean something, and on made-up ones, which must not make a kernel run for long either."""
    sanitizer, library = sanitized
    every = {"address": 1, "thread": 3}[sanitizer]
    result = run(program, library, sanitizer, every, *arguments)
    assert result.returncode == 0, result.stderr[-4000:]


def test_sizes_of_any_int32_are_refused_or_right(sanitized):
    sanitizer, library = sanitized
    if sanitizer == "thread":
        pytest.skip("launches nothing: there is one thread")
    result = run("plugins.kernels.extremes", library, sanitizer)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.skipif(available_target() is not Target.CUDA, reason="needs a GPU")
def test_made_up_inputs_on_a_gpu():
    """compute-sanitizer can be run over the same command."""
    command = [sys.executable, "-m", "tests.plugins.kernels.made_up", kernels_build.cached(Target.CUDA), "1"]
    subprocess.run([*command, "cuda", "20"], cwd=ROOT, check=True, timeout=SECONDS)


def test_a_barrier_taken_out_of_prefill_is_missed(tmp_path, monkeypatch):
    for folder in ("kernels", "emulator"):
        shutil.copytree(kernels_build.FOLDER.parent / folder, tmp_path / "plugins" / folder)
    source = tmp_path / "plugins/kernels/prefill.cuh"
    text = source.read_text(encoding="utf-8")
    right = "put(buffer);\n      __syncthreads();"  # between a slice's arrival in shared memory and its use
    assert text.count(right) == 1
    source.write_text(text.replace(right, "put(buffer);"), encoding="utf-8")
    monkeypatch.setattr(kernels_build, "FOLDER", source.parent)
    result = sweep(tmp_path / "lib.so", "thread", len(PAIRS))
    assert result.returncode != 0
    assert "data race" in result.stderr
