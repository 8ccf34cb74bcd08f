"""The tokenizer equals Hugging Face's, and streams whole characters."""

import json
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.tokenizer import Tokenizer

TEXTS = [
    "",
    "What's up? 12 + 34 = 46.",
    "  spaces,\ttabs\r\nand\n\n\nlines  ",
    "naïve façade e\u0301 \u212b 你好 한국어 العربية",  # not all in normal form
    "🙂🚀 👨\u200d👩\u200d👧 \u0000 \ufffd.",
    "<|im_start|>user\nHi<|im_end|>\n<|vision_start|><|image_pad|><|vision_end|>",
    "<think>\n12.5 %\n</think> <|im_end <|image_pad|><|image_pad|>",
]


@pytest.fixture(scope="module")
def tokenizer(nano_checkpoint):
    return Tokenizer(nano_checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def reference(nano_checkpoint):
    return AutoTokenizer.from_pretrained(nano_checkpoint)


def random_ids(reference, count):
    rng = random.Random(count)
    return [rng.randrange(len(reference)) for _ in range(count)]


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_the_reference(tokenizer, reference, text):
    found = tokenizer.encode(text)
    assert found.dtype == np.int64
    assert found.tolist() == reference(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_equals_the_reference(tokenizer, reference, text):
    token_ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=True)


def test_decoding_leaves_special_tokens_out_and_others_in(tokenizer):
    assert tokenizer.decode(tokenizer.encode("<think>a</think>b<|im_end|>")) == "<think>a</think>b"


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_gives_the_same_text_in_whole_characters(tokenizer, text):
    token_ids = tokenizer.encode(text).tolist()
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in token_ids]
    assert "".join(pieces) == tokenizer.decode(token_ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("count", range(1, 60))
def test_streaming_any_tokens(tokenizer, reference, count):
    """Also bytes that are no text: of those at the end, which may yet become a character, nothing is let out."""
    token_ids = random_ids(reference, count)
    stream = tokenizer.stream()
    streamed, whole = "".join(map(stream.push, token_ids)), tokenizer.decode(token_ids)
    assert whole.startswith(streamed)
    assert not whole[len(streamed) :].strip("\ufffd")


def test_an_incomplete_character_is_held_back(tokenizer):
    *first, last = tokenizer.encode("🚀").tolist()
    assert len(first) > 1
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in first] == [""] * len(first)
    assert stream.push(last) == "🚀"


def test_streams_are_independent(tokenizer):
    begun, other = tokenizer.stream(), tokenizer.stream()
    begun.push(tokenizer.encode("🚀").tolist()[0])
    assert "".join(map(other.push, tokenizer.encode("plain").tolist())) == "plain"


def test_what_training_left_in_the_file(nano_checkpoint, tmp_path, tokenizer):
    """Hugging Face neither cuts off nor fills up, whatever the file says."""
    content = json.loads((nano_checkpoint / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"pad_id": 2000, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    content["padding"] = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None, **fill}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "One, two, three, four, five."
    assert Tokenizer(tmp_path / "tokenizer.json").encode(text).tolist() == tokenizer.encode(text).tolist()


def test_names_of_tokens(tokenizer, reference):
    assert tokenizer.token(reference.convert_tokens_to_ids("<|image_pad|>")) == "<|image_pad|>"
    with pytest.raises(UserError, match="the tokenizer has no token 999999"):
        tokenizer.token(999999)


def test_half_of_a_surrogate_pair(tokenizer):
    with pytest.raises(UserError, match=r"expected text in Unicode, found '\\ud83d'"):
        tokenizer.encode("a \ud83d")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b'{"version": "1.0"}', b"\xff\xfe", b"[]"])
def test_corrupt_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
