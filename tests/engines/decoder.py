"""Inputs for decoders, and sessions at work with the runtime's own cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pascalvl.engines import Session
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.kv_format import CacheConfig
from pascalvl.plugins.kv_rows import compress
from pascalvl.plugins.model_config import ModelConfig
from pascalvl.runtime.kv_cache import KVCache
from tests.plugins.ops.flash_attention.reference import read_rows, scale_words

CACHES = ["f32", "f16", "k8v8", "k8v4", "k4v4", "k4v4,layer.0-1=f16,layer.3=k8v8"]
"""Of every kind."""
STEP = (bindings.INPUTS_EMBEDS, bindings.ROPE_COS, bindings.ROPE_SIN)


def decoder_feeds(manifest: Manifest, seq: int, capacity: int, past: int) -> dict[str, np.ndarray]:
    """Random inputs, the cache's among them, in its format."""
    rng = np.random.default_rng(0)
    cache = manifest.kv_cache
    sizes = {"batch": 1, "seq": seq, bindings.CAPACITY: capacity, "visible_slots": 1}
    feeds = {}
    for binding in bindings.decoder_inputs(manifest.model, cache):
        if binding.dtype == np.float32:
            shape = [sizes.get(size, size) for size in binding.shape]
            feeds[binding.name] = rng.standard_normal(shape).astype(np.float32) / 2
    for layer, layout in enumerate(cache.layers(manifest.model.text)):
        scales = []
        for name, row, dim in zip(
            (bindings.past_key, bindings.past_value), layout.kv_format.rows, layout.dims, strict=True
        ):
            new = rng.standard_normal((1, layout.num_kv_heads, capacity, dim)).astype(np.float32) / 2
            feeds[name(layer)], scale = compress(new, row)
            scales.append(scale)
        if layout.kv_format.is_quantised:
            feeds[bindings.past_scale(layer)] = scale_words(*scales)
    feeds |= {bindings.PAST_LENGTH: np.array([past], np.int32), bindings.PAST_VISIBLE: np.array([[seq]], np.int32)}
    return {**feeds, bindings.LOGIT_ROWS: np.array([seq - 1], np.int32)}


def floats_of(model: ModelConfig, cache: CacheConfig, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A decoder's outputs, by their names, with new keys and values read as the cache gives them back."""
    read = {name: array for name, array in outputs.items() if not name.startswith("new_scale.")}
    for layer, layout in enumerate(cache.layers(model.text)):
        names = bindings.new_key(layer), bindings.new_value(layer)
        rows = {binding.name: outputs[binding.name] for binding in bindings.new_rows(model, cache, layer)}
        rows = {name.removesuffix(f".{layer}"): array for name, array in rows.items()}
        read |= dict(zip(names, read_rows(layout, rows, "new"), strict=True))
    return read


class Sequence:
    """A session with the cache that places its tokens."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.cache = KVCache(session, session.cache, 64)

    def prefill(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tokens = feeds[bindings.INPUTS_EMBEDS].shape[1]
        with self.cache.appending(np.zeros(tokens, np.int64)) as placement:
            return self.session.prefill(feeds, placement)

    def decode(self, feeds: dict[str, np.ndarray]) -> np.ndarray:
        with self.cache.appending(np.zeros(1, np.int64)) as placement:
            return self.session.decode({name: feeds[name] for name in STEP}, placement)

    def decode_greedy(self, feeds: dict[str, np.ndarray]) -> tuple[int, float]:
        with self.cache.appending(np.zeros(1, np.int64)) as placement:
            return self.session.decode_greedy({name: feeds[name] for name in STEP}, placement)
