"""Right answers, end to end: questions about the sample pictures, asked of the nano checkpoint's built engines."""

import json

import pytest
from PIL import Image

from pascalvl.runtime import SamplingParams, VisionLanguageModel
from tests.conftest import NANO

PICTURES = NANO / "pictures"
QUESTIONS = [
    pytest.param(entry["file"], turn["question"], turn["answer"], id=f"{entry['file']}: {turn['question']}")
    for entry in json.loads((PICTURES / "pictures.json").read_text(encoding="utf-8"))
    for turn in entry["questions"]
]


@pytest.fixture(scope="module")
def model(nano_engine_bundle):
    return VisionLanguageModel.open(nano_engine_bundle)


@pytest.mark.parametrize(("file", "question", "answer"), QUESTIONS)
def test_sample_picture_is_answered(model, file, question, answer):
    content = [{"type": "image", "image": Image.open(PICTURES / file)}, {"type": "text", "text": question}]
    pieces = model.generate([{"role": "user", "content": content}], SamplingParams(temperature=0))
    assert "".join(pieces) == answer
