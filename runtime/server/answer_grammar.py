"""What an answer must be: the fields of a request that say so, and its tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pascalvl.runtime.grammar import Grammar
from pascalvl.runtime.server.schema import GUIDED, JSON_SCHEMA, RESPONSE_FORMAT, checked, parsed, refuse
from pascalvl.runtime.server.service import request_errors
from pascalvl.runtime.server.tools import Tools
from pascalvl.runtime.tokenizer import Tokenizer


def answer_grammar(fields: Mapping[str, Any], tools: Tools, tokenizer: Tokenizer) -> Grammar | None:
    """Of a request whose fields have their kinds already; None: any answer will do.

    Raises:
        APIError: two fields that say what an answer must be, or one that cannot be used.
    """
    given = {name: fields[name] for name in GUIDED if name in fields}
    form = checked(fields.get("response_format", {"type": "text"}), RESPONSE_FORMAT, "response_format", ("type",))
    if "json_schema" in form and form["type"] != "json_schema":
        refuse("response_format.json_schema", "is for the type json_schema: give that, or leave it out")
    if form["type"] != "text":
        given["response_format"] = form
    if len(given) > 1:
        one, other, *_ = given
        refuse(other, f"says what the answer must be, as {one} does: leave one of them out")
    for name, value in given.items():
        if tools.for_template is not None:
            refuse(name, "leaves no way to call a tool: leave it, or the tools, out")
        with request_errors(name):
            return _grammar(name, value)
    with request_errors("tools"):
        return tools.grammar(tokenizer)


def _grammar(name: str, value: Any) -> Grammar:
    if name == "guided_regex":
        return Grammar.regex(value)
    if name == "guided_grammar":
        return Grammar.lark(value)
    if name == "guided_choice":
        return Grammar.lark("start: " + " | ".join(map(json.dumps, value)))
    if name == "guided_json":
        return Grammar.json_schema(parsed(value.encode()) if isinstance(value, str) else value)
    if value["type"] == "json_object":
        return Grammar.json_object()
    if "json_schema" not in value:
        refuse("response_format.json_schema", "is missing", "missing_required_parameter")
    schema = checked(value["json_schema"], JSON_SCHEMA, "response_format.json_schema", ("name", "schema"))
    return Grammar.json_schema(schema["schema"])
