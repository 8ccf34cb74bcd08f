"""A windowed cache in the whole model, against Hugging Face's attention under a dense mask."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pascalvl.engines import validation
from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import CacheConfig, pages_of
from pascalvl.runtime import SamplingParams, VisionLanguageModel
from pascalvl.runtime.kv_cache import KVCache
from pascalvl.runtime.model import PINNED_SLOTS
from pascalvl.runtime.validation import trace
from tests.engines.torch_reference import answer, assistant, scene, user

FILLER = " ".join(f"The code of lamp {i} is {7 * i % 100}." for i in range(40))
MESSAGES = [user(scene(1, 96, 64), f"Here is a picture. {FILLER}"), assistant("A grid."), user("Which shapes are red?")]
FORCED = list(range(40, 60))


def dense_logits(reference, prompt, forced, config):
    """Logits of the prompt's last token and after each forced one, under the mask that the window means."""
    tokens = np.concatenate([prompt.token_ids, forced])
    n = len(tokens)
    i, j = np.arange(n)[:, None], np.arange(n)[None]
    pinned = np.zeros(n, bool)
    if config.pin_images:
        for visual in prompt.visuals:
            pinned[visual.token_indices] = True
    visible = (j <= i) & ((i - j < config.window.length) | (j < config.window.sinks) | pinned)
    positions = np.concatenate(
        [prompt.position_ids, np.broadcast_to(prompt.next_position + np.arange(len(forced)), (3, len(forced)))], 1
    )
    ids = torch.from_numpy(tokens)[None]
    with torch.no_grad():
        result = reference(
            input_ids=ids,
            attention_mask=torch.from_numpy(visible)[None, None],
            position_ids=torch.from_numpy(positions)[:, None],
            mm_token_type_ids=(ids == reference.config.image_token_id).int(),
            pixel_values=torch.from_numpy(np.concatenate([v.patches.pixel_values for v in prompt.visuals])),
            image_grid_thw=torch.tensor([v.patches.grid for v in prompt.visuals]),
        )
    return result.logits[0, len(prompt.token_ids) - 1 :].numpy()


@pytest.mark.parametrize("kv", ["f32,window=8+64,pin=image", "f32,window=0+16", "f32,window=5+200"])
@pytest.mark.parametrize("prefill_chunk", [50, 512])
def test_logits_equal_those_under_a_dense_mask(kv, prefill_chunk, nano_engine_bundle, nano_reference):
    config = CacheConfig.parse(kv)
    model = VisionLanguageModel.open(nano_engine_bundle, prefill_chunk=prefill_chunk, cache=config)
    prompt = model.prompt(MESSAGES)
    assert len(prompt.token_ids) > 2 * config.window.length
    traced = trace(model, MESSAGES, FORCED)
    found = [traced[validation.PREFILL_LOGITS], *(traced[validation.decode_logits(i)] for i in range(len(FORCED)))]
    expected = dense_logits(nano_reference, prompt, FORCED, config)
    # As for any float32 engine.
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=0, atol=5e-4 * np.sqrt((expected**2).mean()))


def test_what_a_window_drops_is_seen_no_more(nano_engine_bundle):
    """Or the tests above would pass without one."""
    logits = [
        trace(VisionLanguageModel.open(nano_engine_bundle, cache=CacheConfig.parse(kv)), MESSAGES, [])
        for kv in ("f32", "f32,window=8+64", "f32,window=8+64,pin=image")
    ]
    whole, window, pinned = (outputs[validation.PREFILL_LOGITS] for outputs in logits)
    for one, other in ((whole, window), (whole, pinned), (window, pinned)):
        assert np.abs(one - other).max() > 1e-2


def seconds_of(pieces: Iterator[str]) -> float:
    """Of the next one."""
    start = time.perf_counter()
    next(pieces)
    return time.perf_counter() - start


def test_ten_thousand_tokens_in_constant_memory_and_time(nano_engine_bundle):
    """After them the picture that they began with is still described as at first."""
    picture = user(scene(1, 96, 64), "Describe the picture.")
    cache = CacheConfig.parse("f32,window=64+512,pin=image")
    model, other = (VisionLanguageModel.open(nano_engine_bundle, context_length=11_000, cache=cache) for _ in range(2))
    described = answer(model, [picture], 60).text
    nbytes, finite = model._session.nbytes, model.generation_config
    model.generation_config = other.generation_config = dataclasses.replace(finite, eos_token_ids=frozenset())
    sampling = SamplingParams(temperature=0.7, seed=1)
    generation, younger = model.generate([picture], sampling, 10_000), other.generate([picture], sampling, 2_000)
    old, young = iter(generation), iter(younger)
    for pieces, one, tokens in ((old, generation, 9_000), (young, younger, 1_000)):
        while len(one.token_ids) < tokens:
            next(pieces)
    # In turn, so that what else the machine does delays both. A full cache would take several times as long.
    last, first = np.median([[seconds_of(pieces) for pieces in (old, young)] for _ in range(200)], axis=0)
    assert last < 1.5 * first
    for _ in old:
        pass
    model.generation_config = finite
    assert len(generation.token_ids) == 10_000
    assert model._session.nbytes == nbytes == model.cache_config.nbytes(model.config.text, 11_000, PINNED_SLOTS)
    again = answer(model, [picture, assistant(generation.text), user("Describe the picture.")], 60)
    assert again.prompt_tokens > 9_000
    assert again.text == described


@pytest.mark.parametrize("kv", ["f32", "f32,window=8+64,pin=image", "f32,window=5+200"])
def test_conversations_in_one_session_answer_as_alone(kv, nano_engine_bundle):
    """Two of them in pages out of order of one pool: one that keeps all beside one with a window, pinned tokens in it.

    They are appended in turn, truncated, and one begins anew with the other's first tokens.
    """
    config, whole = CacheConfig.parse(kv), CacheConfig.parse("f32")
    model = VisionLanguageModel.open(nano_engine_bundle, prefill_chunk=50)
    prompt = model.prompt([user(FILLER)])
    tokens, positions = prompt.token_ids[:420], prompt.position_ids[:, :420]
    pinned = np.isin(np.arange(420), np.arange(20, 60)) & config.pin_images

    def run(session, cache, *chunks):
        logits = []
        for chunk in chunks:
            with cache.appending(tokens[chunk], pinned[chunk]) as placement:
                step = session.step([model.steps.new_tokens(tokens[chunk], positions[:, chunk], placement)])
            logits.append(step[bindings.LOGITS])
        return logits

    def alone(config, *chunks):
        session = model.engine.open_session(512)
        return run(session, KVCache(session, config, 512), *chunks)

    chunks = [slice(start, min(start + 50, 410)) for start in range(0, 410, 50)]
    chunks += [slice(i, i + 1) for i in range(410, 420)]
    expected, expected_whole = alone(config, *chunks), alone(whole, *chunks)

    session = model.engine.open_session(512, 8)
    first = KVCache(session, config, 512, np.array([6, 1, 4, 3], np.int32))
    other = KVCache(session, whole, 512, np.array([5, 7, 0, 2], np.int32))
    assert first.capacity == other.capacity == 512
    found, found_whole = [], []
    for chunk in chunks:
        found += run(session, first, chunk)
        found_whole += run(session, other, chunk)
        # Forgotten at once.
        if chunk.start < 410:
            run(session, other, slice(chunk.stop, chunk.stop + 5))
            assert other.truncate(chunk.stop) == chunk.stop
    np.testing.assert_array_equal(np.concatenate(found), np.concatenate(expected))
    np.testing.assert_array_equal(np.concatenate(found_whole), np.concatenate(expected_whole))

    rows, identities = other.rows(150), other.identities[:150]
    keeps = config.window is None or config.window.length > 150
    assert first.keeps(pinned[:150]) == keeps
    if keeps:
        first.truncate(0)
        session.write(np.array(first.pages[: pages_of(150)]), rows)
        first.begin(identities, pinned[:150])
        rest = [slice(start, min(start + 50, 410)) for start in range(150, 410, 50)] + chunks[-10:]
        again = np.concatenate(run(session, first, *rest))
        np.testing.assert_array_equal(again, np.concatenate(alone(config, *chunks)[3:]))
    more = run(session, other, slice(0, 1))
    np.testing.assert_array_equal(more[0], alone(whole, *chunks, slice(0, 1))[-1])
