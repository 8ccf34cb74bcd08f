"""Calls of tools in streamed answers: Qwen3's format to OpenAI's deltas, however the text is cut into pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pascalvl.runtime import FinishReason
from pascalvl.runtime.server.answer import AnswerParser, Delta, whole_message

LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HARD = st.sampled_from(['"', "\\", "{", "}", "[", "]", "\n", "</tool_call>", "<tool_call>", '\\"}', "\U0001f600", "é"])
STRINGS = st.lists(st.one_of(LETTERS, HARD), max_size=5).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(STRINGS, VALUES, max_size=4)
NAMES = st.from_regex(r"[a-zA-Z0-9_-]{1,20}", fullmatch=True)


def parsed(pieces, **options):
    """What the pieces of an answer become: the deltas, and the message without the random ids of calls."""
    parser = AnswerParser(**{"calls": True, **options})
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    message = whole_message(deltas)
    ids = [call.pop("id") for call in message.get("tool_calls", [])]
    assert all(number.startswith("call_") for number in ids)
    assert len(set(ids)) == len(ids)
    return deltas, message


def message_of(text, **options):
    """What an answer becomes, whole and character by character."""
    _, message = parsed([text], **options)
    assert parsed(list(text), **options)[1] == message
    return message


def calls_of(message):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]


def written(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@given(st.data(), STRINGS, st.lists(st.tuples(NAMES, OBJECTS), max_size=3), st.booleans(), st.sampled_from([None, 2]))
def test_random_calls_in_any_pieces(data, content, calls, ascii_only, indent):
    """Arguments are the text that the model wrote, to the character."""
    content = content.replace("<t", "t").rstrip()
    texts = [(name, json.dumps(arguments, ensure_ascii=ascii_only, indent=indent)) for name, arguments in calls]
    text = "\n".join([*([content] if content else []), *(written(*call) for call in texts)])
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    deltas, message = parsed(pieces)
    assert calls_of(message) == texts
    assert message["content"] == (content or (None if calls else ""))
    for delta in deltas:
        assert json.dumps(delta.fields(), ensure_ascii=False).encode()


@given(st.data())
def test_whatever_comes_is_the_same_in_any_pieces(data):
    """Parts of the format in any order, cut off anywhere: nothing raises, and what is not a call is content."""
    parts = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<", "{", "}", "[", '"', "\\", "\n", " ", "\x00"]
    parts += ['"name"', ":", '"f"', ",", '"arguments"', "{}", "null", '"{\\"a\\": 1}"', "x", "\\u00", "\\ud83d"]
    parts += [written("f", '{"a": [1, "b"]}'), '{"name": "f", "arguments": {"a']
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=25)))
    text = text[: data.draw(st.integers(0, len(text)))]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    thinks = data.draw(st.booleans())
    _, whole = parsed([text], thinks=thinks)
    assert parsed(pieces, thinks=thinks)[1] == whole
    if not whole.get("tool_calls") and "reasoning_content" not in whole and "<think>" not in text and not thinks:
        assert whole["content"] == text
    assert parsed([text], calls=False)[1]["content"] in text


def test_deltas_come_as_early_as_they_can():
    """Content at once but for what may be a tag; a call's name before its arguments; arguments as they come."""
    parser = AnswerParser(calls=True)
    expected = [
        ("Let", [{"content": "Let"}]),
        (" me <b>", [{"content": " me <b>"}]),
        (" <tool", []),
        ("_box>", [{"content": " <tool_box>"}]),
        ("\n<tool_call>", []),
        ('\n{"na', []),
        ('me": "look", "arg', []),
        ('uments": {"at', [("look", '{"at')]),
        ('": "s', [(None, '": "s')]),
        ('ky"}', [(None, 'ky"}')]),
        ("}\n</tool_", []),
        ('call>\n<tool_call>{"name": "now"}', [("now", "{}")]),
        ("</tool_call>\n", []),
    ]
    ids = []
    for piece, wanted in expected:
        found = [delta.fields() for delta in parser.push(piece)]
        for fields in found:
            for call in fields.pop("tool_calls", []):
                function = call.pop("function")
                if "name" in function:
                    assert call.pop("type") == "function"
                    ids.append(call.pop("id"))
                assert call == {"index": len(ids) - 1}
                fields["content"] = (function.get("name"), function["arguments"])
        assert [fields["content"] for fields in found] == [
            fields["content"] if isinstance(fields, dict) else fields for fields in wanted
        ], piece
    assert parser.finish() == []
    assert parser.finish_reason(FinishReason.STOP) == "tool_calls"
    assert parser.finish_reason(FinishReason.LENGTH) == "length"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ('{"arguments": {"a": {"b": "}"}}, "name": "f"}', '{"a": {"b": "}"}}'),
        ('  {  "name"  :  "f"  ,  "arguments"  :  { "a" : 1 }  }  ', '{ "a" : 1 }'),
        ('{"name": "f", "arguments": {}}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        (
            '{"name": "\\u0066", "id": [1, {"a": "]"}], "arguments": {"a": "\\u00e9\\ud83d"}, "x": -1.5e3}',
            '{"a": "\\u00e9\\ud83d"}',
        ),
        (
            r'{"name": "f", "arguments": "{\"a\": \"\\\"\\u00e9\u00e9\ud83d\ude00\"}"}',
            r'{"a": "\"\u00e9é\ud83d\ude00"}',
        ),
        ('{"name": "f", "arguments": {"a": "</tool_call>\\n<tool_call>"}}', '{"a": "</tool_call>\\n<tool_call>"}'),
        ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),  # without the brace that ends the call
    ],
)
def test_a_calls_arguments(text, arguments):
    assert isinstance(json.loads(arguments), dict)
    message = message_of(f"<tool_call>\n{text}\n</tool_call>\n{written('g', '{}')}")
    assert calls_of(message) == [("f", arguments), ("g", "{}")]
    assert message["content"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": "two\nlines"}', '{"a": "two\nlines"}'),
        ('{"a": 1,}', '{"a": 1,}'),
        ('{"a": [1}', '{"a": [1}'),
        ('{"a": "open}', '{"a": "open}}'),
        ("{a: <b>}", "{a: <b>}"),
    ],
)
def test_arguments_that_are_no_json_are_for_the_caller_to_find(arguments, expected):
    message = message_of(f"{written('f', arguments)}\n{written('g', '{}')}")
    assert calls_of(message) == [("f", expected), ("g", "{}")]
    assert message["content"] is None


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{'name': 'f'}\n</tool_call>",
        "<tool_call>\nlook(at=1)\n</tool_call>",
        '<tool_call>\n["f"]\n</tool_call>',
        '<tool_call>\n{"arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>\n{"name": 3, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": 12}\n</tool_call>',
        '<tool_call>\n{"name": "f", "arguments": "see below"}\n</tool_call>',
        '<tool_call>\n{"name": "f", bad}\n</tool_call>',
        "Use <tool_call> and </tool_call> for that.  ",
        '<tool_call>\n{"name": "f", "arg',  # cut off
        "<tool_call>\n",
        "<tool_ca",
        "a <",
        " \n ",
        "",
    ],
)
def test_what_is_no_call_is_content(text):
    assert message_of(text) == {"role": "assistant", "content": text}
    if text.endswith("</tool_call>"):  # nor does it hide the next
        message = message_of(f"{text}\n{written('g', '{}')}")
        assert message["content"] == text
        assert calls_of(message) == [("g", "{}")]


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('<tool_call>\n{"name": "f", "arguments": {"a": "b', None, ['{"a": "b']),
        (r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\u00', None, [r'{"a": "\u00']),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}', None, ['{"a": 1}']),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_', "\n</tool_", ['{"a": 1}']),
        (written("f", "{}") + " \n", None, ["{}"]),
        (written("f", "{}}"), "}\n</tool_call>", ["{}"]),
        (written("f", "{}") + "\nDone.", "\nDone.", ["{}"]),
        ("\n\n" + written("f", "{}"), None, ["{}"]),
        ("A.\n\n" + written("f", "{}") + "\n\n" + written("f", '{"a": 1}'), "A.\n", ["{}", '{"a": 1}']),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n' + written("f", "{}"), None, ["{}", "{}"]),
        ("<tool_call>\n<tool_call>" + written("f", "{}"), "<tool_call>\n<tool_call>", ["{}"]),
        ('<tool_call>{"name": "f", "arguments": {}, oops}</tool_call>', ", oops}</tool_call>", ["{}"]),
    ],
)
def test_what_is_around_a_call(text, content, arguments):
    message = message_of(text)
    assert message["content"] == content
    assert calls_of(message) == [("f", given) for given in arguments]


def test_without_tools_nothing_is_a_call():
    text = written("f", "{}")
    assert message_of(text, calls=False) == {"role": "assistant", "content": text}
    parser = AnswerParser()
    parser.push(text)
    assert parser.finish_reason(FinishReason.STOP) == "stop"


def test_calls_within_reasoning_are_reasoning():
    text = f"I could {written('f', '{}')}.\n</think>\n\nNow.\n{written('g', '{}')}"
    message = message_of(text, thinks=True)
    assert message["reasoning_content"] == f"I could {written('f', '{}')}."
    assert message["content"] == "Now."
    assert calls_of(message) == [("g", "{}")]


def test_long_answers_take_time_in_proportion():
    """Each character is looked at once: this takes a second, and minutes where heads of calls are read again."""
    text = '<tool_call>{"' * 20_000
    assert parsed([text])[1]["content"] == text
    arguments = json.dumps({"a": ["{" * 100] * 2000})
    deltas, message = parsed([written("f", arguments)])
    assert calls_of(message) == [("f", arguments)]
    assert len(deltas) == 1
    assert isinstance(deltas[0], Delta)
