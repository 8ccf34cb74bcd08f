"""How many sequences a decode step has."""

BATCHES = 1, 2, 4, 8
"""Sequences for which a decode step is captured; others are padded to the next of these."""


def padded_batch(count: int) -> int | None:
    """The next of `BATCHES` for so many sequences; None: they are too many."""
    return next((size for size in BATCHES if size >= count), None)
