"""Writes a folder of held-out questions with their answers, as `pascalvl eval kv --data` takes it.

`python -m tests.nano.questions DIR [--calibration]`: pictures, several pictures, text, and facts to be recalled over
256 to 4,096 tokens (the checkpoint was trained up to 2,000). The other set, for `--calibrate`, has other seeds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tests import torchvision_for_cpu  # noqa: F401

# isort: split
from PIL import Image

from tests.nano.evaluate import make_prompts
from tests.nano.tasks import TASKS

EVALUATION = {"picture": 300, "pictures": 30, "text": 40}, {256: 12, 512: 8, 1024: 4, 2048: 2, 4096: 1}
CALIBRATION = {"picture": 60, "pictures": 10, "text": 20}, {256: 4, 1024: 2}
"""Questions by task, and facts to be recalled by how many tokens back they are."""

Question = tuple[str, list[Image.Image], str]


def questions(task: str, count: int, seed: int) -> Iterator[Question]:
    """Of one user message each: its text, pictures and answer."""
    some = (p for p in make_prompts(task, 4 * count, seed) if len(p.messages) == 1 and not p.videos)
    for prompt in itertools.islice(some, count):
        yield _text(prompt.messages[0]), prompt.images, prompt.expected


def recall(distance: int, count: int, seed: int) -> Iterator[Question]:
    found = 0
    for index in itertools.count():
        rng = random.Random(f"recall {distance} {seed} {index}")
        talk = TASKS["recall"].make(rng, [], True, length=distance + 40, distance=distance)
        messages, _, kind, expected = next(iter(talk.turns()))
        if len(messages) == 1 and kind != "fact":
            yield _text(messages[0]), [], expected
            found += 1
            if found == count:
                return


def _text(message: dict) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def write(directory: Path, calibration: bool = False, share: float = 1.0) -> None:
    """Write the folder; of ``share`` of the questions."""
    directory.mkdir(parents=True, exist_ok=True)
    tasks, distances = CALIBRATION if calibration else EVALUATION
    seed = 1000 if calibration else 0
    sources = [questions(task, max(1, round(share * count)), seed) for task, count in tasks.items()]
    sources += [recall(distance, max(1, round(share * count)), seed) for distance, count in distances.items()]
    lines, pictures = [], 0
    for text, images, answer in itertools.chain(*sources):
        names = []
        for image in images:
            names.append(f"{pictures:04d}.png")
            image.save(directory / names[-1])
            pictures += 1
        lines.append(json.dumps({"prompt": text, "images": names, "answer": answer}))
    (directory / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--calibration", action="store_true", help="the set to calibrate with")
    parser.add_argument("--share", type=float, default=1.0, help="of the questions, for a quick look")
    options = parser.parse_args()
    write(options.directory, options.calibration, options.share)


if __name__ == "__main__":
    main()
