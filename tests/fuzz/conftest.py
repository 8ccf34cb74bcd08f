"""The fixture of fuzzers; their options are in the folder above, where pytest reads options."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.harness import Fuzzer, fuzzer_of


@pytest.fixture
def fuzz(request) -> Fuzzer:
    return fuzzer_of(request.config)


@pytest.fixture
def colours():
    """Smooth pictures of some size, each another."""

    def picture(width: int, height: int, turn: int = 0) -> Image.Image:
        y, x = np.mgrid[:height, :width]
        waves = [128 + 100 * np.sin(x / 9 + channel + turn) * np.cos(y / 7) for channel in range(3)]
        return Image.fromarray(np.stack(waves, -1).astype(np.uint8))

    return picture


@pytest.fixture
def picture(colours, tmp_path) -> Path:
    """A picture's file."""
    colours(64, 48).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"
