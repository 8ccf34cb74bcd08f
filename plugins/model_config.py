"""The shape of a Qwen3-VL model: what engines and runtime must know of a checkpoint, and nothing more."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pascalvl.plugins.errors import shown

LARGEST = {
    "depth": 1000,
    "head_dim": 1 << 12,
    "hidden_size": 1 << 16,
    "in_channels": 3,
    "intermediate_size": 1 << 20,
    "max_position_embeddings": 1 << 24,
    "num_attention_heads": 1 << 10,
    "num_heads": 1 << 10,
    "num_hidden_layers": 1000,
    "num_key_value_heads": 1 << 10,
    "num_labels": 1 << 16,
    "num_position_embeddings": 1 << 20,
    "out_hidden_size": 1 << 16,
    "patch_size": 1 << 7,
    "spatial_merge_size": 1 << 3,
    "temporal_patch_size": 1 << 3,
    "vocab_size": 1 << 22,
}
"""By a size's name in a config: the most that it may be, which is more than any model has.

Loops and arrays are made of them, which a damaged config or manifest must not make endless.
"""
LONGEST_GRAMMAR = 10_000
"""Characters in which a cache or weights are described, at most: their parts are loops over layers, too."""
TOKEN_IDS = "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"
"""Of a config and of `ModelConfig`: numbers of the vocabulary's tokens."""


def check_sizes(config: Any) -> None:
    """Raise `ValueError` for a size in a checkpoint's ``config.json``, as read, that no model has.

    What is left out or null is up to whoever fills it in.
    """
    for part in (config, *(config.get(name, {}) for name in ("text_config", "vision_config"))):
        if not isinstance(part, dict):
            raise ValueError(f"text_config or vision_config is {shown(part)}, expected an object")
        for name in LARGEST.keys() & part.keys():
            if part[name] is not None:
                _check_size(name, part[name])


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Vision encoder: patches in, one embedding (and one per DeepStack level) for each merged block out."""

    depth: int
    hidden_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    """Side of a square patch, in pixels."""
    temporal_patch_size: int
    """Frames folded into one patch; a still picture is repeated."""
    spatial_merge_size: int
    """Side of the block of patches that becomes one token."""
    num_position_embeddings: int
    """Entries of the learned square position grid, interpolated to each picture's size."""
    deepstack_visual_indexes: tuple[int, ...]
    """Encoder layers whose features are added to the first decoder layers' outputs."""
    rope_inv_freq: tuple[float, ...]
    """Inverse frequencies of the axial rotary embedding, shared by rows and columns: ``[head_dim / 4]``."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        levels = self.deepstack_visual_indexes
        _check(self, "num_heads", self.hidden_size % (4 * self.num_heads) == 0, f"a divisor of {self.hidden_size} / 4")
        _check(self, "in_channels", self.in_channels == 3, "3, for RGB")
        _check(self, "num_position_embeddings", self.num_grid_per_side**2 == self.num_position_embeddings, "a square")
        _check_frequencies(self, self.head_dim / 4)
        _check(
            self,
            "deepstack_visual_indexes",
            len(levels) > 0 and list(levels) == sorted(set(levels)) and 0 <= levels[0] <= levels[-1] < self.depth,
            f"at least one layer of {self.depth}, in ascending order",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Length of a flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def num_grid_per_side(self) -> int:
        return round(self.num_position_embeddings**0.5)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Decoder: causal, grouped-query attention with interleaved M-RoPE.

    Like `VisionConfig`, raises `ValueError` for values that no model has.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    mrope_section: tuple[int, int, int]
    """Frequencies given to time, height and width; they interleave T, H, W, T, H, W, ... (Qwen3-VL report)."""
    rope_inv_freq: tuple[float, ...]
    """Inverse frequencies of the rotary embedding: ``[head_dim / 2]``."""
    rope_attention_scaling: float
    """Factor on cos and sin (1 unless the rope type scales attention)."""
    value_dims: tuple[int, ...]
    """Length of the values that each layer caches: `head_dim`, or the rank that they were exported with."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check(
            self,
            "num_key_value_heads",
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"a divisor of {self.num_attention_heads} attention heads",
        )
        _check_frequencies(self, self.head_dim / 2)
        _check(
            self,
            "mrope_section",
            len(self.mrope_section) == 3 and 2 * sum(self.mrope_section) == self.head_dim,
            "three numbers that sum to head_dim / 2",
        )
        _check(self, "rope_attention_scaling", self.rope_attention_scaling > 0, "a number above 0")
        dims = self.value_dims
        valid = len(dims) == self.num_hidden_layers and all(0 < dim <= self.head_dim for dim in dims)
        _check(self, "value_dims", valid, f"{self.num_hidden_layers} numbers from 1 to {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense Qwen3-VL model; like its parts, raises `ValueError` for values that no model has."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def __post_init__(self) -> None:
        for name in TOKEN_IDS:
            token_id, size = getattr(self, name), self.text.vocab_size
            valid = type(token_id) is int and 0 <= token_id < size
            _check(self, name, valid, f"the number of one of the vocabulary's {size} tokens")

    @property
    def num_deepstack(self) -> int:
        return len(self.vision.deepstack_visual_indexes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`; raises `ValueError`, `KeyError` or `TypeError` for what is none."""
        nested = {"text": _build(TextConfig, data["text"]), "vision": _build(VisionConfig, data["vision"])}
        return _build(cls, {**data, **nested})


def _check_sizes(config: Any) -> None:
    for field in dataclasses.fields(config):
        if field.type == "int":
            _check_size(field.name, getattr(config, field.name))


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or not 1 <= value <= LARGEST[name]:
        raise ValueError(f"{name} is {shown(value)}, expected a whole number from 1 to {LARGEST[name]}")


def _check_frequencies(config: Any, count: float) -> None:
    frequencies = config.rope_inv_freq
    valid = len(frequencies) == count and all(0 < frequency < math.inf for frequency in frequencies)
    _check(config, "rope_inv_freq", valid, f"{count:g} numbers above 0")


def _check(config: Any, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {shown(getattr(config, name))}, expected {expected}")


def _build(kind: type, fields: dict[str, Any]) -> Any:
    """Make a config of values read from JSON; raises `TypeError` for what is not of its field's type."""
    for field in dataclasses.fields(kind):
        if field.type in ("TextConfig", "VisionConfig"):
            continue
        value, is_tuple = fields[field.name], field.type.startswith("tuple")
        numbers = (int, float) if "float" in field.type else (int,)
        elements = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_tuple or not all(type(x) in numbers and 0 <= x < 2**31 for x in elements):
            raise TypeError(f"{field.name} is {shown(value)}, not {field.type}")
    if unknown := sorted(fields.keys() - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{kind.__name__} has no field {shown(unknown[0])}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
