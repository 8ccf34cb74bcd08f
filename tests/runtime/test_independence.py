"""A card's owner installs the runtime alone."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("torch", "onnx", "transformers", "polygraphy", "safetensors"):
    sys.modules[name] = None  # importing it raises
from pascalvl.runtime.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_runs_without_torch_onnx_and_transformers(nano_engine_bundle):
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        "run",
        str(nano_engine_bundle),
        "--prompt",
        "Hello!",
        "--max-new-tokens",
        "8",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_other_commands_say_what_to_install(nano_checkpoint, tmp_path):
    command = [sys.executable, "-c", SCRIPT, "export", str(nano_checkpoint), "--output", str(tmp_path / "model")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "is not installed: pip install 'pascalvl[export]'" in result.stderr
    assert "Traceback" not in result.stderr
