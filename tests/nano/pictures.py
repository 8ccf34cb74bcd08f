"""Writes the sample pictures and their questions: `python -m tests.nano.pictures`."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np

from tests.nano.scenes import Scene, draw, render, sample_scene
from tests.nano.tasks import QUESTIONS, describe

FOLDER = Path(__file__).parent / "pictures"
PICTURES = {
    "sample": ((384, 256), (2, 3)),
    "wide": ((360, 120), (1, 4)),
    "tall": ((150, 310), (3, 2)),
    "small": ((84, 84), (1, 2)),
    "square": ((250, 250), (3, 3)),
    "large": ((640, 480), (3, 4)),
}
"""Width and height in pixels, rows and columns: sizes that the processor keeps, rounds up or down, and shrinks."""


def quiet_seed(scene: Scene, first: int) -> int:
    """The first seed that draws the scene without pixel noise, so that its file stays small."""
    return next(seed for seed in itertools.count(first) if draw([scene], np.random.default_rng(seed)).noise[0] == 0)


def write(folder: Path = FOLDER) -> None:
    """Draws each picture from held-out layouts and writes pictures.json: files, sizes, questions and answers."""
    folder.mkdir(exist_ok=True)
    entries = []
    for name, ((width, height), (rows, cols)) in PICTURES.items():
        rng = random.Random(f"pictures {name}")
        scene = sample_scene(rng, rows, cols, held_out=True)
        picture = render(scene, width, height, quiet_seed(scene, rng.randrange(1000)))
        picture.save(folder / f"{name}.png", optimize=True)
        asked = {"Describe the picture.": describe(scene)}
        for kind in ("at", "count", "where", "row"):
            question, answer = QUESTIONS[kind][0](rng, scene, "")
            asked[question] = answer
        questions = [{"question": question, "answer": answer} for question, answer in asked.items()]
        entries.append({"file": f"{name}.png", "width": width, "height": height, "questions": questions})
    text = json.dumps(entries, indent=2) + "\n"
    (folder / "pictures.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
