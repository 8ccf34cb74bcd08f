"""What the README says of the server can be done as it says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines.torch_reference import scene
from tests.runtime.server.served import serving

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## A server\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture(scope="module")
def served(nano_engine_bundle):
    with serving(nano_engine_bundle) as server:
        yield server


def examples(kind, beginning):
    found = [text for language, text in BLOCKS if language == kind and text.startswith(beginning)]
    assert found
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served):
    for command in examples("", "curl"):
        command = command.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}").replace(
            "curl", "curl -sS --fail-with-body", 1
        )
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert '"finish_reason":"stop"' in result.stdout
        assert result.stdout.endswith("data: [DONE]\n\n")


def test_python(served, tmp_path):
    scene(1, 96, 64).convert("RGB").save(tmp_path / "photo.jpg")
    for script in examples("python", "import base64"):
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}")
        result = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        assert len(result.stdout) > 5
