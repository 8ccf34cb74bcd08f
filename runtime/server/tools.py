"""Tools that come with a request: checked, shown to the model, forced by a grammar, and called in earlier turns."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Sequence
from typing import Any

from pascalvl.plugins.errors import UserError, shown
from pascalvl.runtime.grammar import Grammar, schema_text
from pascalvl.runtime.json_schema import SchemaCheck
from pascalvl.runtime.messages import Message
from pascalvl.runtime.reasoning import tag_id
from pascalvl.runtime.server.tool_calls import CLOSE, OPEN
from pascalvl.runtime.tokenizer import Tokenizer

_MOST_TOOLS = 128
"""As OpenAI has it; of calls in a message, too."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FIELDS = ("name", "description", "parameters", "strict")
_ANYTHING = r"/(.|\n)*/"


class ToolChoice(enum.Enum):
    """Whether the model calls tools."""

    NONE = "none"
    """It is shown none."""
    AUTO = "auto"
    REQUIRED = "required"
    """At least one."""
    FUNCTION = "function"
    """One that the request names, once."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """A request's ``tools``, ``tool_choice`` and ``parallel_tool_calls``."""

    functions: tuple[dict[str, Any], ...] = ()
    """The ``function`` of each tool, without fields that are None."""
    choice: ToolChoice = ToolChoice.NONE
    name: str = ""
    """Of the function that is to be called, of `ToolChoice.FUNCTION`."""
    in_parallel: bool = True
    """Whether an answer may have more than one call."""

    @classmethod
    def parse(cls, tools: Any = None, tool_choice: Any = None, parallel_tool_calls: Any = None) -> Tools:
        """What a request's fields of these names say, None where it has none.

        Raises:
            UserError: one of another form than OpenAI's.
        """
        tools = [] if tools is None else tools
        if not isinstance(tools, list):
            raise UserError(f"tools: expected a list, found {shown(tools)}.")
        if len(tools) > _MOST_TOOLS:
            raise UserError(f"tools: expected at most {_MOST_TOOLS}, found {len(tools)}.")
        functions = tuple(_function(tool, f"tools[{i}]") for i, tool in enumerate(tools))
        names = [function["name"] for function in functions]
        if doubles := [name for name in names if names.count(name) > 1]:
            raise UserError(f"tools: expected a name for each, found {shown(doubles[0])} twice.")
        if parallel_tool_calls is not None and type(parallel_tool_calls) is not bool:
            raise UserError(f"parallel_tool_calls: expected true or false, found {shown(parallel_tool_calls)}.")
        choice, name = _choice(tool_choice, names)
        return cls(functions, choice, name, parallel_tool_calls is not False)

    @property
    def for_template(self) -> list[dict[str, Any]] | None:
        """What the chat template shows the model; None: no tools."""
        if self.choice is ToolChoice.NONE or not self.functions:
            return None
        # Whether the schema binds is not for the model, but for the grammar.
        shown_fields = [{k: v for k, v in function.items() if k != "strict"} for function in self.functions]
        return [{"type": "function", "function": function} for function in shown_fields]

    def grammar(self, tokenizer: Tokenizer) -> Grammar | None:
        """What the answer must be, after thinking; None: any answer will do.

        Calls that are required follow the schemas of their parameters. Where they are not, it is a tool that is
        ``strict`` that takes a grammar, or that there may be no more than one call.

        Args:
            tokenizer: tells which tags are tokens of their own, which llguidance does not take for text.

        Raises:
            UserError: a schema that an answer cannot be held to.
        """
        may = self.choice is ToolChoice.AUTO
        if self.for_template is None or (may and self.in_parallel and not any(f.get("strict") for f in self.functions)):
            return None
        called = [f for f in self.functions if self.choice is not ToolChoice.FUNCTION or f["name"] == self.name]
        line, tag, end = _quoted("\n"), _tag(OPEN, tokenizer), _tag(CLOSE, tokenizer)
        more = f"({line} {tag} call)*" if self.in_parallel and self.choice is not ToolChoice.FUNCTION else ""
        rules = [f"call: {line} ({' | '.join(f'call_{i}' for i in range(len(called)))}) {line} {end}"]
        if may:
            rules += [f"start: TEXT | before call {more}", _without("TEXT", OPEN), _up_to("before", OPEN, tokenizer)]
        else:
            rules.append(f"start: {tag} call {more}")
        schemas = SchemaCheck()
        for i, function in enumerate(called):
            head = f'{{"name": {json.dumps(function["name"])}, "arguments": '
            schema: dict[str, Any] = {"type": "object"}
            if not may or function.get("strict"):
                schema = {"properties": {}, **function.get("parameters", {}), **schema}
            rules += [
                f"call_{i}: {_quoted(head)} arguments_{i} {_quoted('}')}",
                f"arguments_{i}: %json {schema_text(schemas.checked(schema))}",
            ]
        return Grammar.own("\n".join(rules))


def _quoted(text: str) -> str:
    """As Lark has it."""
    return json.dumps(text)


def _tag(tag: str, tokenizer: Tokenizer) -> str:
    """A tag in a grammar: its token, where there is one."""
    return _quoted(tag) if tag_id(tag, tokenizer) is None else tag


def _up_to(name: str, tag: str, tokenizer: Tokenizer) -> str:
    """The rule of a name for text up to and with the first of a tag."""
    if tag_id(tag, tokenizer) is None:
        return f"{name}[suffix={_quoted(tag)}]: {_ANYTHING}"
    return f"{name}: {name.upper()} {tag}\n{_without(name.upper(), tag)}"


def _without(name: str, tag: str) -> str:
    """The terminal of a name for text in which a tag does not occur."""
    quoted = tag.replace("/", "\\/")
    return f"{name}: {_ANYTHING} & ~/(.|\\n)*{quoted}(.|\\n)*/"


def _function(tool: Any, where: str) -> dict[str, Any]:
    """What is to be called of a tool; raises `UserError` for another form than OpenAI's."""
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise UserError(f'{where}: expected {{"type": "function", "function": {{...}}}}, found {shown(tool)}.')
    if unknown := [name for name in tool if name not in ("type", "function")]:
        raise UserError(f"{where}: expected type and function, found the field {shown(unknown[0])}.")
    function = {key: value for key, value in tool["function"].items() if value is not None}
    if unknown := [name for name in function if name not in _FIELDS]:
        raise UserError(f"{where}.function: expected {', '.join(_FIELDS)}, found the field {shown(unknown[0])}.")
    name, parameters = function.get("name"), function.get("parameters", {})
    for field, expected, valid in (
        ("name", "1 to 64 letters, digits, - and _", isinstance(name, str) and bool(_NAME.fullmatch(name))),
        ("description", "a text", isinstance(function.get("description", ""), str)),
        (
            "parameters",
            "a JSON schema of type object",
            isinstance(parameters, dict) and parameters.get("type", "object") == "object",
        ),
        ("strict", "true or false", type(function.get("strict", False)) is bool),
    ):
        if not valid:
            raise UserError(f"{where}.function.{field}: expected {expected}, found {shown(function.get(field))}.")
    return function


def _choice(given: Any, names: Sequence[str]) -> tuple[ToolChoice, str]:
    """A request's ``tool_choice``, and the function that it names; raises `UserError` if it has another form."""
    if given is None:
        return (ToolChoice.AUTO if names else ToolChoice.NONE), ""
    by_name = [choice.value for choice in ToolChoice if choice is not ToolChoice.FUNCTION]
    name = ""
    if isinstance(given, str) and given in by_name:
        choice = ToolChoice(given)
    elif (
        isinstance(given, dict)
        and given.get("type") == "function"
        and isinstance(given.get("function"), dict)
        and isinstance(name := given["function"].get("name"), str)
    ):
        choice = ToolChoice.FUNCTION
        if name not in names:
            raise UserError(
                f"tool_choice: expected one of the tools ({', '.join(names) or 'none'}), found {shown(name)}."
            )
    else:
        raise UserError(
            f'tool_choice: expected {", ".join(by_name)} or {{"type": "function", "function": {{"name": ...}}}}, found '
            f"{shown(given)}."
        )
    if choice is ToolChoice.REQUIRED and not names:
        raise UserError("tool_choice: expected tools with it, as it is required, found none.")
    return choice, name


def with_calls_for_template(messages: Sequence[Message]) -> list[Message]:
    """Messages with earlier calls and their results as templates take them.

    The arguments of calls, of which OpenAI's API has the JSON text, become objects: some templates take nothing else.
    A text that is no object stays, as the model wrote it. Templates tell results by their order: they are put into that
    of the calls.

    Raises:
        UserError: calls of another form than OpenAI's, or results of calls that were not made.
    """
    given: list[Message] = []
    ids: list[str] = []
    results: dict[str, Message] = {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, dict) and message.get("role") == "tool":
            number = message.get("tool_call_id")
            if number not in ids or number in results:
                raise UserError(
                    f"{where}.tool_call_id: expected that of a call in the assistant's message before, each once "
                    f"({', '.join(ids) or 'none'}), found {shown(number)}."
                )
            results[number] = message
            continue
        given += [results[number] for number in ids if number in results]
        ids, results = [], {}
        if isinstance(message, dict) and message.get("role") == "assistant" and message.get("tool_calls") is not None:
            calls = message["tool_calls"]
            if not isinstance(calls, list) or len(calls) > _MOST_TOOLS:
                raise UserError(f"{where}.tool_calls: expected a list of at most {_MOST_TOOLS}, found {shown(calls)}.")
            message = {
                **message,
                "tool_calls": [_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)],
            }
            ids = [call["id"] for call in message["tool_calls"]]
            if doubles := [number for number in ids if ids.count(number) > 1]:
                raise UserError(f"{where}.tool_calls: expected an id for each, found {shown(doubles[0])} twice.")
        given.append(message)
    return [*given, *(results[number] for number in ids if number in results)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or call.get("type", "function") != "function"
        or not isinstance(call.get("id"), str)
        or not isinstance(function.get("name"), str)
        or not isinstance(function.get("arguments"), str)
    ):
        raise UserError(
            f'{where}: expected {{"id": ..., "type": "function", "function": {{"name": ..., "arguments": a JSON '
            f"text}}}}, found {shown(call)}."
        )
    arguments = _object_or_text(function["arguments"])
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _object_or_text(text: str) -> dict[str, Any] | str:
    """The object that JSON text has; the text if it has none, or one that is no text in Unicode any more."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")
