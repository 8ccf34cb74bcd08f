"""To which sizes steps are padded: for each of these a CUDA graph is recorded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pascalvl.engines.engine import NewTokens

BATCHES = 1, 2, 4, 8
"""Sequences of a recorded step."""
LENGTHS = tuple(1 << i for i in range(3, 10))
"""Tokens of a recorded step with more of them than sequences, 8 to 512."""


def padded_batch(count: int) -> int | None:
    """The next of `BATCHES` for so many sequences; None: they are too many."""
    return next((size for size in BATCHES if size >= count), None)


class StepShape(NamedTuple):
    """Sizes of a step, in which no token sees but all of its past, and of each sequence the last one's logits come."""

    tokens: int
    """At most."""
    batch: int
    """Sequences, at most."""
    levels: int
    """Of DeepStack; there are visuals among the tokens. 0: there are none."""

    @classmethod
    def padded(cls, sequences: Sequence[NewTokens], lengths: Sequence[int], levels: int) -> StepShape | None:
        """That in which these run; None: none does.

        Args:
            sequences: of the step.
            lengths: those of `LENGTHS` that may be taken, besides one token of each sequence.
            levels: of the model.
        """
        count, tokens = len(sequences), sum(map(len, sequences))
        batch = padded_batch(count)
        if batch is None or not all(new.is_plain for new in sequences):
            return None
        # A call of as many tokens as sequences is a decode step: others must have more when they are padded, too.
        longer = (length for length in lengths if length >= tokens and length > batch)
        length = batch if tokens == count else next(longer, None)
        if length is None:
            return None
        return cls(length, batch, levels if any(new.visuals for new in sequences) else 0)
