"""A request's tools: what is refused, what the model is shown, what grammars force, and earlier turns."""

import json
import re

import llguidance
import pytest
import tokenizers

from pascalvl.plugins.errors import UserError
from pascalvl.runtime.chat_template import ChatTemplate
from pascalvl.runtime.messages import normalised
from pascalvl.runtime.server.answer import AnswerParser, whole_message
from pascalvl.runtime.server.tools import ToolChoice, Tools, with_calls_for_template
from pascalvl.runtime.tokenizer import Tokenizer

LOOK = {
    "name": "look",
    "description": "Looks somewhere.",
    "parameters": {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/place"}, "times": {"type": "integer"}},
        "required": ["at"],
        "additionalProperties": False,
        "$defs": {"place": {"enum": ["sky", 'the "sea"']}},
    },
}
NOW = {"name": "now"}
TOOLS = [{"type": "function", "function": LOOK}, {"type": "function", "function": NOW}]
NAMED = {"type": "function", "function": {"name": "look"}}
SKY = '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call>'
SEA = '<tool_call>\n{"name": "look", "arguments": {"at": "the \\"sea\\"", "times": 3}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
NO_PLACE = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
LAND = '<tool_call>\n{"name": "look", "arguments": {"at": "land"}}\n</tool_call>'


def tool(**fields):
    return [{"type": "function", "function": {"name": "f", **fields}}]


def test_what_the_model_is_shown():
    strict = [{"type": "function", "function": {**LOOK, "strict": True, "x": None}}, TOOLS[1]]
    assert Tools.parse(strict).for_template == TOOLS
    assert Tools.parse(TOOLS, "none").for_template is None
    assert Tools.parse([]).for_template is None
    assert Tools.parse().for_template is None
    assert Tools.parse(None, "auto").for_template is None


def test_choices():
    assert Tools.parse(TOOLS).choice is ToolChoice.AUTO
    assert Tools.parse(None).choice is ToolChoice.NONE
    for choice in ("none", "auto", "required"):
        assert Tools.parse(TOOLS, choice).choice.value == choice
    named = Tools.parse(TOOLS, NAMED, False)
    assert (named.choice, named.name, named.in_parallel) == (ToolChoice.FUNCTION, "look", False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("look",), "tools: expected a list, found 'look'."),
        ((tool() * 2,), "tools: expected a name for each, found 'f' twice."),
        ((tool() * 129,), "tools: expected at most 128, found 129."),
        (([NOW],), 'tools[0]: expected {"type": "function", "function": {...}}, found {\'name\': \'now\'}.'),
        (([{**TOOLS[0], "id": 1}],), "tools[0]: expected type and function, found the field 'id'."),
        ((tool(returns={}),), "tools[0].function: expected name, description, parameters, strict, found the field"),
        ((tool(name="a b"),), "tools[0].function.name: expected 1 to 64 letters, digits, - and _, found 'a b'."),
        ((tool(name="f\n"),), "tools[0].function.name: expected"),
        ((tool(name=None),), "tools[0].function.name: expected 1 to 64 letters, digits, - and _, found None."),
        ((tool(description=["x"]),), "tools[0].function.description: expected a text, found ['x']."),
        ((tool(parameters={"type": "array"}),), "tools[0].function.parameters: expected a JSON schema of type object"),
        ((tool(parameters=[]),), "tools[0].function.parameters: expected a JSON schema of type object, found []."),
        ((tool(strict=1),), "tools[0].function.strict: expected true or false, found 1."),
        ((TOOLS, "look"), "tool_choice: expected none, auto, required or {"),
        ((TOOLS, {"type": "function", "function": {"name": "fly"}}), "one of the tools (look, now), found 'fly'."),
        ((TOOLS, {"type": "allowed_tools"}), "tool_choice: expected none, auto, required or {"),
        ((TOOLS, {"type": "function", "function": {"name": 3}}), "tool_choice: expected none, auto, required or {"),
        ((None, "required"), "tool_choice: expected tools with it, as it is required, found none."),
        ((None, NAMED), "one of the tools (none), found 'look'."),
        ((TOOLS, None, "no"), "parallel_tool_calls: expected true or false, found 'no'."),
    ],
)
def test_refusals(arguments, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        Tools.parse(*arguments)


@pytest.fixture(scope="module", params=["tags are text", "tags are tokens"])
def tokenizer(request, nano_checkpoint, tmp_path_factory):
    """Nano's, whose only tags that are tokens are those of thinking, or one with the tokens that Qwen3's has."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    own = tokenizers.Tokenizer.from_file(str(nano_checkpoint / "tokenizer.json"))
    if request.param == "tags are tokens":
        own.add_tokens([tokenizers.AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>")])
    own.save(str(path))
    return path


@pytest.fixture(scope="module")
def accepts(tokenizer):
    """Whether an answer is one that a grammar allows."""
    own = tokenizers.Tokenizer.from_file(str(tokenizer))
    eos = own.token_to_id("<|im_end|>")
    allowed = llguidance.LLTokenizer(own.to_str(), eos_token=eos)

    def accepts(grammar, text):
        matcher = llguidance.LLMatcher(allowed, grammar)
        assert not matcher.get_error(), matcher.get_error()
        ids = own.encode(text, add_special_tokens=False).ids
        return matcher.validate_tokens([*ids, eos]) == len(ids) + 1

    return accepts


CALLS = {
    "": "",
    "text": "Well.\nHm < tool.",
    "one": SKY,
    "two": f"{SEA}\n{TIME}",
    "text and one": f"Well.\n{SKY}",
    "another": TIME,
    "no place": NO_PLACE,
    "land": LAND,
    "unknown": SKY.replace("look", "fly"),
    "not closed": SKY.removesuffix("</tool_call>"),
    "text after": f"{SKY}\nDone.",
    "spaces": SKY.replace(": {", ":{"),
}


@pytest.mark.parametrize(
    ("tools", "choice", "in_parallel", "allowed"),
    [
        (TOOLS, "required", None, {"one", "two", "another"}),
        (TOOLS, "required", False, {"one", "another"}),
        (TOOLS, NAMED, None, {"one"}),
        (TOOLS, "auto", False, {"", "text", "one", "text and one", "another", "no place", "land"}),
        (
            [{"type": "function", "function": {**LOOK, "strict": True}}, TOOLS[1]],
            None,
            None,
            {"", "text", "one", "two", "text and one", "another"},
        ),
    ],
)
def test_what_grammars_allow(accepts, tokenizer, tools, choice, in_parallel, allowed):
    grammar = Tools.parse(tools, choice, in_parallel).grammar(Tokenizer(tokenizer))
    assert {name for name, text in CALLS.items() if accepts(grammar.text, text)} == allowed


def test_where_no_grammar_is_needed(tokenizer):
    for arguments in ((TOOLS,), (TOOLS, "none", False), (None, None, False), ([], "auto", False)):
        assert Tools.parse(*arguments).grammar(Tokenizer(tokenizer)) is None


TEMPLATE = """
{%- for message in messages -%}
    <|im_start|>{{ message.role + '\\n' }}
    {%- if message.reasoning_content %}{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}
    {{- message.content }}
    {%- for call in message.tool_calls %}
        {%- if message.content or not loop.first %}{{ '\\n' }}{% endif %}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}ARGUMENTS{{ '}\\n</tool_call>' }}
    {%- endfor -%}
    <|im_end|>{{ '\\n' }}
{%- endfor %}"""
"""As Qwen3-VL's Thinking models write answers of this turn, with what they make of arguments left open."""
QWENS = "{{ call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}"
OTHERS = "{{ call.function.arguments | tojson }}"


@pytest.fixture
def template(tmp_path):
    def template(arguments):
        (tmp_path / "template").write_text(TEMPLATE.replace("ARGUMENTS", arguments), encoding="utf-8")
        return ChatTemplate(tmp_path / "template")

    return template


@pytest.mark.parametrize("arguments", [QWENS, OTHERS])
@pytest.mark.parametrize(
    "text", [SKY, f"Well.\n{SEA}\n{TIME}", f"Well.\n\n{SKY}", f"<think>\nHm.\n\nHm.\n</think>\n\nWell.\n{SKY}", "Well."]
)
def test_an_answer_comes_back_as_it_was_written(template, text, arguments):
    """Of a follow-up question, all tokens up to the new ones are in the cache still."""
    parser = AnswerParser(calls=True)
    message = whole_message([*parser.push(text), *parser.finish()])
    given = json.loads(json.dumps([{"role": "user", "content": "?"}, message]))
    rendered = template(arguments).render(normalised(with_calls_for_template(given)))
    assert rendered == f"<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>\n"


@pytest.mark.parametrize(
    "arguments", ['{"a": 1,}', "", "[1]", '"a"', "NaN", '{"a": NaN}', '{"a": "\\ud800"}', "[" * 100_000, "é"]
)
def test_arguments_that_are_no_object_stay_as_they_are(arguments):
    (message,) = with_calls_for_template([called("0", arguments=arguments)])
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def called(*ids, arguments="{}"):
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": arguments}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(number, content="x"):
    return {"role": "tool", "tool_call_id": number, "content": content}


def test_results_are_in_the_order_of_calls():
    """Templates leave the ids out, so that the model would take one for the other."""
    user = {"role": "user", "content": "?"}
    parts = [{"type": "text", "text": "y"}]
    messages = [user, called("a", "b"), result("b"), result("a", parts), user, called("a"), result("a"), called("c")]
    expected = [user, result("a", parts), result("b"), user, result("a")]
    found = with_calls_for_template(messages)
    assert [message for message in found if message["role"] != "assistant"] == expected
    assert [message["role"] for message in found][1:5] == ["assistant", "tool", "tool", "user"]
    assert len(normalised(found)) == len(messages)
    assert messages[2] == result("b")


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (
            [result("a")],
            "messages[0].tool_call_id: expected that of a call in the assistant's message before, each once",
        ),
        ([called("a"), result("b")], "(a), found 'b'."),
        ([called("a"), result("a"), result("a")], "messages[2].tool_call_id: expected"),
        ([called("a"), {"role": "user", "content": "?"}, result("a")], "(none), found 'a'."),
        ([called("a"), {"role": "tool", "content": "x"}], "(a), found None."),
        ([called("a"), result([])], "(a), found []."),
        ([called("a", "a")], "messages[0].tool_calls: expected an id for each, found 'a' twice."),
        ([called("a", arguments={})], 'messages[0].tool_calls[0]: expected {"id": ..., "type": "function"'),
        ([called(3)], "messages[0].tool_calls[0]: expected"),
        (
            [{"role": "assistant", "tool_calls": {}}],
            "messages[0].tool_calls: expected a list of at most 128, found {}.",
        ),
        ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0]: expected"),
    ],
)
def test_turns_that_do_not_fit(messages, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        with_calls_for_template(messages)


def test_other_messages_are_left_alone():
    messages = [{"role": "system", "content": "x"}, "no message", {"role": "assistant", "content": "y"}]
    assert with_calls_for_template(messages) == messages
