"""Many requests at once are answered as each alone."""

import dataclasses
import itertools

import numpy as np
import pytest

from pascalvl.engines.device.memory import available_target
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels.build import Target
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.runtime import Request, SamplingParams, VisionLanguageModel
from tests.engines.decoder import CACHES
from tests.engines.torch_reference import scene, user

GREEDY = SamplingParams(temperature=0)
SEEDED = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.1)


def requests(count: int) -> list[Request]:
    """Of unequal length, with pictures and without, of which some come again, greedy and seeded."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        facts = " ".join(f"The code of lamp {i} is {7 * i}." for i in range(int(rng.integers(0, 25))))
        parts = {
            0: [facts, f"What is the code of lamp {number % 5}?"],
            1: [scene(number % 4, 64, 64), "Describe the picture."],
            2: [scene(number % 3, 96, 64), facts, scene(5, 64, 96), "Describe the last picture."],
        }[number % 3]
        sampling = GREEDY if number % 2 else dataclasses.replace(SEEDED, seed=number)
        made.append(Request([user(*parts)], sampling, int(rng.integers(1, 40))))
    return made


def alone(bundle, wanted: list[Request], **options) -> list[list[int]]:
    """Each on a model that has seen nothing before."""
    found = []
    for request in wanted:
        model = VisionLanguageModel.open(bundle, **options)
        generation = model.generate(request.messages, request.sampling, request.max_new_tokens)
        for _ in generation:
            pass
        found.append(generation.token_ids)
    return found


@pytest.mark.parametrize("kv", ["f32", "k8v8", "k4v4"])
def test_answers_are_those_that_each_gets_alone(kv, nano_engine):
    check_many(nano_engine(kv), requests(18))


@pytest.mark.slow
@pytest.mark.parametrize("kv", CACHES)
def test_64_answers_are_those_that_each_gets_alone(kv, nano_engine):
    check_many(nano_engine(kv), requests(64))


@pytest.mark.skipif(available_target() is not Target.CUDA, reason="needs a GPU")
@pytest.mark.parametrize("backend", ["cuda", "torch"])
@pytest.mark.parametrize("kv", CACHES)
def test_64_answers_on_a_gpu(kv, backend, nano_engine):
    """But for one near tie at most: a prompt's chunks beside others are shorter, and summed in other orders, which the
    rounding of a cache makes larger."""
    check_many(nano_engine(kv, backend), requests(64), near_ties=1)


def check_many(bundle, wanted, near_ties=0):
    """In any order, with room for all and with so little that some are computed twice."""
    options = {"context_length": 768}
    expected = alone(bundle, wanted, **options)
    for sequences, seed in ((4, 1), (1, 2)):
        model = VisionLanguageModel.open(bundle, **options, sequences=sequences)
        order = np.random.default_rng(seed).permutation(len(wanted))
        found = dict(model.generate_many(wanted[i] for i in order))
        differ = [i for at, i in enumerate(order) if found[at].token_ids != expected[i]]
        assert len(differ) <= near_ties, differ
        assert all(generation.text and generation.finish_reason for generation in found.values())


def test_a_window_of_each(nano_engine):
    wanted = requests(9)
    options = {"context_length": 768, "cache": CacheConfig.parse("k8v8,window=8+128")}
    expected = alone(nano_engine("k8v8"), wanted, **options)
    model = VisionLanguageModel.open(nano_engine("k8v8"), **options, sequences=3)
    found = dict(model.generate_many(wanted))
    assert [found[i].token_ids for i in range(len(wanted))] == expected


def test_what_cannot_be_answered_stops_nobody(nano_engine_bundle):
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=256, sequences=2)
    long = [user("word " * 500)]
    wrong = [{"role": "user", "content": [{"type": "image", "image": "nowhere.png"}]}]
    wanted = [Request([user("Hello!")], GREEDY, 4), Request(long), Request(wrong), Request([user("Hi!")], GREEDY, 4)]
    found = dict(model.generate_many(wanted))
    assert [type(found[i].error) for i in range(4)] == [type(None), UserError, UserError, type(None)]
    assert found[0].text
    assert found[3].text


def test_requests_are_taken_as_they_are_needed(nano_engine_bundle):
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=256, sequences=2)
    endless = (Request([user(f"Hello {number}!")], GREEDY, 2) for number in itertools.count())
    answers = model.generate_many(endless)
    assert len([next(answers) for _ in range(20)]) == 20
    assert next(endless).messages[0]["content"][0]["text"] != "Hello 100!"
    answers.close()
    assert model.scheduler.is_idle


def test_what_is_at_work_goes_on_while_the_next_is_not_ready(nano_engine_bundle):
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=256, sequences=2)
    messages = [user(scene(0, 64, 64), "Describe the picture.")]
    answered, asked = [], 0

    def slow():
        nonlocal asked
        yield Request(messages, GREEDY, 8)
        while not answered and asked < 1000:
            asked += 1
            yield None
        yield model.sequence(Request(messages, GREEDY, 8))

    for number, generation in model.generate_many(slow()):
        answered.append((number, generation.token_ids))
    assert 0 < asked < 1000
    assert [number for number, _ in answered] == [0, 1]
    assert answered[0][1] == answered[1][1]


def test_no_more_are_taken_than_are_wanted(nano_engine_bundle):
    model = VisionLanguageModel.open(nano_engine_bundle, context_length=256, sequences=2)
    taken = answered = most = 0

    def counted():
        nonlocal taken, most
        for number in range(7):
            taken += 1
            most = max(most, taken - answered)
            yield Request([user(f"Hello {number}!")], GREEDY, 3)

    for _ in model.generate_many(counted(), 3):
        answered += 1
    assert (answered, most) == (7, 3)
