"""The CUDA emulator computes what CUDA would, and its sanitizer builds find bugs planted in a kernel."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "emulator" / "reverse.cu"
SERIAL = "-DPASCALVL_EMULATOR_SERIAL"
SANITIZERS = {
    "address": (SERIAL, "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": (SERIAL, "-g", "-O1", "-fsanitize=thread"),
}


def run(tmp_path: Path, *flags: str) -> tuple[int, str]:
    """Compile the kernel and its check, run them; returns the exit code and what was printed."""
    program = tmp_path / "program"
    warnings = ("-Wall", "-Wextra", "-Werror")
    command = [
        "g++",
        "-std=c++17",
        *warnings,
        *flags,
        f"-I{ROOT}",
        "-x",
        "c++",
        str(SOURCE),
        "-pthread",
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize(
    "flags", [("-O2",), (SERIAL, "-O1"), *SANITIZERS.values()], ids=["parallel", "serial", *SANITIZERS]
)
def test_a_right_kernel_computes_and_is_clean(flags, tmp_path):
    assert run(tmp_path, *flags) == (0, "")


@pytest.mark.parametrize(
    ("bug", "flags", "told"),
    [
        ("OUT_OF_BOUNDS", (SERIAL, "-g", "-O1", "-fsanitize=address"), "AddressSanitizer: global-buffer-overflow"),
        ("OVERFLOW", SANITIZERS["address"], "runtime error: signed integer overflow"),
        ("MISSING_BARRIER", SANITIZERS["thread"], "ThreadSanitizer: data race"),
        ("UNWRITTEN", (SERIAL, "-O1"), "is nan, expected"),
        ("DIVERGENCE", ("-O2",), "waits at a"),
    ],
)
def test_a_planted_bug_is_found(bug, flags, told, tmp_path):
    code, output = run(tmp_path, *flags, f"-DPLANT_{bug}")
    assert code != 0
    assert told in output
