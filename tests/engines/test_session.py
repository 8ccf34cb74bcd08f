"""The cache of a host session: what is appended is what the decoder reads."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines import Engine
from pascalvl.engines.session import ALWAYS_VISIBLE, Features, Placement, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.model_config import TextConfig
from tests.engines.decoder import CACHES

CONFIG = TextConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    max_position_embeddings=64,
    mrope_section=(24, 20, 20),
    rope_inv_freq=(0.5,) * 64,
    rope_attention_scaling=1.0,
    value_dims=(128, 96, 128, 64),
)
MODEL = SimpleNamespace(text=CONFIG, num_deepstack=1)
CAPACITY = 19


class RandomEngine(Engine):
    """Returns random outputs; ``feeds`` and ``outputs`` are those of its last run."""

    def __init__(self, kv):
        super().__init__(Path(), SimpleNamespace(model=MODEL, kv_cache=CacheConfig.parse(kv)))
        self.rng = np.random.default_rng(0)

    def run(self, graph, feeds):
        assert graph == bindings.DECODER
        sizes = {"batch": 1, "seq": feeds[bindings.INPUTS_EMBEDS].shape[1], "rows": len(feeds[bindings.LOGIT_ROWS])}
        outputs = {
            b.name: self.rng.integers(-(1 << 31), 1 << 31, [sizes.get(d, d) for d in b.shape]).astype(b.dtype)
            for b in bindings.decoder_outputs(MODEL, self.manifest.kv_cache)
        }
        self.feeds, self.outputs = feeds, dict(outputs)
        return outputs


def _feeds(tokens):
    rope = np.zeros((1, tokens, CONFIG.head_dim), np.float32)
    embeds = np.zeros((1, tokens, CONFIG.hidden_size), np.float32)
    return {bindings.INPUTS_EMBEDS: embeds, bindings.ROPE_COS: rope, bindings.ROPE_SIN: rope}


def _placement(past_length, slots, **options):
    return Placement(past_length, np.array(slots, np.int32), **options)


def _prefill(session, placement, visuals=()):
    return session.prefill(_feeds(len(placement.slots)), placement, visuals)


def _stored(engine, session, slots):
    """What the decoder reads in ``slots``, by the names of new rows."""
    for layer, layout in enumerate(session.layouts):
        inputs = bindings.cache_inputs(MODEL, session.cache, layer)
        new = bindings.new_rows(MODEL, session.cache, layer)
        assert len(inputs) == 2 + layout.kv_format.is_quantised
        for past, rows in zip(inputs, new, strict=True):
            found = engine.feeds[past.name]
            assert found.flags.c_contiguous
            assert found.dtype == past.dtype == rows.dtype
            assert found.shape[:3] == (1, 2, CAPACITY)
            yield rows.name, found[:, :, slots]


@pytest.mark.parametrize("kv", CACHES)
def test_rows_are_where_the_decoder_reads_them(kv):
    engine = RandomEngine(kv)
    session = engine.open_session(CAPACITY)
    assert _prefill(session, _placement(0, [4, 9, -1, 2])).keys() == {bindings.LOGITS}
    first = engine.outputs
    logits = session.decode(_feeds(1), _placement(7, [0]))
    second = engine.outputs
    np.testing.assert_array_equal(logits, second[bindings.LOGITS])
    assert engine.feeds[bindings.PAST_LENGTH].tolist() == [7]
    for name, found in _stored(engine, session, [4, 9, 2, 0]):
        expected = np.concatenate([first[name][:, :, [0, 1, 3]], second[name]], axis=2)
        np.testing.assert_array_equal(found, expected)


def test_visuals_take_the_place_of_embeddings():
    engine = RandomEngine("f32")
    session = engine.open_session(CAPACITY)
    rng = np.random.default_rng(0)
    features = [Features(rng.standard_normal((n, 8)), rng.standard_normal((1, n, 8))) for n in (4, 3)]
    visuals = [
        VisualRows(features[0], slice(2, 4), np.array([1, 2])),
        VisualRows(features[1], slice(0, 3), np.array([4, 5, 7])),
    ]
    text = _feeds(8)[bindings.INPUTS_EMBEDS].copy()
    _prefill(session, _placement(0, range(8)), visuals)
    embeds, levels = text.copy(), np.zeros((1, 1, 8, 8), np.float32)
    embeds[0, [1, 2]], levels[0, 0, [1, 2]] = features[0].embeds[2:], features[0].levels[0, 2:]
    embeds[0, [4, 5, 7]], levels[0, 0, [4, 5, 7]] = features[1].embeds, features[1].levels[0]
    np.testing.assert_array_equal(engine.feeds[bindings.INPUTS_EMBEDS], embeds)
    np.testing.assert_array_equal(engine.feeds[bindings.DEEPSTACK_EMBEDS], levels)
    session.decode(_feeds(1), _placement(8, [8]))
    assert not engine.feeds[bindings.DEEPSTACK_EMBEDS].any()


@pytest.mark.parametrize("kv", CACHES)
def test_feeds_are_the_decoders_inputs(kv):
    engine = RandomEngine(kv)
    session = engine.open_session(CAPACITY)
    expected = {b.name: b for b in bindings.decoder_inputs(MODEL, session.cache)}
    visible = np.full(CAPACITY, 2, np.int32)
    for run in (
        lambda: _prefill(session, _placement(0, [0], visible=visible)),
        lambda: session.decode(_feeds(1), _placement(1, [1])),
    ):
        run()
        assert engine.feeds.keys() == expected.keys()
        assert all(engine.feeds[name].dtype == binding.dtype for name, binding in expected.items())
        assert engine.feeds[bindings.DEEPSTACK_EMBEDS].shape[2] == engine.feeds[bindings.INPUTS_EMBEDS].shape[1]
    assert engine.feeds[bindings.PAST_VISIBLE].tolist() == [[ALWAYS_VISIBLE]]


@pytest.mark.parametrize("kv", CACHES)
def test_slots_can_be_copied_elsewhere(kv):
    engine = RandomEngine(kv)
    session, other = engine.open_session(CAPACITY), engine.open_session(CAPACITY)
    _prefill(session, _placement(0, [5, 6, 7]))
    _prefill(session, _placement(0, [0, 0, 0]))
    expected = dict(_stored(engine, session, [7, 5]))
    other.write(np.array([1, 2]), session.read(np.array([7, 5, 6])))
    _prefill(other, _placement(0, [0, 0, 0]))
    for name, found in _stored(engine, other, [1, 2]):
        np.testing.assert_array_equal(found, expected[name])


def test_greedy_takes_the_first_of_equal_logits(monkeypatch):
    session = RandomEngine("f32").open_session(CAPACITY)
    for logits, expected in (([0.5, 2, 1, 2], (1, 2.0)), ([1, np.nan, 3, 0], (1, np.nan))):
        monkeypatch.setattr(session, "decode", lambda *_, logits=logits: np.array([logits], np.float32))
        np.testing.assert_equal(session.decode_greedy({}, None), expected)


@pytest.mark.parametrize("kv", CACHES)
def test_bytes_are_those_foretold(kv):
    session = RandomEngine(kv).open_session(CAPACITY)
    assert session.nbytes == session.cache.nbytes(CONFIG, CAPACITY)


def test_more_context_than_memory():
    with pytest.raises(UserError, match=r"context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        RandomEngine("f32").open_session(1 << 45)
