"""Answers of a given form, calls of tools and reasoning, by the `openai` package and in the raw, on nano."""

import json
import re

import jsonschema
import openai
import pytest

ASKED = [{"role": "user", "content": "What is the code of lamp 3?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "lamp": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green", "blue"]},
        "is_on": {"type": "boolean"},
    },
    "required": ["lamp", "colour", "is_on"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "switch_lamp",
        "description": "Switches a lamp.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}, "on": {"type": "boolean"}},
            "required": ["number", "on"],
            "additionalProperties": False,
        },
    },
}


def response_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema, "strict": True}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema(client, stream):
    options = {"model": "nano", "messages": ASKED, "max_tokens": 80, "response_format": response_format(SCHEMA)}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **options))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        reason = chunks[-1].choices[0].finish_reason
    else:
        (choice,) = client.chat.completions.create(**options).choices
        text, reason = choice.message.content, choice.finish_reason
    assert reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object(client):
    completion = client.chat.completions.create(
        model="nano", messages=ASKED, max_tokens=60, response_format={"type": "json_object"}
    )
    (choice,) = completion.choices
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.finish_reason == "length"
        assert choice.message.content.startswith("{")


@pytest.mark.parametrize(
    ("fields", "accepts"),
    [
        ({"guided_regex": "[0-9]{3}-[a-f]{2}"}, lambda text: re.fullmatch("[0-9]{3}-[a-f]{2}", text)),
        ({"guided_choice": ["a lamp", 'no "lamp"']}, lambda text: text in ("a lamp", 'no "lamp"')),
        ({"guided_json": json.dumps(SCHEMA)}, lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None),
        ({"guided_grammar": 'start: ("a" | "b") ("," ("a" | "b"))~3'}, None),
        ({"guided_grammar": 'start: "a" "," ("b" | "c")'}, lambda text: text in ("a,b", "a,c")),
    ],
)
def test_other_forms(served, fields, accepts):
    """In both kinds of completions; what cannot be used is named."""
    status, chat = served.chat("Lamp?", max_tokens=80, **fields)
    body = {"prompt": "Lamp", "max_tokens": 80, "temperature": 0, **fields}
    other, completion, _ = served.ask("/v1/completions", body)
    if accepts is None:
        assert (status, other) == (400, 400)
        assert chat["error"]["param"] == "guided_grammar"
    else:
        assert (status, other) == (200, 200)
        assert accepts(chat["choices"][0]["message"]["content"])
        assert accepts(completion["choices"][0]["text"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": response_format({"type": "object", "minContains": 3})}, "response_format"),
        ({"response_format": response_format({"$ref": "#/nowhere"})}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"guided_regex": "("}, None),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, None),
        ({"tools": [TOOL], "guided_regex": "a"}, "guided_regex"),
        ({"tools": [{"type": "retrieval"}]}, None),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}}, None),
        ({"tool_choice": "required"}, None),
        ({"functions": []}, "functions"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"reasoning_budget": -1}, "reasoning_budget"),
        ({"chat_template_kwargs": {}}, "chat_template_kwargs"),
    ],
)
def test_what_cannot_be_used(served, fields, param):
    status, body = served.chat(**fields)
    assert status == 400, body
    error = body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")
    assert "\n" not in error["message"]
    if param:
        assert error["param"] == param


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "switch_lamp"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_required(client, choice, stream):
    """Its arguments are valid; streamed, they come in parts that join to them."""
    options = {"model": "nano", "messages": ASKED, "max_tokens": 120, "tools": [TOOL], "tool_choice": choice}
    options["parallel_tool_calls"] = False
    if not stream:
        (answer,) = client.chat.completions.create(**options).choices
        (call,) = answer.message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, answer.finish_reason
        assert answer.message.content is None
    else:
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **options)]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        assert [call.index for call in calls] == [0] * len(calls)
        assert len(calls) > 2
        name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
        assert calls[0].id
        assert not any(call.id for call in calls[1:])
        reason = chunks[-1].finish_reason
    assert (name, reason) == ("switch_lamp", "tool_calls")
    jsonschema.validate(json.loads(arguments), TOOL["function"]["parameters"])


def test_results_of_tools(client):
    """The model is told what it called and what came of it; forms of other APIs are refused."""
    call = {"id": "call_1", "type": "function", "function": {"name": "switch_lamp", "arguments": '{"number": 3}'}}
    turns = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "on"}
    known = client.chat.completions.create(model="nano", messages=[*turns, result], max_tokens=4, tools=[TOOL])
    plain = client.chat.completions.create(model="nano", messages=ASKED, max_tokens=4)
    assert known.usage.prompt_tokens > plain.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="tool_call_id"):
        client.chat.completions.create(model="nano", messages=[*turns, {**result, "tool_call_id": "call_2"}])
    with pytest.raises(openai.BadRequestError, match="is for messages of the role assistant"):
        client.chat.completions.create(model="nano", messages=[{**ASKED[0], "tool_calls": [call]}])


def test_tools_that_are_shown_and_not_called(client):
    (choice,) = client.chat.completions.create(
        model="nano", messages=ASKED, max_tokens=8, temperature=0, tools=[TOOL], tool_choice="none"
    ).choices
    (plain,) = client.chat.completions.create(model="nano", messages=ASKED, max_tokens=8, temperature=0).choices
    assert choice.message.content == plain.message.content
    assert choice.message.tool_calls is None


def test_many_choices_of_a_form(client):
    """Each has a matcher and a parser of its own."""
    completion = client.chat.completions.create(
        model="nano", messages=ASKED, max_tokens=80, n=3, temperature=1, seed=1, response_format=response_format(SCHEMA)
    )
    texts = [choice.message.content for choice in completion.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(texts) == 3
