"""How answers are to be written: what a request's fields say of sampling, length and form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.prompt import Prompt
from pascalvl.runtime.grammar import Grammar
from pascalvl.runtime.model import VisionLanguageModel
from pascalvl.runtime.sampling import SamplingParams
from pascalvl.runtime.sequence import TokenSequence
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.schema import STREAM_OPTIONS, checked, refuse

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of all choices of a request."""

    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]
    choices: int
    """For each prompt."""
    logprobs: int | None
    stream: bool
    include_usage: bool
    """At the end of a stream."""
    reasoning_budget: int | None

    @classmethod
    def of(cls, fields: Mapping[str, Any], model: VisionLanguageModel, logprobs: int | None) -> Settings:
        """Read the fields of a request that have their kinds already; raises `APIError` for values out of range."""
        given = {name: fields[name] for name in _SAMPLING if name in fields}
        if "logit_bias" in fields:
            given["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
        try:
            sampling = dataclasses.replace(model.generation_config.sampling, **given)
        except UserError as error:
            raise APIError(400, str(error), str(error).split()[0], "invalid_value") from None
        limits = {fields[name] for name in ("max_tokens", "max_completion_tokens") if name in fields}
        if len(limits) > 1:
            refuse("max_tokens", "is another number than max_completion_tokens: leave one of them out")
        stream = fields.get("stream", False)
        options = checked(fields.get("stream_options", {}), STREAM_OPTIONS, "stream_options")
        if options and not stream:
            refuse("stream_options", "is for streams: set stream to true, or leave it out")
        stop = fields.get("stop", ())
        return cls(
            sampling,
            limits.pop() if limits else None,
            (stop,) if isinstance(stop, str) else tuple(stop),
            fields.get("n", 1),
            logprobs,
            stream,
            options.get("include_usage", False),
            fields.get("reasoning_budget"),
        )

    def sequences(
        self, model: VisionLanguageModel, prompt: Prompt, salt: int, grammar: Grammar | None = None
    ) -> list[TokenSequence]:
        """What the scheduler takes, a sequence a choice; raises `APIError` for a prompt that is too long, a grammar
        that cannot be used, or a token to be biased that there is none of."""
        length = len(prompt.token_ids)
        is_long = length >= model.context_length
        try:
            return [
                model.sequence_of(
                    prompt,
                    self._sampling(number),
                    self.max_tokens,
                    self.stop,
                    self.logprobs,
                    grammar,
                    salt,
                    self.reasoning_budget,
                )
                for number in range(self.choices)
            ]
        except UserError as error:
            code = "context_length_exceeded" if is_long else "invalid_value"
            param = "logit_bias" if str(error).startswith("logit_bias") else None
            raise APIError(400, str(error), param, code) from None

    def _sampling(self, number: int) -> SamplingParams:
        """Of a choice: with a seed, the first is what it is alone, and the others have seeds of their own."""
        seed = self.sampling.seed
        return self.sampling if seed is None else dataclasses.replace(self.sampling, seed=seed + number)
