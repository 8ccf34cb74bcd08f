"""The choice of the next token: what it is made of, and in NumPy what every backend computes.

Whole numbers stand for probabilities, so that the same are summed in any order, and one random number chooses: the
same seed gives the same tokens on every backend, but where two logits, or the random number and the bound of a token's
share, are closer than float32 tells apart.
"""

from __future__ import annotations

import dataclasses

import numpy as np

NO_TOKEN = -1
"""What is chosen where a mask allows none."""
WEIGHT = 1 << 40
"""Of the likeliest token; what would have less than one is never taken."""
IN_PROMPT = 1 << 31
"""In `LogitState.counts`: the bit that says that a token is in the prompt."""
_BLOCK = 64
"""Logits of which the largest is looked at first."""


@dataclasses.dataclass(eq=False)
class LogitState:
    """What changes a sequence's logits, by token.

    Attributes:
        counts: uint32 ``[vocab_size]``: how often each is in the answer, and `IN_PROMPT`; None: there are no penalties.
        bias: float32 ``[vocab_size]``: added to logits; None: nothing is.
        changed: tokens whose count is another since whoever keeps a copy has emptied this list.
    """

    counts: np.ndarray | None = None
    bias: np.ndarray | None = None
    changed: list[int] = dataclasses.field(default_factory=list)

    def count_prompt(self, prompt: np.ndarray, vocab_size: int) -> None:
        """Begin to count, behind a prompt's token ids."""
        self.counts = np.zeros(vocab_size, np.uint32)
        self.counts[prompt] = IN_PROMPT

    def add(self, token: int) -> None:
        """Count a token of the answer."""
        if self.counts is not None:
            self.counts[token] += np.uint32(1)
            self.changed.append(token)


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """How one token is chosen. Filters apply in this order, each to what the ones before it left."""

    repetition_penalty: float = 1.0
    """Logits of tokens seen are divided by it where positive, else multiplied."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has."""
    frequency_penalty: float = 0.0
    """Subtracted as often as the answer has a token."""
    state: LogitState | None = None
    """What is counted for these penalties, and added to logits."""
    mask: np.ndarray | None = None
    """uint32 ``[ceil(vocab_size / 32)]``: bit i of word w says whether token 32 w + i may be taken."""
    temperature: float = 0.0
    """Divides logits; 0: the likeliest token is taken, the first of equal ones."""
    top_k: int = 0
    """Keep the k likeliest, and those equal to the last of them; 0: all."""
    top_p: float = 1.0
    """Keep the fewest of the likeliest that together have this share, and those equal to the last of them."""
    min_p: float = 0.0
    """Keep what has at least this share of the likeliest one's."""
    random: int = 0
    """Of 64 bits, evenly distributed: where among the shares of the tokens left, in the order of their numbers, the
    choice falls."""

    def at(self, random: int, mask: np.ndarray | None = None) -> Choice:
        """The same, with another random number and mask."""
        other = object.__new__(Choice)  # dataclasses.replace takes ten times as long
        other.__dict__.update(self.__dict__, random=random, mask=mask)
        return other

    @property
    def is_greedy(self) -> bool:
        """Whether the token of the highest logit is taken, whatever was seen before."""
        return self.temperature == 0 and self.state is None and self.mask is None


def choose(logits: np.ndarray, choice: Choice) -> int:
    """The token chosen from logits, float32 ``[vocab_size]``, all finite; `NO_TOKEN` where none may be."""
    scores = adjusted(logits, choice)
    if choice.temperature == 0:
        token = int(scores.argmax())
        return token if scores[token] > -np.inf else NO_TOKEN
    ids, weights = distribution(scores, choice)
    if not len(ids):
        return NO_TOKEN
    sums = weights.cumsum()
    at = int(sums[-1]) * choice.random >> 64
    return int(ids[sums.searchsorted(np.uint64(at), side="right")])


def adjusted(logits: np.ndarray, choice: Choice) -> np.ndarray:
    """Logits after penalties, bias and mask."""
    scores, state = logits, choice.state or LogitState()
    if state.counts is not None:
        counts = state.counts
        there = np.flatnonzero(counts)
        scores = scores.copy()
        own, times = scores[there], (counts[there] & np.uint32(IN_PROMPT - 1)).astype(np.float32)
        penalty = np.float32(choice.repetition_penalty)
        own = np.where(own < 0, own * penalty, own / penalty)
        own -= np.float32(choice.presence_penalty) * (times > 0)
        scores[there] = own - np.float32(choice.frequency_penalty) * times
    if state.bias is not None:
        scores = scores + state.bias
    if choice.mask is not None:
        allowed = np.unpackbits(choice.mask.view(np.uint8), count=len(scores), bitorder="little").view(bool)
        scores = np.where(allowed, scores, np.float32(-np.inf))
    return scores


def distribution(scores: np.ndarray, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that pass the filters, in the order of their numbers, and their weights, uint64.

    Args:
        scores: what `adjusted` gave.
        choice: of which the temperature is not 0.
    """
    best = scores.max()
    if not best > -np.inf:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    least = best - choice.temperature * np.log(WEIGHT)
    if 0 < choice.top_k < len(scores):
        least = max(least, _kth_largest(scores, choice.top_k))
    ids = np.flatnonzero(scores >= least)
    scores = scores[ids]
    weights = (WEIGHT * np.exp((scores.astype(np.float64) - best) / choice.temperature)).astype(np.uint64)
    keep = weights >= max(1, np.ceil(choice.min_p * WEIGHT))
    if choice.top_p < 1:
        keep &= scores >= _least_of_nucleus(scores, weights, choice.top_p)
    return ids[keep], weights[keep]


def _least_of_nucleus(scores: np.ndarray, weights: np.ndarray, top_p: float) -> np.float32:
    """The score of the last of the fewest likeliest that together have the share ``top_p`` of all weights."""
    total = int(weights.sum())
    # All that are lighter than this have, together, less than the rest: they need not be sorted.
    scores, weights = (array[weights >= (1 - top_p) * total / len(weights)] for array in (scores, weights))
    order = (-scores).argsort(kind="stable")
    before = weights[order].cumsum() - weights[order]
    last = np.flatnonzero(before < max(1, np.ceil(float(total) * top_p)))[-1]
    return scores[order[last]]


def _kth_largest(scores: np.ndarray, k: int) -> np.float32:
    """The k-th largest of them, sought among the few that are as large as the k-th largest block is."""
    whole = len(scores) // _BLOCK
    if whole > 4 * k:
        largest = scores[: whole * _BLOCK].reshape(whole, _BLOCK).max(1)
        scores = scores[scores >= np.partition(largest, -k)[-k]]
    return np.partition(scores, -k)[-k]
