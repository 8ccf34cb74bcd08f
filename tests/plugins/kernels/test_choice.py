"""The choice of tokens on the device against its definition in NumPy, whose distribution is held to Hugging Face's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pascalvl.engines.choice import NO_TOKEN, Choice, LogitState, adjusted, choose, distribution
from pascalvl.plugins.kernels.library import CHOICE
from tests.plugins.kernels import reference
from tests.plugins.kernels.reference import aligned, pointer
from tests.plugins.kernels.test_kernels import library  # noqa: F401

PARAMS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 2.5, "top_k": 1500, "top_p": 0.95, "min_p": 0.01},
    {"temperature": 1.3, "top_k": 1024},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.3, "top_p": 0.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1e-6},
    {"temperature": 1e6, "top_k": 7},
    {"temperature": 0.0},
]


def on_device(array: np.ndarray) -> np.ndarray:
    copy = aligned(array.shape, array.dtype)
    copy[:] = array
    return copy


def records(choices: list[Choice]) -> tuple[np.ndarray, list[np.ndarray]]:
    """As the kernel takes them, and what they point to."""
    rows, kept = aligned((len(choices),), CHOICE), []
    for row, choice in zip(rows, choices, strict=True):
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p", "min_p"):
            row[name] = getattr(choice, name)
        row["top_k"], row["random"] = choice.top_k, choice.random
        state = choice.state or LogitState()
        for name, array in (("counts", state.counts), ("bias", state.bias), ("mask", choice.mask)):
            row[name] = 0
            if array is not None:
                kept.append(on_device(array))
                row[name] = pointer(kept[-1])
    return rows, kept


def chosen(library, logits: np.ndarray, choices: list[Choice]) -> tuple[np.ndarray, np.ndarray]:  # noqa: F811
    rows, _kept = records(choices)
    given, token, logit = on_device(logits), aligned((len(choices),), np.int32), aligned((len(choices),))
    library.choose(pointer(given), *logits.shape, pointer(rows), pointer(token), pointer(logit))
    reference.memory.wait()
    return token.copy(), logit.copy()


def random_choice(rng: np.random.Generator, vocab_size: int, options: dict, adjust: bool) -> Choice:
    choice = Choice(**options, random=int(rng.integers(1 << 64, dtype=np.uint64)))
    if not adjust:
        return choice
    counts = np.zeros(vocab_size, np.uint32)
    counts[rng.integers(0, vocab_size, vocab_size // 3 + 1)] = 1 << 31
    counts[rng.integers(0, vocab_size, vocab_size // 5 + 1)] += 3
    return dataclasses.replace(
        choice,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.25,  # exact products: what the device adds and multiplies at once is the same
        state=LogitState(counts, (rng.integers(-8, 8, vocab_size) / 4).astype(np.float32)),
        mask=rng.integers(0, 1 << 32, (vocab_size + 31) // 32, np.uint32),
    )


def is_close(logits: np.ndarray, choice: Choice, token: int) -> bool:
    """Whether a token's share reaches, by what float32 tells apart, to where the random number falls."""
    ids, weights = distribution(adjusted(logits, choice), choice)
    shares = weights / weights.sum()
    (at,) = np.flatnonzero(ids == token)
    start = shares[:at].sum()
    return start - 1e-5 <= choice.random / 2**64 <= start + shares[at] + 1e-5


@pytest.mark.parametrize("adjust", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 33, 700, 5003])
def test_tokens_are_those_of_the_definition(library, vocab_size, adjust):  # noqa: F811
    rng = np.random.default_rng(vocab_size)
    choices = [random_choice(rng, vocab_size, options, adjust) for options in PARAMS for _ in range(4)]
    logits = (3 * rng.standard_normal((len(choices), vocab_size))).astype(np.float32)
    tokens, highest = chosen(library, logits, choices)
    np.testing.assert_array_equal(highest, logits.max(1))
    for row, choice, token in zip(logits, choices, tokens, strict=True):
        assert token == choose(row, choice) or is_close(row, choice, token), choice


@pytest.mark.parametrize("options", PARAMS[1:5])
def test_equal_logits_stay_together(library, options):  # noqa: F811
    """More of them, too, than shared memory has room for."""
    rng = np.random.default_rng(0)
    for values in (3, 40):
        logits = rng.integers(0, values, (8, 4000)).astype(np.float32)
        choices = [random_choice(rng, 4000, options, False) for _ in range(8)]
        tokens, _ = chosen(library, logits, choices)
        for row, choice, token in zip(logits, choices, tokens, strict=True):
            assert token == choose(row, choice) or is_close(row, choice, token), choice


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_that_leaves_none(library, temperature):  # noqa: F811
    logits = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    choices = [Choice(temperature=temperature, mask=np.zeros(4, np.uint32)), Choice(temperature=temperature)]
    tokens, highest = chosen(library, logits, choices)
    assert tokens[0] == NO_TOKEN
    assert tokens[1] >= 0
    np.testing.assert_array_equal(highest, logits.max(1))


def test_logits_that_are_no_numbers_are_told(library):  # noqa: F811
    logits = np.zeros((len(PARAMS), 300), np.float32)
    logits[:, 77] = np.nan
    _, highest = chosen(library, logits, [Choice(**options) for options in PARAMS])
    assert np.isnan(highest).all()


def test_draws_follow_the_distribution(library):  # noqa: F811
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(40).astype(np.float32)
    options = {"temperature": 0.9, "top_k": 12, "top_p": 0.9}
    draws = 1500
    choices = [random_choice(rng, 40, options, False) for _ in range(draws)]
    tokens, _ = chosen(library, np.tile(logits, (draws, 1)), choices)
    ids, weights = distribution(logits, choices[0])
    expected = np.zeros(40)
    expected[ids] = draws * weights / weights.sum()
    counts = np.bincount(tokens, minlength=40)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_squared < 30  # at most 11 degrees of freedom: exceeded once in 600
