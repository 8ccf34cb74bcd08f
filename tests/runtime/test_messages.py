"""Messages in every form become Hugging Face's own, and what is none is told in a sentence."""

from pathlib import Path

import pytest
from PIL import Image

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.messages import normalised, visual_parts, without_sources

CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}]
PICTURE = Image.new("RGB", (8, 8))


def user(part):
    return [{"role": "user", "content": [{"type": "text", "text": "x"}, part]}]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"type": "image", "image": PICTURE}, {"type": "image", "image": PICTURE}),
        ({"type": "image", "url": "data:,"}, {"type": "image", "image": "data:,"}),
        ({"type": "image", "path": "a.png", "note": 3}, {"type": "image", "image": "a.png", "note": 3}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "video", "path": Path("a.mp4")}, {"type": "video", "video": Path("a.mp4")}),
        ({"type": "video_url", "video_url": {"url": "file:///a"}}, {"type": "video", "video": "file:///a"}),
        ({"type": "text", "text": "y", "note": None}, {"type": "text", "text": "y", "note": None}),
    ],
)
def test_parts(part, expected):
    given = user(part)
    (message,) = normalised(given)
    assert message["content"][1] == expected
    assert given == user(part)  # untouched
    assert visual_parts([message]) == ([] if expected["type"] == "text" else [expected])
    assert normalised([message]) == [message]


def test_fields_that_are_none_and_names_of_reasoning():
    """As Hugging Face does."""
    (message,) = normalised([{"role": "assistant", "content": None, "tool_calls": CALLS, "refusal": None}])
    assert message == {"role": "assistant", "tool_calls": CALLS}
    assert normalised([{"role": "assistant", "tool_calls": CALLS}]) == [message]
    (message,) = normalised([{"role": "assistant", "content": "x", "reasoning": "y", "tool_calls": None}])
    assert message == {
        "role": "assistant",
        "content": "x",
        "reasoning": "y",
        "thinking": "y",
        "reasoning_content": "y",
    }


def test_templates_see_no_sources():
    messages = normalised([*user({"type": "image", "url": "data:" + "a" * 10**6}), {"role": "user", "content": "x"}])
    seen = without_sources(messages)
    assert seen[0]["content"][1] == {"type": "image", "image": "<str>"}
    assert seen[1:] == messages[1:]


LONG = "x" * 10**6


@pytest.mark.parametrize(
    ("messages", "phrase"),
    [
        ([], "at least one message, found []"),
        (None, "at least one message, found None"),
        (["hi"], "expected a message with a role"),
        ([{"role": "robot", "content": "hi"}], "role of system, user, assistant, tool, found 'robot'"),
        ([{"role": ["user"], "content": "hi"}], "found ['user']"),
        ([{"role": "user"}], "a text or a list of parts, found None"),
        ([{"role": "user", "content": None, "tool_calls": CALLS}], "a text or a list of parts, found None"),
        ([{"role": "assistant", "content": None}], "a text or a list of parts, found None"),
        ([{"role": "assistant", "tool_calls": []}], "a text or a list of parts, found None"),
        ([{"role": "user", "content": ["hi"]}], "found 'hi'"),
        (user({"type": "audio", "audio": "x"}), "found {'type': 'audio'"),
        (user({"type": "image"}), "with a field of that name"),
        (user({"type": "image", "image": "a.png", "url": "b.png"}), "with a field of that name"),
        (user({"type": "image_url"}), "found {'type': 'image_url'}"),
        (user({"type": "text", "text": None}), "found {'type': 'text', 'text': None}"),
        (user({"type": ["image"], "image": 3}), "found {'type': ['image']"),
        (LONG, "expected a message with a role of system, user, assistant, tool, found 'x'"),
        ({"role": LONG}, "at least one message, found {'role': 'xxx"),
        ([LONG], "found 'xxx"),
        ([{"role": LONG}], "found 'xxx"),
        ([{"role": "user", "content": {"text": LONG}}], "found {'text': 'xxx"),
        (user({"type": "text", "texts": LONG}), "found {'type': 'text', 'texts': 'xxx"),
        ([{"role": "user", "content": 10**5000}], "found a value of type int that is too long"),
    ],
)
def test_bad_messages(messages, phrase):
    with pytest.raises(UserError) as error:
        normalised(messages)
    assert phrase in str(error.value)
    assert len(str(error.value)) < 300
