"""Messages to the text of a prompt, by the checkpoint's own Jinja template."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pascalvl.plugins.errors import UserError

Message = dict[str, Any]
"""As Hugging Face writes it: ``{"role": ..., "content": text or list of parts}``, a part being ``{"type": "text",
"text": ...}``, ``{"type": "image", "image": ...}`` or ``{"type": "video", "video": ...}``."""

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "video")


class ChatTemplate:
    """A compiled template, in the sandbox and with the names that Hugging Face gives templates.

    Raises:
        UserError: the file is missing or is no valid template.
    """

    def __init__(self, path: Path) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda pattern: datetime.datetime.now().strftime(pattern)
        try:
            self._template = environment.from_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, jinja2.TemplateError, RecursionError) as error:
            raise UserError(
                f"the chat template {path} cannot be used ({error}): download the model again and export it."
            ) from error

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text up to where the assistant's answer begins, one placeholder for each picture and video.

        Raises:
            UserError: messages of another form, or that the template refuses.
        """
        if not isinstance(messages, Sequence) or not messages:
            raise UserError(f"expected a list of at least one message, found {messages!r}.")
        for message in messages:
            check_message(message)
        try:
            return self._template.render(
                messages=_plain(messages), tools=None, documents=None, add_generation_prompt=True
            )
        except Exception as error:  # whatever Python raises for what the template does with the messages
            raise UserError(f"the chat template refuses the messages: {error}.") from error


def check_message(message: Message) -> None:
    """Raise `UserError` unless ``message`` has a known role and content."""
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"expected a message with a role of {', '.join(ROLES)}, found {found!r}.")
    for part in parts(message):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind not in PART_TYPES or kind not in part or (kind == "text" and not isinstance(part["text"], str)):
            raise UserError(
                f"expected message parts of type {', '.join(PART_TYPES)} with a field of that name, found {part!r}."
            )


def parts(message: Message) -> list[dict[str, Any]]:
    """The parts of a message's content; a plain text is one part."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UserError(f"expected a message's content to be a text or a list of parts, found {content!r}.")
    return content


def _plain(value: Any) -> Any:
    """What a template may see of messages: the types of JSON.

    Templates come with checkpoints, from anyone, and the methods of a picture or path write files.
    """
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str(value)
    return value if value is None or type(value) in (bool, int, float) else f"<{type(value).__name__}>"


class _GenerationTag(Extension):
    """``{% generation %}``: marks, for training, what the assistant says; here its content alone matters."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it)

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Jinja's own filter escapes HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
