"""Several sequences in one step, on every backend that runs here: what each of them gives alone."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pascalvl.engines import Session, open_engine
from pascalvl.engines.engine import ALWAYS_VISIBLE, NewTokens, Placement
from pascalvl.plugins import bindings
from pascalvl.plugins.kv_format import PAGE_SLOTS
from tests.engines.batches import CAPACITY, DECODES, POOL, alone, changed, decodes, fresh_pool, places
from tests.engines.decoder import random_tokens

pytestmark = pytest.mark.usefixtures("cuda_anywhere")
BACKENDS = ["onnxruntime", "torch", "cuda", "reference"]
"""All but the first run the kernels on the emulator: few sequences there; `tests/plugins/kernels/test_sequences.py` has
eight, in every format."""
CHUNK_PAGES, CHUNK_PAST = (16, 13), 126
"""Of a chunk of a prompt beside them."""


@pytest.fixture(scope="module", params=BACKENDS)
def sessions(request, nano_engine, cuda_anywhere):
    """A session by the cache's format."""

    @functools.cache
    def opened(kv: str) -> Session:
        if kv != "f32" and request.param != "onnxruntime":
            pytest.skip("takes too long on the emulator")
        engine = open_engine(nano_engine(kv, request.param), marked_layers=True)
        return engine.open_session(CAPACITY, POOL)

    return opened


def chunk(session: Session) -> NewTokens:
    """Of a prompt: over the bound of a page, one of its tokens kept nowhere, slots of its past seen by some."""
    visible = np.full(len(CHUNK_PAGES) * PAGE_SLOTS, ALWAYS_VISIBLE, np.int32)
    visible[5:40] = np.arange(35) % 5
    slots = np.array([126, 127, -1, 128], np.int32)
    placement = Placement(np.array(CHUNK_PAGES, np.int32), CHUNK_PAST, slots, visible)
    return random_tokens(session.model.text, placement, np.random.default_rng(99), rows=(1, 3))


@pytest.mark.parametrize(("kv", "count"), [("f32", 3), ("k8v4", 8)])
def test_decode_steps_equal_single_ones_to_the_bit(kv, count, sessions):
    """Of three sequences, which TensorRT's runtime pads to four, and of as many as are padded at most."""
    session = sessions(kv)
    sequences = decodes(session)[:count]
    pool = fresh_pool(session)
    expected = alone(session, sequences)
    stored = session.read(np.arange(POOL))
    fresh_pool(session)
    found = session.step(sequences)
    assert found.keys() == expected.keys() > {bindings.LOGITS}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    for name, array in session.read(np.arange(POOL)).items():
        np.testing.assert_array_equal(array, stored[name], err_msg=name)
    assert changed(session, pool) == places(sequences)
    if count < len(DECODES):
        likeliest = [(row.argmax(), row.max()) for row in found[bindings.LOGITS]]
        assert session.choose(sequences) == likeliest


@pytest.mark.parametrize("kv", ["f32", "k8v4"])
def test_a_page_is_copied(kv, sessions):
    """All of its layers, and no other page changes."""
    session = sessions(kv)
    expected = fresh_pool(session)
    session.copy_page(2, 5)
    for name, array in session.read(np.arange(POOL)).items():
        expected[name][5] = expected[name][2]
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("kv", ["f32", "k8v4"])
def test_one_page_is_read_and_written(kv, sessions):
    """As it is among others."""
    session = sessions(kv)
    expected = fresh_pool(session)
    page = session.read(np.array([3]))
    for name, array in page.items():
        np.testing.assert_array_equal(array, expected[name][3:4], err_msg=name)
    session.write(np.array([6]), page)
    assert session.read(np.array([1])).keys() == page.keys()
    for name, array in session.read(np.arange(POOL)).items():
        expected[name][6] = expected[name][3]
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
        np.testing.assert_array_equal(page[name][0], expected[name][3], err_msg=name)  # a copy of its own


@pytest.mark.parametrize("kv", ["f32", "k8v4"])
def test_a_chunk_of_a_prompt_beside_decodes(kv, sessions):
    """Products of more rows are summed in other orders."""
    session = sessions(kv)
    one, *_, other = decodes(session)
    sequences = [one, chunk(session), other]
    fresh_pool(session)
    expected = alone(session, sequences)
    stored = session.read(np.arange(POOL))
    pool = fresh_pool(session)
    found = session.step(sequences)
    assert len(found[bindings.LOGITS]) == 4  # two are the chunk's
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
    assert changed(session, pool) == places(sequences)
    for name, array in session.read(np.arange(POOL)).items():
        if array.dtype == np.float32:  # codes may differ by one at ties
            np.testing.assert_allclose(array, stored[name], rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
    if kv == "f32":
        likeliest = [(row.argmax(), row.max()) for row in found[bindings.LOGITS]]
        assert session.choose(sequences) == likeliest
