"""From logits to the next token: the processors of Hugging Face's `generate`, in its order."""

from __future__ import annotations

import dataclasses
import math
import numbers

import numpy as np

from pascalvl.plugins.errors import UserError, shown

_SMALLEST_FACTOR, _LARGEST_FACTOR = 1e-6, 1e6
"""Of logits: far from what changes an answer any more, and from where float32 overflows."""
_FACTORS = f"from {_SMALLEST_FACTOR:g} to {_LARGEST_FACTOR:g}"


def _is_within(value: object, smallest: float, largest: float) -> bool:
    return isinstance(value, numbers.Real) and bool(smallest <= value <= largest)


def _is_factor(value: object) -> bool:
    return _is_within(value, _SMALLEST_FACTOR, _LARGEST_FACTOR)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; raises `UserError` for a value out of range.

    The filters apply in the order of the fields and each sees what the ones before it left.
    """

    repetition_penalty: float = 1.0
    """Logits of tokens seen so far are divided by it where positive, else multiplied (Keskar, arXiv:1909.05858)."""
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
        for name, accepted, valid in (
            ("repetition_penalty", f"a number {_FACTORS}", _is_factor(self.repetition_penalty)),
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
        return self.temperature == 0 and self.repetition_penalty == 1


def check_finite(highest: float) -> None:
    """Raise `UserError` if the highest logit (NaN if there is one) says that logits are not finite."""
    if not math.isfinite(highest):
        raise UserError(
            "the engine returned logits that are not finite: if its KV cache is f16, build it with --kv f32."
        )


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        params: how.
        token_ids: int64 ``[n]``, the prompt: what the repetition penalty counts as seen, beside the answer itself.
        vocab_size: length of the logits.
    """

    def __init__(self, params: SamplingParams, token_ids: np.ndarray, vocab_size: int) -> None:
        self.params = params
        self._seen = np.zeros(vocab_size, bool)
        self._seen[token_ids] = True
        self._rng = np.random.default_rng(params.seed)

    def __call__(self, logits: np.ndarray) -> int:
        """Choose from ``logits`` ``[vocab_size]``; greedy takes the first of equal maxima.

        Raises:
            UserError: the logits are not finite.
        """
        check_finite(logits.max())
        if self.params.temperature == 0:
            token = int(self._penalised(logits).argmax())
        else:
            ids, probabilities = self.distribution(logits)
            token = int(self._rng.choice(ids, p=probabilities))
        self._seen[token] = True
        return token

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the tokens that pass the filters, and their probabilities in float64; temperature must not be 0."""
        params = self.params
        scores = self._penalised(logits).astype(np.float64)
        scores = (scores - scores.max()) / params.temperature
        ids = np.arange(len(scores))
        if 0 < params.top_k < len(scores):
            lowest = np.partition(scores, -params.top_k)[-params.top_k]
            ids = np.flatnonzero(scores >= lowest)
        if params.top_p < 1:
            ids = ids[scores[ids].argsort(kind="stable")]
        probabilities = np.exp(scores[ids])
        probabilities /= probabilities.sum()
        keep = probabilities >= params.min_p * probabilities.max()
        if params.top_p < 1:
            keep &= probabilities.cumsum() > 1 - params.top_p
            keep[-1] = True
        ids, probabilities = ids[keep], probabilities[keep]
        return ids, probabilities / probabilities.sum()

    def _penalised(self, logits: np.ndarray) -> np.ndarray:
        penalty = self.params.repetition_penalty
        if penalty == 1:
            return logits
        return np.where(self._seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
