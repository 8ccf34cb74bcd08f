"""Serialised plugins whose bytes came to harm; `tests.plugins.kernels.test_sanitizers` fuzzes the kernels' C ABI."""

import subprocess
import sys
from pathlib import Path

from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.tensorrt import build as plugin_build
from tests.fuzz.harness import MOST_CASE_SECONDS

ROOT = Path(__file__).parents[2]


def test_serialised_plugins(tmp_path, fuzz_limits):
    plugin_build.build(tmp_path / "plugin.so", 10, target=Target.EMULATOR)
    command = [sys.executable, "-m", "tests.fuzz.blobs", str(tmp_path / "plugin.so"), *fuzz_limits]
    seconds = float(fuzz_limits[0]) + MOST_CASE_SECONDS
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-4000:]
    assert all(int(count) for count in result.stdout.split()), result.stdout
