"""Names, types and shapes of the inputs and outputs of the two engines, used by export, build and runtime.

Dimensions that vary between calls are strings; equal strings are equal lengths.

The engines are pure functions. The decoder reads the cache (``past_key.i``, ``past_value.i``: the whole capacity, of
which the first ``past_length`` rows of a sequence are valid) and returns the keys and values of this call's tokens
for the runtime to append. `pascalvl.plugins.ops.flash_attention.op` tells what each of the cache's tensors means.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pascalvl.plugins.kv_format import HALVES_PER_WORD, CacheConfig
from pascalvl.plugins.model_config import ModelConfig

DECODER = "decoder"
VISION = "vision"

INPUTS_EMBEDS = "inputs_embeds"
ROPE_COS = "rope_cos"
ROPE_SIN = "rope_sin"
DEEPSTACK_EMBEDS = "deepstack_embeds"
PAST_LENGTH = "past_length"
PAST_VISIBLE = "past_visible"
LOGITS = "logits"

PIXEL_VALUES = "pixel_values"
POSITION_EMBEDS = "position_embeds"
CU_SEQLENS = "cu_seqlens"
IMAGE_EMBEDS = "image_embeds"

CAPACITY, CAPACITY_WORDS = "capacity", "capacity_words"
"""Dimensions of a cache: its slots, an even number, and half as many words of a half for each."""


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
    content: np.dtype | None = None
    """What the bytes of int32 words are, where that is not int32: halves, or bytes that hold codes."""

    @property
    def slot_axis(self) -> int | None:
        """The axis of a cache's tensor along which slots lie, in its `content_of`; None: of other tensors."""
        return next((axis for axis, size in enumerate(self.shape) if size in (CAPACITY, CAPACITY_WORDS)), None)

    def content_of(self, array: np.ndarray) -> np.ndarray:
        """A view of the tensor's elements: halves of words of halves, else as it is."""
        return array.view(self.content) if self.content == np.float16 else array


def _float(name: str, *shape: int | str) -> Binding:
    return Binding(name, np.dtype(np.float32), shape)


def _int(name: str, *shape: int | str) -> Binding:
    return Binding(name, np.dtype(np.int32), shape)


def _halves(name: str, *shape: int | str) -> Binding:
    return Binding(name, np.dtype(np.int32), shape, np.dtype(np.float16))


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
        _float(INPUTS_EMBEDS, "batch", "seq", text.hidden_size),
        _float(ROPE_COS, "batch", "seq", text.head_dim),
        _float(ROPE_SIN, "batch", "seq", text.head_dim),
        _float(DEEPSTACK_EMBEDS, config.num_deepstack, "batch", "seq", text.hidden_size),
        _int(PAST_LENGTH, "batch"),
        _int(PAST_VISIBLE, "batch", "visible_slots"),
        *(binding for layer in range(text.num_hidden_layers) for binding in cache_inputs(config, cache, layer)),
    ]


def cache_inputs(config: ModelConfig, cache: CacheConfig, layer: int) -> list[Binding]:
    """The decoder's inputs that are a layer's cache, in the op's order."""
    layout = cache.layers(config.text)[layer]
    heads = layout.num_kv_heads
    inputs = [
        Binding(name(layer), row.dtype, ("batch", heads, CAPACITY, elements), row.content)
        for name, row, elements in zip((past_key, past_value), layout.kv_format.rows, layout.row_elements, strict=True)
    ]
    if layout.kv_format.is_quantised:
        inputs.append(_halves(past_scale(layer), 2, "batch", heads, CAPACITY_WORDS))
    return inputs


def cache_sizes(capacity: int) -> dict[str, int]:
    """The dimensions that a cache's slots give: ``capacity``, which is even, and the words of a row of halves."""
    return {CAPACITY: capacity, CAPACITY_WORDS: capacity // HALVES_PER_WORD}


def decoder_outputs(config: ModelConfig) -> list[Binding]:
    """Logits of the last position, and this call's keys (after RoPE) and values, uncompressed."""
    text = config.text
    return [
        _float(LOGITS, "batch", text.vocab_size),
        *(
            _float(name(layer), "batch", text.num_key_value_heads, "seq", dim)
            for layer, value_dim in enumerate(text.value_dims)
            for name, dim in ((new_key, text.head_dim), (new_value, value_dim))
        ),
    ]


def decoder_hidden_states(config: ModelConfig) -> list[Binding]:
    """What a decoder with marked layers returns besides, see `hidden_states`."""
    text = config.text
    return [_float(hidden_states(i), "batch", "seq", text.hidden_size) for i in range(text.num_hidden_layers)]
