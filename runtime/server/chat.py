"""``/v1/chat/completions``: messages to a prompt, answers to messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pascalvl.plugins.errors import shown
from pascalvl.runtime.generation import TokenLogprobs
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server import logprobs as in_form
from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.form import Form
from pascalvl.runtime.server.media import Source
from pascalvl.runtime.server.schema import (
    CHAT,
    MESSAGE,
    PICTURE,
    PICTURE_PART,
    TEXT_PART,
    VIDEO,
    VIDEO_PART,
    checked,
    refuse,
)
from pascalvl.runtime.server.service import Service
from pascalvl.runtime.server.settings import Settings
from pascalvl.runtime.tokenizer import Tokenizer

_PARTS = {"text": TEXT_PART, "image_url": PICTURE_PART, "video_url": VIDEO_PART}


class ChatForm(Form):
    """Of ``chat.completion`` and its chunks."""

    kind, kind_of_chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: str, settings: Settings, choices: int, tokenizer: Tokenizer) -> None:
        super().__init__(model, settings, choices)
        self._tokenizer = tokenizer

    def choice(self, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(logprobs)}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        delta = {"content": text} if text or logprobs else {}
        return {"delta": delta, "logprobs": self._logprobs(logprobs) if delta else None}

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return None if self._settings.logprobs is None else in_form.of_chat(logprobs, self._tokenizer)


async def chat_sequences(
    service: Service, body: Any, ticket: Ticket, salt: int
) -> tuple[Form, Sequence[TokenSequence]]:
    """What a request asks for: the form of its answers, and what the scheduler takes; raises `APIError`."""
    fields = checked(body, CHAT, needed=("messages",))
    service.check_model(fields.get("model"))
    settings = Settings.of(fields, service.model, _logprobs(fields))
    messages, sources = messages_of(fields["messages"])
    ticket.take(places=settings.choices - 1)
    prompt = await service.prompt(messages, sources, ticket)
    sequences = await service.run(settings.sequences, service.model, prompt, salt)
    name = fields.get("model", service.name)
    return ChatForm(name, settings, len(sequences), service.model.tokenizer), sequences


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    if fields.get("logprobs"):
        return fields.get("top_logprobs", 0)
    if fields.get("top_logprobs"):
        refuse("top_logprobs", "is for log probabilities: set logprobs to true, or leave it out")
    return None


def messages_of(given: Sequence[Any]) -> tuple[list[dict[str, Any]], list[tuple[dict[str, Any], Source]]]:
    """Messages in Hugging Face's form, and their pictures and videos: the parts to be filled, and what each is of.

    Raises:
        APIError: messages of another form, and parts with fields that say how a picture is to be processed.
    """
    messages, sources = [], []
    for number, message in enumerate(given):
        where = f"messages[{number}]"
        fields = checked(message, MESSAGE, where, needed=("role", "content"))
        role = "system" if fields["role"] == "developer" else fields["role"]
        content: Any = fields["content"]
        if isinstance(content, list):
            content = []
            for place, part in enumerate(fields["content"]):
                made, source = _part(part, f"{where}.content[{place}]")
                content.append(made)
                if source:
                    sources.append((made, source))
        messages.append({"role": role, "content": content})
    return messages, sources


def _part(part: Any, where: str) -> tuple[dict[str, Any], Source | None]:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        refuse(f"{where}.type", f"is of no use: expected {', '.join(_PARTS)}, found {shown(kind)}")
    fields = checked(part, _PARTS[kind], where, needed=(kind,))
    if kind == "text":
        return {"type": "text", "text": fields["text"]}, None
    named = fields[kind] if isinstance(fields[kind], dict) else {"url": fields[kind]}
    source = checked(named, PICTURE if kind == "image_url" else VIDEO, f"{where}.{kind}", needed=("url",))
    what = kind.removesuffix("_url")
    return {"type": what}, Source(what, source["url"], f"{where}.{kind}.url", source.get("detail", "auto"))
