"""The external cache: what is appended is what the decoder reads, and the prefix that two prompts share."""

import dataclasses

import numpy as np
import pytest

from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.model_config import TextConfig
from pascalvl.runtime.kv_cache import KVCache

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
CAPACITY = 20


def _outputs(rng, tokens):
    names = [name(layer) for layer in range(3) for name in (bindings.new_key, bindings.new_value)]
    return {name: rng.standard_normal((1, 2, tokens, 8), np.float32) for name in names}


def _past_names():
    return [
        (past(layer), new(layer))
        for layer in range(3)
        for past, new in ((bindings.past_key, bindings.new_key), (bindings.past_value, bindings.new_value))
    ]


@pytest.mark.parametrize("kv_format", list(KVFormat))
def test_rows_are_where_the_decoder_reads_them(kv_format):
    rng = np.random.default_rng(0)
    cache = KVCache(CONFIG, kv_format, CAPACITY)
    feeds = cache.feeds
    first, second = _outputs(rng, 5), _outputs(rng, 1)
    cache.append(first, np.arange(5))
    cache.append(second, np.arange(1))
    assert cache.length == 6
    assert feeds[bindings.PAST_LENGTH].tolist() == [6]
    for past, new in _past_names():
        expected = np.concatenate([first[new], second[new]], axis=2).astype(kv_format.dtype)
        assert feeds[past].dtype == kv_format.dtype
        assert feeds[past].shape == (1, 2, CAPACITY, 8)
        assert feeds[past].flags.c_contiguous
        np.testing.assert_array_equal(feeds[past][:, :, :6], expected)


def test_feeds_are_the_decoders_inputs():
    expected = {b.name: b for b in bindings.decoder_inputs(_model(), KVFormat.F16) if b.name.startswith("past")}
    cache = KVCache(CONFIG, KVFormat.F16, CAPACITY)
    assert cache.feeds.keys() == expected.keys()
    assert all(cache.feeds[name].dtype == expected[name].dtype for name in expected)


def _model():
    @dataclasses.dataclass
    class Model:
        text: TextConfig
        num_deepstack: int = 1

    return Model(CONFIG)


def test_truncated_rows_are_overwritten():
    rng = np.random.default_rng(1)
    cache = KVCache(CONFIG, KVFormat.F32, CAPACITY)
    first, second = _outputs(rng, 6), _outputs(rng, 2)
    cache.append(first, np.arange(6))
    cache.truncate(3)
    assert cache.length == 3
    cache.truncate(5)
    assert cache.length == 3
    cache.append(second, np.arange(2))
    for past, new in _past_names():
        expected = np.concatenate([first[new][:, :, :3], second[new]], axis=2)
        np.testing.assert_array_equal(cache.feeds[past][:, :, :5], expected)


def test_common_prefix():
    rng = np.random.default_rng(2)
    cache = KVCache(CONFIG, KVFormat.F32, CAPACITY)
    assert cache.common_prefix(np.array([7, 8])) == 0
    cache.append(_outputs(rng, 4), np.array([7, -5, -6, 9]))
    assert cache.common_prefix(np.array([7, -5, -6, 9, 1, 2])) == 4
    assert cache.common_prefix(np.array([7, -5, 3, 9])) == 2
    assert cache.common_prefix(np.array([1])) == 0
    assert cache.common_prefix(np.array([7, -5])) == 2
    cache.truncate(1)
    assert cache.common_prefix(np.array([7, -5, -6, 9])) == 1


def test_interrupted_append_leaves_the_cache_as_it_was():
    rng = np.random.default_rng(3)
    cache = KVCache(CONFIG, KVFormat.F32, CAPACITY)
    cache.append(_outputs(rng, 4), np.arange(4))
    before = {name: value[:, :, :4].copy() for name, value in cache.feeds.items() if value.ndim == 4}
    partial = _outputs(rng, 2)
    del partial[bindings.new_value(2)]
    with pytest.raises(KeyError):
        cache.append(partial, np.arange(2))
    assert cache.length == 4
    for name, value in before.items():
        np.testing.assert_array_equal(cache.feeds[name][:, :, :4], value)


def test_bytes():
    assert KVCache.bytes_per_token(CONFIG, KVFormat.F32) == 2 * 3 * 2 * 8 * 4
    assert KVCache.bytes_per_token(CONFIG, KVFormat.F16) == 2 * 3 * 2 * 8 * 2
    cache = KVCache(CONFIG, KVFormat.F16, CAPACITY)
    assert cache.nbytes == CAPACITY * KVCache.bytes_per_token(CONFIG, KVFormat.F16)


def test_more_context_than_memory():
    with pytest.raises(UserError, match=r"context of \d+ tokens needs [\d.]+ GB for its KV cache"):
        KVCache(CONFIG, KVFormat.F32, 1 << 45)
