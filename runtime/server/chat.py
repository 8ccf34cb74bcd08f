"""``/v1/chat/completions``: messages to a prompt, answers to messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pascalvl.plugins.errors import shown
from pascalvl.runtime.generation import FinishReason, TokenLogprobs
from pascalvl.runtime.reasoning import opens_thinking
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server import logprobs as in_form
from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.answer import AnswerParser, Delta, whole_message
from pascalvl.runtime.server.answer_grammar import answer_grammar
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
from pascalvl.runtime.server.service import Service, field_errors
from pascalvl.runtime.server.settings import Settings
from pascalvl.runtime.server.tools import Tools, with_calls_for_template
from pascalvl.runtime.tokenizer import Tokenizer

_PARTS = {"text": TEXT_PART, "image_url": PICTURE_PART, "video_url": VIDEO_PART}


class ChatForm(Form):
    """Of ``chat.completion`` and its chunks."""

    kind, kind_of_chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(
        self, model: str, settings: Settings, choices: int, tokenizer: Tokenizer, parser: Callable[[], AnswerParser]
    ) -> None:
        super().__init__(model, settings, choices)
        self._tokenizer = tokenizer
        self._parsers = [parser() for _ in range(choices)]

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str) -> dict[str, Any]:
        parser = self._parsers[index]
        message = {**whole_message([*parser.push(text), *parser.finish()]), "refusal": None}
        ended = parser.finish_reason(FinishReason(reason))
        return {"message": message, "logprobs": self._logprobs(logprobs), "finish_reason": ended}

    def first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def deltas(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        deltas = self._parsers[index].push(text)
        if logprobs and not deltas:  # of tokens whose text is held back, or none
            deltas = [Delta()]
        chunks = [{"delta": delta.fields(), "logprobs": None} for delta in deltas]
        if logprobs:
            chunks[0]["logprobs"] = self._logprobs(logprobs)
        return chunks

    def last(self, index: int, reason: str) -> list[dict[str, Any]]:
        parser = self._parsers[index]
        held = [{"delta": delta.fields(), "logprobs": None} for delta in parser.finish()]
        return [*held, {"delta": {}, "logprobs": None, "finish_reason": parser.finish_reason(FinishReason(reason))}]

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return None if self._settings.logprobs is None else in_form.of_chat(logprobs, self._tokenizer)


async def chat_sequences(
    service: Service, body: Any, ticket: Ticket, salt: int
) -> tuple[Form, Sequence[TokenSequence]]:
    """What a request asks for: the form of its answers, and what the scheduler takes; raises `APIError`."""
    fields = checked(body, CHAT, needed=("messages",))
    service.check_model(fields.get("model"))
    settings = Settings.of(fields, service.model, _logprobs(fields))
    with field_errors():
        tools = Tools.parse(*(fields.get(name) for name in ("tools", "tool_choice", "parallel_tool_calls")))
    messages, sources = messages_of(fields["messages"])
    ticket.take(places=settings.choices - 1)
    prompt = await service.prompt(messages, sources, ticket, tools=tools.for_template)
    tokenizer = service.model.tokenizer

    def made() -> list[TokenSequence]:
        return settings.sequences(service.model, prompt, salt, answer_grammar(fields, tools, tokenizer))

    sequences = await service.run(made)
    thinks, calls = opens_thinking(prompt.token_ids, tokenizer), tools.for_template is not None
    name = fields.get("model", service.name)
    return ChatForm(name, settings, len(sequences), tokenizer, lambda: AnswerParser(thinks, calls)), sequences


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
        calls = isinstance(message, dict) and bool(message.get("tool_calls"))
        fields = checked(message, MESSAGE, where, needed=("role",) if calls else ("role", "content"))
        role = "system" if fields["role"] == "developer" else fields["role"]
        for name, owner in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
            if name in fields and role != owner:
                refuse(f"{where}.{name}", f"is for messages of the role {owner}: leave it out")
        if isinstance(fields.get("content"), list):
            content = []
            for place, part in enumerate(fields["content"]):
                made, source = _part(part, f"{where}.content[{place}]")
                content.append(made)
                if source:
                    sources.append((made, source))
            fields["content"] = content
        messages.append({**fields, "role": role})
    with field_errors():
        return with_calls_for_template(messages), sources


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
