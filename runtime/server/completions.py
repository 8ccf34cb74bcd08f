"""``/v1/completions``: texts or tokens that are gone on with, without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pascalvl.plugins.errors import shown
from pascalvl.runtime.generation import TokenLogprobs
from pascalvl.runtime.model import VisionLanguageModel
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server import logprobs as in_form
from pascalvl.runtime.server.admission import Ticket
from pascalvl.runtime.server.answer_grammar import answer_grammar
from pascalvl.runtime.server.form import Form
from pascalvl.runtime.server.schema import COMPLETION, checked, refuse
from pascalvl.runtime.server.service import Service, request_errors
from pascalvl.runtime.server.settings import Settings
from pascalvl.runtime.server.tools import Tools
from pascalvl.runtime.tokenizer import Tokenizer


class CompletionForm(Form):
    """Of ``text_completion``, whole and in chunks."""

    kind = kind_of_chunk = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, settings: Settings, choices: int, tokenizer: Tokenizer) -> None:
        super().__init__(model, settings, choices)
        self._tokenizer = tokenizer
        self._lengths = [0] * choices
        """Characters of each that were sent."""

    def choice(self, index: int, text: str, logprobs: Sequence[TokenLogprobs], reason: str) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs(logprobs, 0), "finish_reason": reason}

    def first(self) -> None:
        return None

    def deltas(self, index: int, text: str, logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        offset = self._lengths[index]
        self._lengths[index] += len(text)
        return [{"text": text, "logprobs": self._logprobs(logprobs, offset) if logprobs else None}]

    def last(self, index: int, reason: str) -> list[dict[str, Any]]:
        return [{"text": "", "logprobs": None, "finish_reason": reason}]

    def _logprobs(self, logprobs: Sequence[TokenLogprobs], offset: int) -> dict[str, Any] | None:
        return None if self._settings.logprobs is None else in_form.of_completion(logprobs, self._tokenizer, offset)


async def completion_sequences(
    service: Service, body: Any, ticket: Ticket, salt: int
) -> tuple[Form, Sequence[TokenSequence]]:
    """What a request asks for: the form of its answers, and what the scheduler takes; raises `APIError`."""
    fields = checked(body, COMPLETION, needed=("prompt",))
    service.check_model(fields.get("model"))
    settings = Settings.of(fields, service.model, fields.get("logprobs"))
    if fields.get("best_of", settings.choices) != settings.choices:
        refuse("best_of", "is not supported: leave it out, or give the number that n is")
    prompts = _prompts(fields["prompt"])
    ticket.take(places=len(prompts) * settings.choices - 1)

    def made() -> list[TokenSequence]:
        grammar = answer_grammar(fields, Tools(), service.model.tokenizer)
        return [
            sequence
            for prompt in prompts
            for sequence in settings.sequences(service.model, _prompt(prompt, service.model), salt, grammar)
        ]

    sequences = await service.run(made)
    name = fields.get("model", service.name)
    return CompletionForm(name, settings, len(sequences), service.model.tokenizer), sequences


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
    """Each a text, or token ids."""
    if isinstance(given, str):
        return [given]
    if all(type(token) is int for token in given):
        return [given]
    for number, each in enumerate(given):
        if not isinstance(each, str) and not (isinstance(each, list) and all(type(token) is int for token in each)):
            refuse(f"prompt[{number}]", f"is of no use: expected a text or token ids, found {shown(each)}")
    return given


def _prompt(given: str | list[int], model: VisionLanguageModel) -> Any:
    """Of a text, in which nothing is a control token, or of tokens as they are."""
    with request_errors("prompt"):
        tokens = text_tokens(model, given) if isinstance(given, str) else given
        return model.prompt_of_tokens(tokens)


def text_tokens(model: VisionLanguageModel, text: str) -> list[int]:
    """Token ids of a client's text: as in messages, what reads as a control token is none; raises `UserError` for one
    that is too long."""
    model.check_length(text)
    return model.tokenizer.encode_without_added(text)
