"""How the tokens of an answer are chosen: the processors of Hugging Face's `generate`, in its order, and OpenAI's."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, cast

import numpy as np

from pascalvl.engines.choice import NO_TOKEN, Choice, LogitState, adjusted, choose, distribution
from pascalvl.plugins.errors import UserError, shown

_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e6
"""Of logits: far from what changes an answer any more, and from where float32 overflows."""
_FACTORS = f"from {_SMALLEST_FACTOR:g} to {_LARGEST_FACTOR:g}"
_LARGEST_PENALTY, _LARGEST_BIAS = 2.0, 100.0
"""As OpenAI has them."""
_RANDOM_NUMBERS = 64
"""That are drawn at a time: one alone takes as long."""


def _is_within(value: object, smallest: float, largest: float) -> bool:
    return isinstance(value, numbers.Real) and bool(smallest <= cast(float, value) <= largest)


def _is_factor(value: object) -> bool:
    return _is_within(value, _SMALLEST_FACTOR, _LARGEST_FACTOR)


def _is_penalty(value: object) -> bool:
    return _is_within(value, -_LARGEST_PENALTY, _LARGEST_PENALTY)


def _is_bias(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        type(token) is int and token >= 0 and _is_within(bias, -_LARGEST_BIAS, _LARGEST_BIAS)
        for token, bias in value.items()
    )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; raises `UserError` for a value out of range.

    The filters apply in the order of the fields and each sees what the ones before it left.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens seen so far are divided by it where positive, else multiplied (Keskar, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has already."""
    frequency_penalty: float = 0.0
    """Subtracted as many times as the answer has a token."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    """By token: added to its logit."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token, and the filters below then change nothing."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest of the likeliest tokens that together have this probability (Holtzman, arXiv:1904.09751)."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the likeliest (Nguyen, arXiv:2407.01082)."""
    seed: int | None = None
    """The same seed gives the same answer; None draws a new one each time."""

    def __post_init__(self) -> None:
        penalties = f"a number from {-_LARGEST_PENALTY:g} to {_LARGEST_PENALTY:g}"
        for name, accepted, valid in (
            ("repetition_penalty", f"a number {_FACTORS}", _is_factor(self.repetition_penalty)),
            ("presence_penalty", penalties, _is_penalty(self.presence_penalty)),
            ("frequency_penalty", penalties, _is_penalty(self.frequency_penalty)),
            (
                "logit_bias",
                f"numbers from {-_LARGEST_BIAS:g} to {_LARGEST_BIAS:g} by token",
                _is_bias(self.logit_bias),
            ),
            (
                "temperature",
                f"0 for greedy or a number {_FACTORS}",
                self.temperature == 0 or _is_factor(self.temperature),
            ),
            ("top_k", "a whole number from 0 (off)", type(self.top_k) is int and self.top_k >= 0),
            ("top_p", "a number from 0 to 1 (off)", _is_within(self.top_p, 0, 1)),
            ("min_p", "a number from 0 (off) to 1", _is_within(self.min_p, 0, 1)),
            ("seed", "a whole number from 0", self.seed is None or (type(self.seed) is int and self.seed >= 0)),
        ):
            if not valid:
                raise UserError(f"{name} is out of range: expected {accepted}, found {shown(getattr(self, name))}.")

    @property
    def takes_likeliest(self) -> bool:
        """Whether the token of the highest logit is chosen, whatever was seen before."""
        return self.temperature == 0 and not self.looks_back and not self.logit_bias

    @property
    def looks_back(self) -> bool:
        """Whether it matters what was seen before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class TokenMatcher(Protocol):
    """Says which tokens of one answer may come next."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that have to follow, whatever the logits are."""

    def mask(self) -> np.ndarray | None:
        """Which tokens may come next, as `pascalvl.engines.choice.Choice` has it; None: all."""

    def accept(self, token: int) -> None:
        """Take the next token, one that the mask allows; raises `UserError` where there is no way on."""


def one_token(token: int, words: int) -> np.ndarray:
    """A mask of so many words that allows one token."""
    mask = np.zeros(words, np.uint32)
    word, bit = divmod(token, 32)
    mask[word] = np.uint32(1 << bit)
    return mask


def check_finite(highest: float) -> None:
    """Raise `UserError` if the highest logit (NaN if there is one) says that logits are not finite."""
    if not math.isfinite(highest):
        raise UserError(
            "the engine returned logits that are not finite: if its KV cache is f16, build it with --kv f32."
        )


def _random_numbers(seed: int | None) -> Iterator[int]:
    """Of 64 bits, without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.integers(1 << 64, size=_RANDOM_NUMBERS, dtype=np.uint64).tolist()


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        params: how.
        token_ids: int64 ``[n]``, the prompt: what the repetition penalty counts as seen, beside the answer itself.
        vocab_size: length of the logits.
        matcher: says which tokens may come next; None: all may.

    Raises:
        UserError: a token that is biased is not in the vocabulary.
    """

    def __init__(
        self, params: SamplingParams, token_ids: np.ndarray, vocab_size: int, matcher: TokenMatcher | None = None
    ) -> None:
        self.params = params
        self._matcher = matcher
        state = LogitState()
        if params.looks_back:
            state.count_prompt(token_ids, vocab_size)
        if params.logit_bias:
            if unknown := [token for token in params.logit_bias if token >= vocab_size]:
                raise UserError(f"logit_bias is for token {unknown[0]}, and the vocabulary has {vocab_size}.")
            state.bias = np.zeros(vocab_size, np.float32)
            state.bias[list(params.logit_bias)] = list(params.logit_bias.values())
        names = (
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "temperature",
            "top_k",
            "top_p",
            "min_p",
        )
        settings = {name: getattr(params, name) for name in names}
        settings["top_k"] = min(params.top_k, vocab_size)  # records have 32 bits
        self._choice = Choice(**settings, state=state if params.looks_back or params.logit_bias else None)
        self._randoms = iter(()) if params.temperature == 0 else _random_numbers(params.seed)

    def next(self) -> Choice:
        """How the next token is to be chosen; `add` it then."""
        random = next(self._randoms, None)
        if self._matcher is not None:
            return self._choice.at(random or 0, self._matcher.mask())
        return self._choice if random is None else self._choice.at(random)

    def add(self, token: int, highest: float) -> int:
        """Note the token that was chosen, and return it.

        Args:
            token: it.
            highest: the highest logit, NaN if there is one.

        Raises:
            UserError: the logits are not finite, no token may be taken, or the grammar cannot be followed further.
        """
        check_finite(highest)
        if token == NO_TOKEN:
            raise UserError("no token may come next: what is asked for allows none.")
        return self._note(token)

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that have to come next, whatever the logits are."""
        return () if self._matcher is None else self._matcher.forced

    def add_forced(self) -> int:
        """Note the first of them without its logits, as if it had been chosen, and return it; raises `UserError` as
        `add` does."""
        next(self._randoms, None)
        return self._note(self.forced[0])

    @property
    def is_complete(self) -> bool:
        """Whether nothing may come next."""
        return self._matcher is not None and self._matcher.is_complete

    def _note(self, token: int) -> int:
        if self._choice.state:
            self._choice.state.add(token)
        if self._matcher is not None:
            self._matcher.accept(token)
        return token

    def __call__(self, logits: np.ndarray) -> int:
        """Choose from ``logits`` ``[vocab_size]``; greedy takes the first of equal maxima. For errors see `add`."""
        choice, highest = self.next(), float(logits.max())
        return self.add(choose(logits, choice) if math.isfinite(highest) else NO_TOKEN, highest)

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that pass the filters, and their probabilities in float64; temperature must not be 0."""
        ids, weights = distribution(adjusted(logits, self._choice), self._choice)
        return ids, weights / weights.sum()
