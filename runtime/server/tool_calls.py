"""Calls of tools in an answer's text, in the format of Qwen3 (and Hermes), found while the text comes."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Callable, Generator
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_PARTS_OF_OPEN = [OPEN[:length] for length in range(1, len(OPEN))]
_SPACE = " \t\n\r"
_WITHIN_JSON = frozenset(_SPACE + ',:{}[]"+-.' + "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Characters of JSON outside its strings, roughly."""
_ESCAPE_BEGUN = re.compile(r"\\(u[0-9a-fA-F]{0,3})?")

_Parsing = Generator[None, str, str]
"""Takes characters, "" at the end of the text; returns the one that it does not take any more."""
_Write = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class CallText:
    """A part of a call: the first has its id and name, and the arguments of all join to the whole."""

    index: int
    arguments: str
    id: str = ""
    name: str = ""

    def fields(self) -> dict[str, Any]:
        """As in ``delta.tool_calls[]`` of a chunk."""
        if not self.id:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


class _NoCallError(Exception):
    """The text is not in the format, from ``character`` on."""

    def __init__(self, character: str) -> None:
        self.character = character


class _Call:
    """A call of which something was read; nobody is told of it before its name and its arguments' beginning are known.

    From then on it cannot be taken back.
    """

    def __init__(self) -> None:
        self.name = ""
        self.has_arguments = self.is_complete = self.is_told = False
        self._waiting: list[str] = []

    def add(self, arguments: str) -> None:
        self.has_arguments = True
        self._waiting.append(arguments)

    def take(self) -> str:
        waiting = "".join(self._waiting)
        self._waiting.clear()
        return waiting


class ToolCallParser:
    r"""Finds ``<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`` in streamed text.

    However the text is cut into pieces, what is given joins to the same:

    - A call's arguments are the JSON text of ``arguments`` as the model wrote it, given as it comes; where that is a
      string, the text in it; where there is none, or null, ``{}``. The fields of a call may come in any order.
    - What cannot be a call (no JSON, no name, arguments that are no object) is content, tags and all, and so is one
      that ends before its name and the beginning of its arguments are known: nothing is lost.
    - A call whose arguments break off later, or are no JSON, has been told to the client and stays one: it gets what
      the model wrote up to ``</tool_call>``. As with OpenAI's own models, who calls the function checks arguments.
    - White space around calls is the format's and left out, but for content's own before them; further text is content.
    """

    def __init__(self) -> None:
        self.count = 0
        """Calls so far."""
        self._held: list[str] = []
        """Text that may be a part of the format or not."""
        self._given: list[tuple[CallText | None, list[str]]] = []
        """Content, or where there is one the call, and its texts."""
        self._has_content = False
        self._parsing = self._answer()
        next(self._parsing)

    def push(self, piece: str) -> list[str | CallText]:
        """Take the next piece; returns the content and the parts of calls that it completes."""
        for character in piece:
            self._held.append(character)
            self._parsing.send(character)
        return self._take()

    def finish(self) -> list[str | CallText]:
        """The text is complete; returns what was held back."""
        try:
            self._parsing.send("")
        except StopIteration:
            return self._take()
        raise AssertionError("the parser goes on after the text's end")

    def _take(self) -> list[str | CallText]:
        """What was given since."""
        given = [
            dataclasses.replace(call, arguments="".join(texts)) if call else "".join(texts)
            for call, texts in self._given
        ]
        self._given.clear()
        return given

    def _give(self, text: str, call: CallText | None = None) -> None:
        last = self._given[-1] if self._given else None
        if last and (last[0].index if last[0] else None) == (call.index if call else None):
            last[1].append(text)
        else:
            self._given.append((call, [text]))

    def _give_content(self) -> None:
        if text := "".join(self._held):
            self._give(text)
            self._has_content = True
        self._held.clear()

    def _give_arguments(self, text: str) -> None:
        """Of the last call."""
        self._give(text, CallText(self.count - 1, ""))

    # The text, character by character ---------------------------------------------------------------------------------

    def _answer(self) -> _Parsing:
        character = yield
        matched = 0
        while character:
            matched = matched + 1 if character == OPEN[matched] else int(character == OPEN[0])
            if matched == len(OPEN):
                character = yield from self._call(self._space_before_tag())
                matched = self._matched()
                continue
            if not matched and not character.isspace():
                self._give_content()
            character = yield
        if not (self.count and "".join(self._held).isspace()):
            self._give_content()
        return ""

    def _matched(self) -> int:
        """Characters of a tag that begins a call at the end of what is held, but for the last."""
        held = "".join(self._held[:-1])
        start = held.rfind(OPEN[0])
        return len(held) - start if start >= 0 and held[start:] in _PARTS_OF_OPEN else 0

    def _space_before_tag(self) -> str:
        """Of what is held, which ends with a tag; gives what is before it."""
        before = "".join(self._held[: -len(OPEN)])
        text = before.rstrip()
        self._held = [text] if text else []
        self._give_content()
        self._held = [before[len(text) :], OPEN]
        return before[len(text) :]

    def _call(self, space: str) -> _Parsing:
        """What follows a tag that begins a call, which ``space`` is before."""
        call = _Call()
        try:
            character = yield from self._object(call, space)
            self._held.clear()
            self._held += character
        except _NoCallError as error:
            character = error.character
            if not call.is_told:
                return character
            if not call.is_complete:
                return (yield from self._rest(character))
            if "".join(self._held[:-1]).strip():
                return character
        return (yield from self._close(character))

    def _object(self, call: _Call, space: str) -> _Parsing:
        """The object that says what is called; returns the character after it."""
        character = yield from _skip_space((yield))
        _expect(character == "{", character)
        character = yield from _skip_space((yield))
        while character != "}":
            _expect(character == '"', character)
            key: list[str] = []
            yield from _string(key.append)
            character = yield from _skip_space((yield))
            _expect(character == ":", character)
            character = yield from _skip_space((yield))
            match _decoded("".join(key)):
                case "name" if not call.name:
                    _expect(character == '"', character)
                    name: list[str] = []
                    yield from _string(name.append)
                    call.name = _decoded("".join(name))
                    _expect(bool(call.name) and call.name.isprintable(), '"')
                    self._tell(call, space)
                    character = yield
                case "arguments" if not call.has_arguments:
                    character = yield from self._arguments(call, space, character)
                case _:
                    character = yield from _value(character, lambda _: None)
            character = yield from _skip_space(character)
            _expect(character in (",", "}"), character)
            if character == ",":
                character = yield from _skip_space((yield))
                _expect(character == '"', character)
        _expect(bool(call.name), character)
        if not call.has_arguments:
            call.add("{}")
            call.is_complete = True
            self._tell(call, space)
        return (yield)

    def _arguments(self, call: _Call, space: str, character: str) -> _Parsing:
        """The value that begins with a character; returns the one after it."""

        def write(text: str) -> None:
            call.add(text)
            self._tell(call, space)

        if character == "{":
            character = yield from _value(character, write)
        elif character == '"':
            character = yield from _text_of_object(write)
        else:
            scalar: list[str] = []
            _expect(character != "[", character)
            character = yield from _value(character, scalar.append)
            _expect("".join(scalar) == "null", character)
        if not call.has_arguments:
            write("{}")
        call.is_complete = True
        return character

    def _tell(self, call: _Call, space: str) -> None:
        """Give what is known of a call, if that is enough."""
        if not call.name or not call.has_arguments:
            return
        self._held.clear()
        if call.is_told:
            self._give_arguments(call.take())
            return
        call.is_told = True
        # Templates put one line break between an answer's content and its first call.
        if not self.count and self._has_content and (own := space.removesuffix("\n")):
            self._give(own)
        self._give(call.take(), CallText(self.count, "", f"call_{secrets.token_hex(12)}", call.name))
        self.count += 1

    def _rest(self, character: str) -> _Parsing:
        """Arguments that are no JSON from a character on, up to the tag that ends the call; returns what follows it.

        The brace that is then the last is not the arguments' but the call's.
        """
        matched = 0
        waiting = ""
        while character:
            matched = matched + 1 if character == CLOSE[matched] else int(character == CLOSE[0])
            waiting += character
            if matched == len(CLOSE):
                waiting = waiting.removesuffix(CLOSE).rstrip(_SPACE).removesuffix("}")
                break
            if not matched and character not in _SPACE and character != "}":
                self._give_arguments(waiting)
                waiting = ""
            character = yield
        if waiting:
            self._give_arguments(waiting)
        self._held.clear()
        return (yield) if character else ""

    def _close(self, character: str) -> _Parsing:
        """The tag that ends a call, if it is there; returns what follows."""
        character = yield from _skip_space(character)
        for expected in CLOSE:
            if character != expected:
                return character
            character = yield
        self._held.clear()
        self._held += character
        return character


def _expect(condition: bool, character: str) -> None:
    if not condition:
        raise _NoCallError(character)


def _skip_space(character: str) -> _Parsing:
    while character and character in _SPACE:
        character = yield
    return character


def _value(character: str, write: _Write) -> _Parsing:
    """A JSON value, of which brackets and strings are looked at; returns the character after it."""
    closing: list[str] = []
    while True:
        _expect(character in _WITHIN_JSON, character)
        if not closing and character in ",:}]" + _SPACE:
            return character
        if closing and character in "}]":
            _expect(character == closing.pop(), character)
            write(character)
            if not closing:
                return (yield)
        else:
            write(character)
            if character in "{[":
                closing.append("}" if character == "{" else "]")
            elif character == '"':
                yield from _string(write)
                write('"')
                if not closing:
                    return (yield)
        character = yield


def _string(write: _Write) -> Generator[None, str, None]:
    """What follows a string's opening quotation mark, up to the closing one, which is not written."""
    escaped = False
    while True:
        character = yield
        _expect(character >= " ", character)
        if character == '"' and not escaped:
            return
        escaped = character == "\\" and not escaped
        write(character)


def _text_of_object(write: _Write) -> _Parsing:
    """What follows the opening quotation mark of a string that has an object's JSON text, or nothing; writes the text.

    Halves of surrogate pairs stay escaped: that is as good within JSON, and there may be one alone.
    """
    begun = False
    escape = ""
    while True:
        character = yield
        if character == '"' and escape != "\\":
            break
        unit = escape + character
        if character and _ESCAPE_BEGUN.fullmatch(unit):
            escape = unit
            continue
        text = _decoded(unit) if character else ""
        if not text or not (begun or text in _SPACE + "{"):
            break
        escape = ""
        begun = begun or text == "{"
        if begun:
            write(unit if "\ud800" <= text <= "\udfff" else text)
    if escape and begun:
        write(escape)
    _expect(character == '"' and not escape, character)
    return (yield)


def _decoded(text: str) -> str:
    """What stands between a JSON string's quotation marks, as text; "" where it is no string."""
    try:
        return json.loads(f'"{text}"')
    except ValueError:
        return ""
