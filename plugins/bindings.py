"""Names, types and shapes of the inputs and outputs of the two engines, used by export, build and runtime.

Dimensions that vary between calls are strings; equal strings are equal lengths.

The engines are pure functions. The decoder takes the tokens of several sequences, one behind the other, reads the
pool of pages (``past_key.i``, ``past_value.i``) where ``page_table`` has each sequence's, and returns the rows of this
call's tokens, in the cache's format, for the runtime to append. `pascalvl.plugins.ops.flash_attention.op` tells what
each of these tensors means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pascalvl.plugins.kv_format import PAGE_SLOTS, CacheConfig
from pascalvl.plugins.model_config import ModelConfig

DECODER = "decoder"
VISION = "vision"

INPUTS_EMBEDS = "inputs_embeds"
ROPE_COS = "rope_cos"
ROPE_SIN = "rope_sin"
DEEPSTACK_EMBEDS = "deepstack_embeds"
PAST_LENGTH = "past_length"
PAGE_TABLE = "page_table"
PAST_VISIBLE = "past_visible"
LOGIT_ROWS = "logit_rows"
LOGITS = "logits"

PIXEL_VALUES = "pixel_values"
POSITION_EMBEDS = "position_embeds"
CU_SEQLENS = "cu_seqlens"
IMAGE_EMBEDS = "image_embeds"

PAGES = "pages"
"""Dimension of a pool."""
SEQUENCE_PAGES = "sequence_pages"
"""Dimension of `PAGE_TABLE`: pages that a sequence may have."""


def past_key(layer: int) -> str:
    return f"past_key.{layer}"


def past_value(layer: int) -> str:
    return f"past_value.{layer}"


def past_scale(layer: int) -> str:
    return f"past_scale.{layer}"


def new_key(layer: int) -> str:
    return f"new_key.{layer}"


def new_value(layer: int) -> str:
    return f"new_value.{layer}"


def new_scale(layer: int) -> str:
    return f"new_scale.{layer}"


def hidden_states(layer: int) -> str:
    """Name, inside the decoder graph, of decoder layer ``layer``'s output (after DeepStack): a mark for bisection."""
    return f"hidden_states.{layer}"


@dataclasses.dataclass(frozen=True)
class Binding:
    """One input or output: its name, element type and shape (a string is a dimension that varies between calls)."""

    name: str
    dtype: np.dtype
    """float32, or int32: all that an engine takes."""
    shape: tuple[int | str, ...]


def _float(name: str, *shape: int | str) -> Binding:
    return Binding(name, np.dtype(np.float32), shape)


def _int(name: str, *shape: int | str) -> Binding:
    return Binding(name, np.dtype(np.int32), shape)


def vision_inputs(config: ModelConfig) -> list[Binding]:
    vision = config.vision
    return [
        _float(PIXEL_VALUES, "patches", vision.patch_dim),
        _float(POSITION_EMBEDS, "patches", vision.hidden_size),
        _float(ROPE_COS, "patches", vision.head_dim),
        _float(ROPE_SIN, "patches", vision.head_dim),
        _int(CU_SEQLENS, "segments_plus_1"),
    ]


def vision_outputs(config: ModelConfig) -> list[Binding]:
    hidden = config.text.hidden_size
    return [
        _float(IMAGE_EMBEDS, "tokens", hidden),
        _float(DEEPSTACK_EMBEDS, config.num_deepstack, "tokens", hidden),
    ]


def decoder_inputs(config: ModelConfig, cache: CacheConfig) -> list[Binding]:
    text = config.text
    return [
        _float(INPUTS_EMBEDS, "tokens", text.hidden_size),
        _float(ROPE_COS, "tokens", text.head_dim),
        _float(ROPE_SIN, "tokens", text.head_dim),
        _float(DEEPSTACK_EMBEDS, config.num_deepstack, "tokens", text.hidden_size),
        _int(CU_SEQLENS, "batch_plus_1"),
        _int(PAST_LENGTH, "batch"),
        _int(PAGE_TABLE, "batch", SEQUENCE_PAGES),
        _int(PAST_VISIBLE, "batch", "visible_slots"),
        _int(LOGIT_ROWS, "rows"),
        *(binding for layer in range(text.num_hidden_layers) for binding in cache_inputs(config, cache, layer)),
    ]


def cache_inputs(config: ModelConfig, cache: CacheConfig, layer: int) -> list[Binding]:
    """The decoder's inputs that are a layer's pool, in the op's order."""
    heads = config.text.num_key_value_heads
    return _rows(config, cache, layer, (past_key, past_value, past_scale), (PAGES, heads, PAGE_SLOTS))


def new_rows(config: ModelConfig, cache: CacheConfig, layer: int) -> list[Binding]:
    """The decoder's outputs that go into a layer's pool as they are, in the order of `cache_inputs`."""
    heads = config.text.num_key_value_heads
    return _rows(config, cache, layer, (new_key, new_value, new_scale), (heads, "tokens"))


def _rows(
    config: ModelConfig,
    cache: CacheConfig,
    layer: int,
    names: tuple[Callable[[int], str], ...],
    lead: tuple[int | str, ...],
) -> list[Binding]:
    """Keys, values and, where they are quantised, scales of a layer: rows ``[*lead, row]``."""
    layout = cache.layers(config.text)[layer]
    rows = [
        Binding(name(layer), row.dtype, (*lead, elements))
        for name, row, elements in zip(names[:2], layout.kv_format.rows, layout.row_elements, strict=True)
    ]
    return [*rows, _int(names[2](layer), *lead)] if layout.kv_format.is_quantised else rows


def decoder_outputs(config: ModelConfig, cache: CacheConfig) -> list[Binding]:
    """Logits of the tokens that `LOGIT_ROWS` numbers, over all sequences, and this call's keys and values as the cache
    has them."""
    text = config.text
    return [
        _float(LOGITS, "rows", text.vocab_size),
        *(binding for layer in range(text.num_hidden_layers) for binding in new_rows(config, cache, layer)),
    ]


def decoder_hidden_states(config: ModelConfig) -> list[Binding]:
    """What a decoder with marked layers returns besides, see `hidden_states`."""
    text = config.text
    return [_float(hidden_states(i), "tokens", text.hidden_size) for i in range(text.num_hidden_layers)]
