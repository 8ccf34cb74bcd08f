"""The kernels on the emulator, under sanitizers: every CUDA thread is a thread of the operating system there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.plugins.kernels import build as kernels_build
from tests.plugins.kernels.reference import PAIRS

SANITIZERS = {
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "libasan.so"),
    "thread": (("-fsanitize=thread",), "libtsan.so"),
}
THREADS = ("-DPASCALVL_EMULATOR_THREADS", "-g", "-O1")
ROOT = Path(__file__).parents[3]


def sweep(library: Path, sanitizer: str, every: int) -> subprocess.CompletedProcess:
    """Build the emulator's library with a sanitizer, and run small cases on it."""
    flags, runtime = SANITIZERS[sanitizer]
    kernels_build.build(library, kernels_build.Target.EMULATOR, (*THREADS, *flags))
    command = ["g++", f"-print-file-name={runtime}"]
    preload = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Python leaks by design, and NumPy's own threads are none of the sanitizer's business.
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.plugins.kernels.sweep", str(library), str(every)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("sanitizer", "every"), [("address", 1), ("thread", 3)])
def test_kernels_are_clean(tmp_path, sanitizer, every):
    result = sweep(tmp_path / "lib.so", sanitizer, every)
    assert result.returncode == 0, result.stderr[-4000:]


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
