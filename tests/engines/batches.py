"""Sequences that run in one step, over a pool of random pages, and what each of them gives alone."""

from __future__ import annotations

import numpy as np

from pascalvl.engines import Session
from pascalvl.engines.engine import NewTokens, Placement
from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import PAGE_SLOTS
from tests.engines.decoder import random_pool, random_tokens

CAPACITY = 3 * PAGE_SLOTS
DECODES = [
    ([4, 11, 2], 300),
    ([7], 0),
    ([0, 9], 128),
    ([12], 127),
    ([3, 15, 5], 256),
    ([8], 1),
    ([14, 1], 200),
    ([6], 40),
]
"""Pages of the pool and past of sequences that decode: of unequal lengths, at the bounds of pages and between."""
POOL = 18


def fresh_pool(session: Session) -> dict[str, np.ndarray]:
    """Fill the pool with random rows."""
    pool = random_pool(session.model, session.cache, POOL, np.random.default_rng(0))
    session.write(np.arange(POOL), pool)
    return pool


def decodes(session: Session) -> list[NewTokens]:
    """A token of each sequence of `DECODES`."""
    return [
        random_tokens(
            session.model.text,
            Placement(np.array(pages, np.int32), past, np.array([past], np.int32)),
            np.random.default_rng(seed),
        )
        for seed, (pages, past) in enumerate(DECODES)
    ]


def alone(session: Session, sequences: list[NewTokens]) -> dict[str, np.ndarray]:
    """What steps of single sequences give, one behind the other."""
    outputs = [session.step([new]) for new in sequences]
    return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}


def changed(session: Session, pool: dict[str, np.ndarray]) -> set[tuple[int, int]]:
    """Pages and slots of the pool where a layer's keys are others than those given."""
    keys = bindings.past_key(session.model.text.num_hidden_layers - 1)
    differs = (session.read(np.arange(POOL))[keys] != pool[keys]).any((1, 3))
    return {(int(page), int(slot)) for page, slot in zip(*differs.nonzero(), strict=True)}


def places(sequences: list[NewTokens]) -> set[tuple[int, int]]:
    """Pages and slots where new tokens go."""
    return {divmod(int(place), PAGE_SLOTS) for new in sequences for place in new.placement.places if place >= 0}
