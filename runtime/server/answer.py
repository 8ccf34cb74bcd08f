"""An answer's text as OpenAI's API gives it: reasoning, content and calls of tools apart, whole or in deltas."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from pascalvl.runtime.generation import FinishReason
from pascalvl.runtime.reasoning import ReasoningParser
from pascalvl.runtime.server.tool_calls import CallText, ToolCallParser


@dataclasses.dataclass(frozen=True)
class Delta:
    """What came of an answer: one of the fields."""

    reasoning: str = ""
    content: str = ""
    call: CallText | None = None

    def fields(self) -> dict[str, Any]:
        """As in ``choices[].delta`` of a chunk."""
        if self.call:
            return {"tool_calls": [self.call.fields()]}
        return {"reasoning_content": self.reasoning} if self.reasoning else {"content": self.content}


class AnswerParser:
    """Takes an answer apart while it comes; however it is cut into pieces, the deltas of a kind join to the same text.

    Args:
        thinks: the prompt opened the model's thinking already, see `opens_thinking`.
        calls: tools were shown to the model; without, nothing is taken for a call.
    """

    def __init__(self, thinks: bool = False, calls: bool = False) -> None:
        self._reasoning = ReasoningParser(thinks)
        self._calls = ToolCallParser() if calls else None

    def push(self, piece: str) -> list[Delta]:
        """What the next piece of the text completes."""
        reasoning, content = self._reasoning.push(piece)
        given: list[str | CallText] = self._calls.push(content) if self._calls else [content]
        return self._deltas(reasoning, given)

    def finish(self) -> list[Delta]:
        """The text is complete; returns what was held back."""
        reasoning, content = self._reasoning.finish()
        given: list[str | CallText] = [content]
        if self._calls:
            given = [*self._calls.push(content), *self._calls.finish()]
        return self._deltas(reasoning, given)

    def finish_reason(self, reason: FinishReason) -> str:
        """OpenAI's word for why a finished answer ended: ``tool_calls`` where it did with calls, whoever chose them."""
        return "tool_calls" if self._calls and self._calls.count and reason is FinishReason.STOP else reason.value

    @staticmethod
    def _deltas(reasoning: str, given: list[str | CallText]) -> list[Delta]:
        deltas = [Delta(content=part) if isinstance(part, str) else Delta(call=part) for part in given if part]
        return [Delta(reasoning=reasoning), *deltas] if reasoning else deltas


def whole_message(deltas: Iterable[Delta]) -> dict[str, Any]:
    """``choices[].message`` of an answer that is not streamed, of all its deltas."""
    deltas = list(deltas)
    calls: list[dict[str, Any]] = []
    for call in (delta.call for delta in deltas if delta.call):
        if call.id:
            calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
        calls[call.index]["function"]["arguments"] += call.arguments
    content = "".join(delta.content for delta in deltas)
    message: dict[str, Any] = {"role": "assistant", "content": None if calls and not content else content}
    if reasoning := "".join(delta.reasoning for delta in deltas):
        message["reasoning_content"] = reasoning
    return {**message, "tool_calls": calls} if calls else message
