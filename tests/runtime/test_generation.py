"""Generation configs, and stop strings in text that comes in pieces."""

import itertools
import json

import numpy as np
import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.generation import GenerationConfig, StopMatcher, TokenLogprobs
from pascalvl.runtime.sampling import SamplingParams


def _config(tmp_path, **data):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(data))
    return GenerationConfig.from_file(path)


def test_published_config(tmp_path):
    config = _config(
        tmp_path,
        bos_token_id=151643,
        pad_token_id=151643,
        do_sample=True,
        eos_token_id=[151645, 151643],
        top_p=0.8,
        top_k=20,
        temperature=0.7,
        repetition_penalty=1.05,
    )
    assert config.eos_token_ids == {151645, 151643}
    assert config.sampling == SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)
    assert config.max_new_tokens is None


def test_without_sampling_the_filters_are_off(tmp_path):
    config = _config(tmp_path, eos_token_id=3, temperature=0.7, top_k=20, max_new_tokens=9)
    assert config.eos_token_ids == {3}
    assert config.sampling == SamplingParams(temperature=0.0)
    assert config.max_new_tokens == 9


def test_defaults_of_sampling_are_hugging_faces(tmp_path):
    assert _config(tmp_path, eos_token_id=3, do_sample=True).sampling == SamplingParams(temperature=1.0, top_k=50)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "expected a JSON object .* found a list"),
        ("{}", "eos_token_id: expected token ids, found None"),
        ('{"eos_token_id": null}', "eos_token_id: expected"),
        ('{"eos_token_id": "2"}', "eos_token_id: expected"),
        ('{"eos_token_id": [1, true]}', "eos_token_id: expected"),
        ('{"eos_token_id": 1, "max_new_tokens": "many"}', "max_new_tokens: expected .* found 'many'"),
        ('{"eos_token_id": 1, "max_new_tokens": 0}', "max_new_tokens: expected"),
        ('{"eos_token_id": 1, "repetition_penalty": "much"}', "repetition_penalty is out of range"),
        ('{"eos_token_id": 1, "repetition_penalty": 1e-39}', "repetition_penalty is out of range"),
        ('{"eos_token_id": 1, "do_sample": true, "temperature": 1e-39}', "temperature is out of range"),
        ('{"eos_token_id": 1, "do_sample": true, "temperature": 1e39}', "temperature is out of range"),
        ('{"eos_token_id": 1, "do_sample": true, "top_k": "50"}', "top_k is out of range"),
        ('{"eos_token_id": 1, "do_sample": true, "top_p": NaN}', "top_p is out of range"),
    ],
)
def test_unusable_config(tmp_path, text, match):
    path = tmp_path / "generation_config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        GenerationConfig.from_file(path)


def test_absent_config(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json cannot be read"):
        GenerationConfig.from_file(tmp_path / "absent.json")


def _cuts(text):
    """Every way to cut a short text into pieces."""
    for bounds in itertools.product((False, True), repeat=len(text) - 1):
        pieces, piece = [], ""
        for character, cut in zip(text, (*bounds, True), strict=True):
            piece += character
            if cut:
                pieces.append(piece)
                piece = ""
        yield pieces


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xyz", ("yz", "xy"), ""),
        ("a\n\nb", ("\n\n",), "a"),
        ("ok 🙂🙂!", ("🙂🙂",), "ok "),
        ("almost EN", ("END",), "almost EN"),
        ("nothing", (), "nothing"),
        ("no stop", ("stop!", "q"), "no stop"),
        ("é…日本", ("日本",), "é…"),
        ("xbaaa", ("baaa", "aa"), "xb"),
        ("xbaaa", ("aa", "baa"), "x"),
    ],
)
def test_stop_strings_across_pieces(text, stop, expected):
    for pieces in _cuts(text):
        matcher = StopMatcher(stop)
        shown = []
        for piece in pieces:
            shown.append(matcher.push(piece))
            # What was let through never has to be taken back.
            assert expected.startswith("".join(shown))
        shown.append(matcher.flush())
        assert "".join(shown) == expected
        assert matcher.stopped == (expected != text)


def _until_stopped(text, stop):
    """By definition: the first character after which any stop string is complete; the longest of these is cut off."""
    for end in range(1, len(text) + 1):
        if complete := [s for s in stop if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete))]
    return text


def test_stop_strings_that_overlap():
    """Every text of up to 7 letters in every cut, with stop strings that lie in each other or begin in each other."""
    for stop in (("baaa", "aa"), ("aa", "baaa"), ("ab", "ba"), ("aab", "ab", "b"), ("abab", "ba"), ("bb", "abba")):
        for length in range(1, 8):
            for letters in itertools.product("ab", repeat=length):
                text = "".join(letters)
                expected = _until_stopped(text, stop)
                for pieces in _cuts(text):
                    matcher = StopMatcher(stop)
                    assert "".join([*map(matcher.push, pieces), matcher.flush()]) == expected


def test_only_a_possible_stop_string_is_held_back():
    matcher = StopMatcher(("<end>",))
    assert matcher.push("a < b") == "a < b"
    assert matcher.push(" <e") == " "
    assert matcher.push("x") == "<ex"


def test_nothing_follows_a_stop_string():
    matcher = StopMatcher(("!",))
    assert matcher.push("hi! there") == "hi"
    assert matcher.stopped
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_one_stop_string():
    matcher = StopMatcher("ab")
    assert matcher.push("b a ab") == "b a "
    assert matcher.stopped


def test_stop_strings_that_are_no_text():
    with pytest.raises(UserError, match=r"expected stop strings as a text or a list of texts, found \[3\]"):
        StopMatcher([3])
    with pytest.raises(UserError, match=r"found \[3, 'xxx.*…\.$") as error:
        StopMatcher([3, "x" * 10**6])
    assert len(str(error.value)) < 200


def test_empty_stop_string():
    with pytest.raises(UserError, match="stop string is empty"):
        StopMatcher(("a", ""))


def test_logprobs():
    logits = np.array([1.0, 3.0, 3.0, -np.inf, 2.0], np.float32)
    found = TokenLogprobs.of(logits, 4, 3)
    total = np.log(np.exp([1.0, 3.0, 3.0, 2.0]).sum())
    assert found.token_id == 4
    assert found.logprob == pytest.approx(2 - total)
    assert found.top == ((1, pytest.approx(3 - total)), (2, pytest.approx(3 - total)), (4, pytest.approx(2 - total)))
    assert TokenLogprobs.of(logits, 3, 0) == TokenLogprobs(3, -np.inf, ())
    assert len(TokenLogprobs.of(logits, 0, 20).top) == 5
