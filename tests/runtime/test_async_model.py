"""Coroutines that ask one model."""

import asyncio
import dataclasses

import pytest

from pascalvl.plugins.errors import UserError
from pascalvl.runtime import Request, SamplingParams, VisionLanguageModel
from pascalvl.runtime.async_model import AsyncModel
from tests.engines.torch_reference import user
from tests.runtime.test_many import alone, requests

GREEDY = SamplingParams(temperature=0)


def open_model(bundle, **options):
    return VisionLanguageModel.open(bundle, context_length=768, **options)


def test_answers_are_those_that_each_gets_alone(nano_engine_bundle):
    wanted = requests(12)
    expected = alone(nano_engine_bundle, wanted, context_length=768)

    async def ask(model, request):
        answer = await model.submit(request)
        pieces = [piece async for piece in answer]
        assert "".join(pieces) == answer.generation.text
        return answer.generation.token_ids

    async def all_of_them():
        async with AsyncModel(open_model(nano_engine_bundle, sequences=3)) as model:
            return await asyncio.gather(*(ask(model, request) for request in wanted))

    assert asyncio.run(all_of_them()) == expected


def test_who_goes_away_leaves_the_place_to_others(nano_engine_bundle):
    endless = open_model(nano_engine_bundle)
    endless.generation_config = _without_end(endless)

    async def ask():
        async with AsyncModel(endless) as model:
            answer = await model.submit(Request([user("Hello!")], GREEDY, 700))
            async for _ in answer:
                break
            answer.cancel()
            other = await model.submit(Request([user("Hello again!")], GREEDY, 5))
            async for _ in other:
                pass
            return len(answer.generation.token_ids), len(other.generation.token_ids)

    left, whole = asyncio.run(ask())
    assert left < 100
    assert whole == 5
    assert endless.scheduler.is_idle


def test_what_cannot_be_asked(nano_engine_bundle):
    async def ask():
        async with AsyncModel(open_model(nano_engine_bundle)) as model:
            with pytest.raises(UserError, match="context holds"):
                await model.submit(Request([user("word " * 2000)]))
            answer = await model.submit(Request([user("Hello!")], GREEDY, 3))
            return [piece async for piece in answer], model

    pieces, model = asyncio.run(ask())
    assert pieces

    async def ask_again():
        await model.submit(Request([user("Hello!")]))

    with pytest.raises(UserError, match="is closed"):
        asyncio.run(ask_again())


def test_an_engine_that_fails_tells_those_who_wait(nano_engine_bundle, monkeypatch):
    broken = open_model(nano_engine_bundle)

    def fail(*_):
        raise MemoryError("of this test")

    async def ask():
        async with AsyncModel(broken) as model:
            monkeypatch.setattr(broken.scheduler, "step", fail)
            answer = await model.submit(Request([user("Hello!")], GREEDY, 3))
            async for _ in answer:
                pass

    with pytest.raises(MemoryError, match="of this test"):
        asyncio.run(ask())


def _without_end(model):

    return dataclasses.replace(model.generation_config, eos_token_ids=frozenset())


def test_a_step_without_memory_ends_the_latest_answer(nano_engine_bundle):
    """And the others go on."""
    model = open_model(nano_engine_bundle, sequences=2)
    step, steps = model.scheduler.step, 0

    def fails_once():
        nonlocal steps
        steps += 1
        if steps == 8:
            raise MemoryError
        step()

    model.scheduler.step = fails_once

    async def ask(asking, text):
        answer = await asking.submit(Request([user(text)], GREEDY, 12))
        return [piece async for piece in answer]

    async def both():
        async with AsyncModel(model) as asking:
            return await asyncio.gather(ask(asking, "Hello!"), ask(asking, "Bye!"), return_exceptions=True)

    first, second = asyncio.run(both())
    assert sorted([isinstance(first, MemoryError), isinstance(second, MemoryError)]) == [False, True]
    assert model.scheduler.is_idle


def test_a_librarys_panic_is_told(nano_engine_bundle):
    """Which is no `Exception`."""

    class PanicException(BaseException):
        pass

    def panic():
        raise PanicException("of this test")

    model = open_model(nano_engine_bundle)
    model.scheduler.step = panic

    async def ask():
        async with AsyncModel(model) as asking:
            answer = await asking.submit(Request([user("Hello!")], GREEDY, 12))
            with pytest.raises(RuntimeError, match="of this test"):
                async for _ in answer:
                    pass
            return asking.error

    assert "PanicException" in str(asyncio.run(ask()))
