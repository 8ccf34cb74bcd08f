"""The cache of a host session: what is appended is what the decoder reads."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pascalvl.engines import Engine
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.model_config import TextConfig

CONFIG = TextConfig(
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    mrope_section=(2, 1, 1),
    rope_inv_freq=(1.0, 0.5, 0.25, 0.125),
    rope_attention_scaling=1.0,
)
MODEL = SimpleNamespace(text=CONFIG, num_deepstack=1)
CAPACITY = 20


class RandomEngine(Engine):
    """Returns random outputs; ``feeds`` and ``outputs`` are those of its last run."""

    def __init__(self, kv_format):
        super().__init__(Path(), SimpleNamespace(model=MODEL, kv_format=kv_format))
        self.rng = np.random.default_rng(0)
        self.lacks = None

    def run(self, graph, feeds):
        assert graph == bindings.DECODER
        sizes = {"batch": 1, "seq": feeds[bindings.INPUTS_EMBEDS].shape[1]}
        outputs = {
            b.name: self.rng.standard_normal([sizes.get(d, d) for d in b.shape], np.float32)
            for b in bindings.decoder_outputs(MODEL)
            if b.name != self.lacks
        }
        self.feeds, self.outputs = feeds, dict(outputs)
        return outputs


def _feeds(tokens):
    rope = np.zeros((1, tokens, CONFIG.head_dim), np.float32)
    embeds = np.zeros((1, tokens, CONFIG.hidden_size), np.float32)
    return {bindings.INPUTS_EMBEDS: embeds, bindings.ROPE_COS: rope, bindings.ROPE_SIN: rope}


def _prefill(session, tokens):
    return session.prefill({**_feeds(tokens), bindings.DEEPSTACK_EMBEDS: np.zeros((1, 1, tokens, 8), np.float32)})


def _past_names():
    return [
        (past(layer), new(layer))
        for layer in range(3)
        for past, new in ((bindings.past_key, bindings.new_key), (bindings.past_value, bindings.new_value))
    ]


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_rows_are_where_the_decoder_reads_them(kv_format):
    engine = RandomEngine(kv_format)
    session = engine.open_session(CAPACITY)
    assert _prefill(session, 5).keys() == {bindings.LOGITS}
    first = engine.outputs
    assert engine.feeds[bindings.PAST_LENGTH].tolist() == [0]
    logits = session.decode(_feeds(1))
    second = engine.outputs
    np.testing.assert_array_equal(logits, second[bindings.LOGITS])
    assert session.length == 6
    _prefill(session, 2)
    assert engine.feeds[bindings.PAST_LENGTH].tolist() == [6]
    for past, new in _past_names():
        expected = np.concatenate([first[new], second[new]], axis=2).astype(kv_format.dtype)
        rows = engine.feeds[past]
        assert rows.dtype == kv_format.dtype
        assert rows.shape == (1, 2, CAPACITY, 8)
        assert rows.flags.c_contiguous
        np.testing.assert_array_equal(rows[:, :, :6], expected)


def test_feeds_are_the_decoders_inputs():
    engine = RandomEngine(KVFormat.F16)
    session = engine.open_session(CAPACITY)
    expected = {b.name: b for b in bindings.decoder_inputs(MODEL, KVFormat.F16)}
    for run in (lambda: _prefill(session, 3), lambda: session.decode(_feeds(1))):
        run()
        assert engine.feeds.keys() == expected.keys()
        assert all(engine.feeds[name].dtype == binding.dtype for name, binding in expected.items())
        assert engine.feeds[bindings.DEEPSTACK_EMBEDS].shape[2] == engine.feeds[bindings.INPUTS_EMBEDS].shape[1]


def test_truncated_rows_are_overwritten():
    engine = RandomEngine(KVFormat.F32)
    session = engine.open_session(CAPACITY)
    _prefill(session, 6)
    first = engine.outputs
    session.truncate(3)
    assert session.length == 3
    session.truncate(5)
    assert session.length == 3
    _prefill(session, 2)
    for past, new in _past_names():
        expected = np.concatenate([first[new][:, :, :3], engine.outputs[new]], axis=2)
        np.testing.assert_array_equal(engine.feeds[past][:, :, :5], expected)


def test_greedy_takes_the_first_of_equal_logits(monkeypatch):
    session = RandomEngine(KVFormat.F32).open_session(CAPACITY)
    for logits, expected in (([0.5, 2, 1, 2], (1, 2.0)), ([1, np.nan, 3, 0], (1, np.nan))):
        monkeypatch.setattr(session, "decode", lambda _, logits=logits: np.array([logits], np.float32))
        np.testing.assert_equal(session.decode_greedy({}), expected)


def test_interrupted_append_leaves_the_cache_as_it_was():
    engine = RandomEngine(KVFormat.F32)
    session = engine.open_session(CAPACITY)
    _prefill(session, 4)
    before = {past: engine.feeds[past][:, :, :4].copy() for past, _ in _past_names()}
    engine.lacks = bindings.new_value(2)
    with pytest.raises(KeyError):
        _prefill(session, 2)
    assert session.length == 4
    for name, value in before.items():
        np.testing.assert_array_equal(engine.feeds[name][:, :, :4], value)


def test_bytes():
    assert KVFormat.F32.bytes_per_token(CONFIG) == 2 * 3 * 2 * 8 * 4
    assert KVFormat.F16.bytes_per_token(CONFIG) == 2 * 3 * 2 * 8 * 2
    assert RandomEngine(KVFormat.F16).open_session(CAPACITY).nbytes == CAPACITY * KVFormat.F16.bytes_per_token(CONFIG)


def test_more_context_than_memory():
    with pytest.raises(UserError, match=r"context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        RandomEngine(KVFormat.F32).open_session(1 << 45)
