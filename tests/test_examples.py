"""The examples run as they are, on the nano checkpoint."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "tests/nano/pictures"


def example(name: str, *arguments: object) -> str:
    """What it prints."""
    command = [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_describe_picture(nano_engine_bundle):
    told = example("describe_picture", nano_engine_bundle, PICTURES / "sample.png")
    assert told.startswith("A 2 by 3 grid. Row 1: red diamond, purple square, empty.")


def test_conversation(nano_engine_bundle):
    """The second question finds the picture in the cache."""
    questions = "Describe the picture.", "How many squares are there?"
    told = example("conversation", nano_engine_bundle, PICTURES / "sample.png", *questions)
    first, second = (line for line in told.splitlines() if line.startswith("["))
    computed, prompt = (int(word) for word in first[1:].split() if word.isdigit())
    assert computed == prompt
    computed, prompt = (int(word) for word in second[1:].split() if word.isdigit())
    assert computed < 30 < prompt


def test_sort_pictures(nano_engine_bundle):
    pictures = [PICTURES / f"{name}.png" for name in ("sample", "small", "wide")]
    told = example("sort_pictures", nano_engine_bundle, "Is there a red diamond?", *pictures).splitlines()
    probabilities = [float(line.split()[0]) for line in told]
    assert probabilities == sorted(probabilities, reverse=True)
    assert {line.split()[1] for line in told} == {str(picture) for picture in pictures}


def test_build_bundle(nano_checkpoint, tmp_path):
    folder = tmp_path / "engine"
    told = example("build_bundle", nano_checkpoint, tmp_path / "model", folder)
    assert f"{folder}: checkpoint for backend onnxruntime, weights w8" in told
    assert example("describe_picture", folder, PICTURES / "sample.png").startswith("A 2 by 3 grid.")


def test_every_example_is_tested():
    assert all(f"test_{file.stem}" in globals() for file in (ROOT / "examples").glob("*.py"))
