"""Sampling against Hugging Face's logits processors, and against the probabilities it claims."""

import re

import numpy as np
import pytest
import torch
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pascalvl.engines.choice import NO_TOKEN, WEIGHT, Choice, _kth_largest, choose
from pascalvl.plugins.errors import UserError
from pascalvl.runtime.sampling import Sampler, SamplingParams

VOCAB = 1000
NOTHING = np.zeros(0, np.int64)


def _reference(params: SamplingParams, logits: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Probabilities after Hugging Face's processors, in the order of its `generate`."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.from_numpy(context)[None], torch.from_numpy(logits)[None])
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.9, "top_k": 20},
        {"temperature": 1.0, "top_k": 5000},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.05},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.0, "min_p": 1.0},
        {"temperature": 1.3, "repetition_penalty": 1.2},
        {"temperature": 1.3, "repetition_penalty": 0.8, "top_k": 50},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 100, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.1},
    ],
)
def test_distribution_equals_hugging_face(options):
    rng = np.random.default_rng(0)
    params = SamplingParams(**options)
    for _ in range(20):
        logits = (4 * rng.standard_normal(VOCAB)).astype(np.float32)
        context = rng.integers(0, VOCAB, 300)
        expected = _reference(params, logits, context)
        ids, probabilities = Sampler(params, context, VOCAB).distribution(logits)
        found = np.zeros(VOCAB)
        found[ids] = probabilities
        # What is less likely than 2^-40 of the likeliest is never taken.
        np.testing.assert_array_equal(found > 0, expected > expected.max() / WEIGHT)
        # The reference rounds scores to float32.
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("k", [1, 20, 500, 40000])
def test_the_kth_largest_of_many(k):
    rng = np.random.default_rng(k)
    for logits in (rng.standard_normal(151936), np.zeros(151936), np.arange(151936), rng.integers(0, 50, 151937)):
        assert _kth_largest(logits.astype(np.float32), k) == np.sort(logits.astype(np.float32))[-k]


def test_penalties_of_what_the_answer_has():
    """As OpenAI defines them: of the answer alone."""
    params = SamplingParams(presence_penalty=1.5, frequency_penalty=0.25)
    logits = np.array([2.0, 1.0, 0.5, 0.2], np.float32)
    sampler = Sampler(params, np.array([0]), 4)
    # 2; then 0.25 and 1; then 0.25, -0.75 and 0.5; then 0.25 and -1.25; and so on.
    assert [sampler(logits) for _ in range(6)] == [0, 1, 2, 0, 3, 0]
    several = Sampler(SamplingParams(frequency_penalty=0.3), np.array([0]), 4)
    assert [several(logits) for _ in range(7)] == [0, 0, 0, 0, 1, 0, 1]


def test_a_bias_moves_logits():
    logits = np.array([2.0, 1.0, 0.5, 0.2], np.float32)
    sampler = Sampler(SamplingParams(logit_bias={3: 2.0, 0: -1.5}), NOTHING, 4)
    assert sampler(logits) == 3
    ids, probabilities = Sampler(
        SamplingParams(temperature=1.0, logit_bias={3: 2.0, 0: -100.0}), NOTHING, 4
    ).distribution(logits)
    assert ids.tolist() == [1, 2, 3]
    np.testing.assert_allclose(probabilities, np.exp([1, 0.5, 2.2]) / np.exp([1, 0.5, 2.2]).sum(), rtol=1e-6)
    with pytest.raises(UserError, match="logit_bias is for token 4, and the vocabulary has 4"):
        Sampler(SamplingParams(logit_bias={4: 1.0}), NOTHING, 4)


def test_a_mask_leaves_what_it_allows():
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(100).astype(np.float32)
    allowed = rng.random(100) < 0.3
    mask = np.packbits(np.pad(allowed, (0, 28)), bitorder="little").view(np.uint32)
    best = np.where(allowed, logits, -np.inf).argmax()
    assert choose(logits, Choice(mask=mask)) == best
    numbers = rng.integers(1 << 64, size=500, dtype=np.uint64).tolist()
    drawn = {choose(logits, Choice(mask=mask, temperature=3.0, random=number)) for number in numbers}
    assert best in drawn <= set(np.flatnonzero(allowed))
    for temperature in (0.0, 1.0):
        assert choose(logits, Choice(mask=np.zeros(4, np.uint32), temperature=temperature)) == NO_TOKEN
    sampler = Sampler(SamplingParams(), NOTHING, 100)
    with pytest.raises(UserError, match="no token may come next"):
        sampler.add(NO_TOKEN, 1.0)


def test_the_random_number_runs_through_all_shares():
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    drawn = [choose(logits, Choice(temperature=1.0, random=(1 << 64) * i // 1000 + 1)) for i in range(1000)]
    assert drawn == sorted(drawn)
    np.testing.assert_allclose(np.bincount(drawn), [100, 200, 300, 400], atol=1)
    assert choose(logits, Choice(temperature=1.0, random=(1 << 64) - 1)) == 3


def test_top_k_keeps_ties():
    logits = np.array([1.0, 3.0, 2.0, 2.0, 0.0], np.float32)
    ids, _ = Sampler(SamplingParams(temperature=1.0, top_k=2), NOTHING, 5).distribution(logits)
    assert sorted(ids) == [1, 2, 3]


def test_draws_follow_the_distribution():
    rng = np.random.default_rng(1)
    logits = rng.standard_normal(8).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=0.9, top_k=6, seed=5), NOTHING, 8)
    ids, probabilities = sampler.distribution(logits)
    draws = 20_000
    counts = np.bincount([sampler(logits) for _ in range(draws)], minlength=8)
    expected = np.zeros(8)
    expected[ids] = draws * probabilities
    assert (counts[expected == 0] == 0).all()
    chi_squared = ((counts - expected)[ids] ** 2 / expected[ids]).sum()
    assert chi_squared < 20.5  # 5 degrees of freedom: exceeded once in 1000


def test_seed():
    logits = np.random.default_rng(2).standard_normal(VOCAB).astype(np.float32)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), NOTHING, VOCAB)
        return [sampler(logits) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_greedy():
    rng = np.random.default_rng(3)
    greedy = SamplingParams(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5)
    logits = rng.standard_normal(VOCAB).astype(np.float32)
    assert Sampler(greedy, NOTHING, VOCAB)(logits) == logits.argmax()
    ties = np.array([0.0, 7.0, 1.0, 7.0], np.float32)
    assert Sampler(greedy, NOTHING, 4)(ties) == 1


def test_repetition_penalty_is_for_prompt_and_answer():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), np.array([0]), 4)
    logits = np.array([5.0, 4.0, 3.0, -1.0], np.float32)
    assert [sampler(logits) for _ in range(3)] == [1, 2, 0]
    negative = np.array([-1.0, -1.5, -1.4, -3.0], np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), np.array([0]), 4)(negative) == 2


def test_temperature_near_zero_is_greedy():
    logits = np.random.default_rng(4).standard_normal(VOCAB).astype(np.float32)
    assert Sampler(SamplingParams(temperature=1e-6), NOTHING, VOCAB)(logits) == logits.argmax()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite(bad):
    logits = np.zeros(VOCAB, np.float32)
    logits[17] = bad
    with pytest.raises(UserError, match="logits that are not finite"):
        Sampler(SamplingParams(), NOTHING, VOCAB)(logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-39),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-39),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", [1]),
        ("seed", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(UserError, match=f"^{name} is out of range: expected .*, found {re.escape(repr(value))}"):
        SamplingParams(**{name: value})


def test_any_top_k_fits_a_record():
    """Of 32 bits; more than there are tokens is all of them."""
    for top_k in (VOCAB + 1, 1 << 31, 1 << 80):
        assert Sampler(SamplingParams(temperature=1, top_k=top_k), NOTHING, VOCAB).next().top_k == VOCAB
