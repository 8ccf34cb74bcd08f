"""The kernels on the emulator, under sanitizers: every CUDA thread is a thread of the operating system there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.plugins.kernels.build import Target, build

THREADS = ("-DPASCALVL_EMULATOR_THREADS", "-g", "-O1")
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("flags", "runtime", "every"),
    [
        pytest.param(("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "libasan.so", 1, id="address"),
        pytest.param(("-fsanitize=thread",), "libtsan.so", 3, id="thread"),
    ],
)
def test_kernels_are_clean(tmp_path, flags, runtime, every):
    library = tmp_path / "libpascalvl_emulated.so"
    build(library, Target.EMULATOR, (*THREADS, *flags))
    command = ["g++", f"-print-file-name={runtime}"]
    preload = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    # Python leaks by design, and NumPy's own threads are none of the sanitizer's business.
    environment = os.environ | {"LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.plugins.kernels.sweep", str(library), str(every)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
