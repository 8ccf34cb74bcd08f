"""Which fields a request may have, and what each must be: tables, and one function that holds a body against them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from pascalvl.plugins.errors import shown
from pascalvl.runtime.server.errors import APIError

_MOST_METADATA = 16
_MOST_STOPS = 16
_MOST_BIASED = 1024
_MOST_STOP_CHARACTERS = 1000


class Kind(NamedTuple):
    """What a field must be."""

    accepts: Callable[[Any], bool]
    expected: str


def only(*values: Any) -> Kind:
    """A field that changes nothing, of which other values would."""
    written = " or ".join(map(json.dumps, values))
    return Kind(lambda value: any(type(value) is type(each) and value == each for each in values), written)


def _is_metadata(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= _MOST_METADATA and all(isinstance(v, str) for v in value.values())


def _is_stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and len(texts) <= _MOST_STOPS
        and all(isinstance(text, str) and 0 < len(text) <= _MOST_STOP_CHARACTERS for text in texts)
    )


def _is_bias(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= _MOST_BIASED
        and all(
            key.isascii() and key.isdecimal() and len(key) < 10 and type(bias) in (int, float)
            for key, bias in value.items()
        )
    )


def whole(least: int, most: int | None = None) -> Kind:
    """A whole number in a range."""
    expected = f"a whole number from {least}" + (f" to {most}" if most is not None else "")
    return Kind(lambda value: type(value) is int and least <= value and (most is None or value <= most), expected)


TEXT = Kind(lambda value: isinstance(value, str), "a text")
FLAG = Kind(lambda value: type(value) is bool, "true or false")
NUMBER = Kind(lambda value: type(value) in (int, float), "a number")
ANYTHING = Kind(lambda value: True, "anything")
OBJECT = Kind(lambda value: isinstance(value, dict), "an object")
LIST = Kind(lambda value: isinstance(value, list) and bool(value), "a list of at least one element")

SAMPLING: dict[str, Kind] = {
    "model": TEXT,
    "stream": FLAG,
    "stream_options": OBJECT,
    "n": whole(1, 128),
    "max_tokens": whole(1),
    "stop": Kind(
        _is_stop, f"a text or a list of at most {_MOST_STOPS} texts, each of 1 to {_MOST_STOP_CHARACTERS} characters"
    ),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "top_k": whole(0),
    "min_p": NUMBER,
    "seed": whole(0, (1 << 64) - 1),
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "repetition_penalty": NUMBER,
    "logit_bias": Kind(_is_bias, f"an object of at most {_MOST_BIASED} numbers by token id"),
    # Who asks, and for what: nothing here depends on it.
    "user": TEXT,
    "safety_identifier": TEXT,
    "metadata": Kind(_is_metadata, f"an object of at most {_MOST_METADATA} texts"),
    "store": only(False),
    "service_tier": only("auto", "default"),
}
"""What both kinds of completions take."""
GUIDED: dict[str, Kind] = {
    "guided_json": Kind(lambda value: isinstance(value, dict | str), "a JSON schema"),
    "guided_regex": TEXT,
    "guided_grammar": TEXT,
    "guided_choice": Kind(
        lambda value: isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value),
        "a list of texts",
    ),
}
"""What an answer must be, of which a request may have one."""
RESPONSE_FORMAT: dict[str, Kind] = {
    "type": Kind(lambda value: value in ("text", "json_object", "json_schema"), "text, json_object or json_schema"),
    "json_schema": OBJECT,
}
JSON_SCHEMA: dict[str, Kind] = {"name": TEXT, "description": TEXT, "schema": OBJECT, "strict": FLAG}
CHAT: dict[str, Kind] = {
    **SAMPLING,
    "messages": LIST,
    "max_completion_tokens": whole(1),
    "logprobs": FLAG,
    "top_logprobs": whole(0, 20),
    "modalities": only(["text"]),
    "response_format": OBJECT,
    **GUIDED,
    # What each must be like, `pascalvl.runtime.server.tools` says.
    "tools": ANYTHING,
    "tool_choice": ANYTHING,
    "parallel_tool_calls": ANYTHING,
    "reasoning_budget": whole(0),
}
COMPLETION: dict[str, Kind] = {
    **SAMPLING,
    "prompt": Kind(lambda value: isinstance(value, str | list) and bool(value), "a text, texts, or token ids"),
    "logprobs": whole(0, 20),
    **GUIDED,
    "echo": only(False),
    "best_of": whole(1, 128),
}
TOKENIZE: dict[str, Kind] = {"model": TEXT, "prompt": TEXT, "messages": LIST}
STREAM_OPTIONS: dict[str, Kind] = {"include_usage": FLAG, "include_obfuscation": only(False)}
MESSAGE: dict[str, Kind] = {
    "role": Kind(
        lambda value: value in ("system", "developer", "user", "assistant", "tool"),
        "system, developer, user, assistant or tool",
    ),
    "content": Kind(lambda value: isinstance(value, str | list), "a text or a list of parts"),
    "reasoning_content": TEXT,
    "tool_calls": Kind(lambda value: isinstance(value, list), "a list"),
    "tool_call_id": TEXT,
    # What answers of this server have in them, which clients send back.
    "refusal": only(None),
}
TEXT_PART: dict[str, Kind] = {"type": TEXT, "text": TEXT}
PICTURE_PART: dict[str, Kind] = {"type": TEXT, "image_url": Kind(lambda v: isinstance(v, dict | str), "an object")}
PICTURE: dict[str, Kind] = {
    "url": TEXT,
    "detail": Kind(lambda value: value in ("auto", "low", "high"), "auto, low or high"),
}
VIDEO_PART: dict[str, Kind] = {"type": TEXT, "video_url": Kind(lambda v: isinstance(v, dict | str), "an object")}
VIDEO: dict[str, Kind] = {"url": TEXT}

_REPLACED = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "reasoning_effort": "give reasoning_budget, a number of tokens, or leave it out",
    "structured_outputs": "give response_format",
}
"""What takes the place of fields that other servers know."""


def checked(body: Any, fields: Mapping[str, Kind], where: str = "", needed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A JSON object with the fields of a table; those that are null are left out.

    Args:
        body: it.
        fields: the table.
        where: the object's place in the request, such as ``messages[0]``; "": it is the request.
        needed: fields that must be there.

    Raises:
        APIError: 400, naming the field: unknown, not supported, missing, or of another kind.
    """
    if not isinstance(body, dict):
        raise APIError(
            400, f"expected {where or 'the request'} to be a JSON object, found {shown(body)}.", where or None
        )
    prefix = f"{where}." if where else ""
    for name, value in body.items():
        if name in fields or value is None:
            continue
        if name in _REPLACED:
            refuse(f"{prefix}{name}", f"is not supported: {_REPLACED[name]}", "unsupported_parameter")
        refuse(f"{prefix}{shown(name)[1:-1]}", "is not a field that is known here: leave it out", "unknown_parameter")
    given = {name: value for name, value in body.items() if value is not None}
    for name in needed:
        if name not in given:
            refuse(f"{prefix}{name}", "is missing", "missing_required_parameter")
    for name, value in given.items():
        if not fields[name].accepts(value):
            refuse(f"{prefix}{name}", f"is of no use: expected {fields[name].expected}, found {shown(value)}")
    return given


def refuse(param: str, why: str, code: str = "invalid_value") -> NoReturn:
    """Raise the `APIError` about a field."""
    raise APIError(400, f"{param} {why}.", param, code)


def parsed(body: bytes) -> Any:
    """The JSON of a request; raises `APIError` 400 for what is none, NaN and infinities among it."""
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise APIError(
            400, f"the request's body is not JSON ({shown(reason, 200)[1:-1]}).", None, "invalid_json"
        ) from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
