"""Messages: the forms that a conversation may be given in, and the one that all else here takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pascalvl.plugins.errors import UserError, shown

Message = dict[str, Any]
"""``{"role": ..., "content": text or list of parts}``, a part being ``{"type": "text", "text": ...}``, ``{"type":
"image", "image": ...}`` or ``{"type": "video", "video": ...}``.

What a picture or video may be, `load_image` and `load_video` say. The fields ``url`` and ``path`` may stand for
``image`` and ``video``, and OpenAI's parts ``{"type": "image_url", "image_url": {"url": ...}}`` (``video_url``) for
such parts. An assistant's message may have ``tool_calls`` in place of content. Further fields are the template's.
"""

ROLES = ("system", "user", "assistant", "tool")
PART_TYPES = ("text", "image", "video")
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names that Hugging Face takes for the first, which templates read."""


def normalised(messages: Sequence[Message]) -> list[Message]:
    """Messages in Hugging Face's own form, without fields that are None.

    Raises:
        UserError: no messages, or one with an unknown role, or content of another form.
    """
    if not isinstance(messages, Sequence) or not messages:
        raise UserError(f"expected a list of at least one message, found {shown(messages)}.")
    return [_normalised(message) for message in messages]


def visual_parts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The pictures and videos of normalised messages."""
    return [part for message in messages for part in _parts(message) if part["type"] != "text"]


def without_sources(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages for a template, which asks whether there is a picture or video, not which it is."""
    return [
        message | {"content": [_without_source(part) for part in parts]} if (parts := _parts(message)) else message
        for message in messages
    ]


def _normalised(message: Message) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        found = message.get("role") if isinstance(message, dict) else message
        raise UserError(f"expected a message with a role of {', '.join(ROLES)}, found {shown(found)}.")
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = [_normalised_part(part) for part in content]
    elif not isinstance(content, str) and not (content is None and _calls_tools(message)):
        raise UserError(f"expected a message's content to be a text or a list of parts, found {shown(content)}.")
    reasoning = [message[name] for name in _REASONING if name in message]
    return {"thinking": reasoning[0], **message, "reasoning_content": reasoning[0]} if reasoning else message


def _calls_tools(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get("tool_calls"))


def _normalised_part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    if kind in ("image_url", "video_url") and kind in part:
        url = part[kind]
        kind = kind.removesuffix("_url")
        return {"type": kind, kind: url.get("url") if isinstance(url, dict) else url}
    if kind in ("image", "video"):
        names = [name for name in (kind, "url", "path") if name in part]
        if len(names) == 1:
            return {key: value for key, value in part.items() if key not in names} | {kind: part[names[0]]}
    raise UserError(
        f"expected message parts of type {', '.join(PART_TYPES)} with a field of that name (or url, path, or of type "
        f"image_url, video_url), found {shown(part)}."
    )


def _parts(message: Message) -> list[dict[str, Any]]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _without_source(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    return part if kind == "text" else part | {kind: f"<{type(part[kind]).__name__}>"}
