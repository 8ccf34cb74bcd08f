"""Inputs for decoders, and sequences at work in sessions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pascalvl.engines import Session
from pascalvl.engines.engine import NewTokens, Placement
from pascalvl.plugins import bindings
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig, pages_of
from pascalvl.plugins.kv_rows import compress
from pascalvl.plugins.model_config import ModelConfig, TextConfig
from pascalvl.runtime.kv_cache import KVCache
from tests.plugins.ops.flash_attention.reference import read_rows, scale_words

CACHES = ["f32", "f16", "k8v8", "k8v4", "k4v4", "k4v4,layer.0-1=f16,layer.3=k8v8"]
"""Of every kind."""


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """Embeddings as they are."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def read(self, to: np.ndarray) -> None:
        to[:] = self.array


def random_tokens(text: TextConfig, placement: Placement, rng: np.random.Generator, **options: object) -> NewTokens:
    """Tokens of text for the places given, with random embeddings and rotations."""
    widths = text.hidden_size, text.head_dim, text.head_dim
    seq = len(placement.slots)
    embeds, *rope = (rng.standard_normal((seq, width)).astype(np.float32) / 2 for width in widths)
    return NewTokens(Given(embeds), *rope, placement, **options)


def random_pool(model: ModelConfig, cache: CacheConfig, pages: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The pool's tensors by name, of random keys and values in its format."""
    pool = {}
    for layer, layout in enumerate(cache.layers(model.text)):
        scales = []
        for name, row, dim in zip(
            (bindings.past_key, bindings.past_value), layout.kv_format.rows, layout.dims, strict=True
        ):
            rows = rng.standard_normal((pages, layout.num_kv_heads, PAGE_SLOTS, dim)).astype(np.float32) / 2
            pool[name(layer)], scale = compress(rows, row)
            scales.append(scale)
        if layout.kv_format.is_quantised:
            pool[bindings.past_scale(layer)] = scale_words(*scales)
    return pool


def decoder_feeds(manifest: Manifest, seq: int, capacity: int, past: int) -> dict[str, np.ndarray]:
    """Random inputs of one sequence, its cache's among them, in its format; its last page is the pool's first."""
    rng = np.random.default_rng(0)
    pages = pages_of(capacity)
    feeds: dict[str, np.ndarray] = {}
    for binding in bindings.decoder_inputs(manifest.model, manifest.kv_cache):
        if binding.dtype == np.float32 and bindings.PAGES not in binding.shape:
            shape = [seq if size == "tokens" else size for size in binding.shape]
            feeds[binding.name] = rng.standard_normal(shape).astype(np.float32) / 2
    feeds |= random_pool(manifest.model, manifest.kv_cache, pages, rng)
    integers = {
        bindings.CU_SEQLENS: [0, seq],
        bindings.PAST_LENGTH: [past],
        bindings.PAGE_TABLE: [list(range(pages))[::-1]],
        bindings.PAST_VISIBLE: [[seq]],
        bindings.LOGIT_ROWS: [seq - 1],
    }
    return feeds | {name: np.array(values, np.int32) for name, values in integers.items()}


def floats_of(model: ModelConfig, cache: CacheConfig, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A decoder's outputs, by their names, with new keys and values read as the cache gives them back."""
    read = {name: array for name, array in outputs.items() if not name.startswith("new_scale.")}
    for layer, layout in enumerate(cache.layers(model.text)):
        names = bindings.new_key(layer), bindings.new_value(layer)
        rows = {binding.name: outputs[binding.name] for binding in bindings.new_rows(model, cache, layer)}
        rows = {name.removesuffix(f".{layer}"): array for name, array in rows.items()}
        read |= dict(zip(names, read_rows(layout, rows, "new"), strict=True))
    return read


class Conversation:
    """A sequence of a session, with the cache that places its tokens."""

    def __init__(self, session: Session, pages: Sequence[int] | None = None) -> None:
        self.session = session
        self.cache = KVCache(session, session.cache, 1024, None if pages is None else np.array(pages, np.int32))

    @contextlib.contextmanager
    def appending(self, seq: int, seed: int) -> Iterator[NewTokens]:
        """Give random tokens their places; inside, run them."""
        with self.cache.appending(np.zeros(seq, np.int64)) as placement:
            yield random_tokens(self.session.model.text, placement, np.random.default_rng(seed))

    def step(self, seq: int, seed: int) -> dict[str, np.ndarray]:
        with self.appending(seq, seed) as tokens:
            return self.session.step([tokens])

    def choose(self, seq: int, seed: int) -> tuple[int, float]:
        with self.appending(seq, seed) as tokens:
            (choice,) = self.session.choose([tokens])
            return choice
