"""The shape of a Qwen3-VL model: what engines and runtime must know of a checkpoint, and nothing more."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pascalvl.plugins.errors import UserError

_MOST_LAYERS = 1000
"""Each has bindings of its own, which a damaged manifest must not make endless."""


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
        _check_positive(self)
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
    key_dims: tuple[int, ...]
    """Length of the keys that each layer caches: `head_dim`, or the rank that they were exported with."""
    value_dims: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_positive(self)
        _check(self, "num_hidden_layers", self.num_hidden_layers <= _MOST_LAYERS, f"at most {_MOST_LAYERS}")
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
        for name in ("key_dims", "value_dims"):
            dims = getattr(self, name)
            valid = len(dims) == self.num_hidden_layers and all(0 < dim <= self.head_dim for dim in dims)
            _check(self, name, valid, f"{self.num_hidden_layers} numbers from 1 to {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A dense Qwen3-VL model."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def num_deepstack(self) -> int:
        return len(self.vision.deepstack_visual_indexes)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_json`; raises `UserError` when a field is missing, unknown or out of range."""

        try:
            nested = {"text": _build(TextConfig, data["text"]), "vision": _build(VisionConfig, data["vision"])}
            return _build(cls, {**data, **nested})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the manifest's model description does not fit this version of PascalVL ({error}): "
                "export the checkpoint again."
            ) from error


def _check_positive(config: Any) -> None:
    for field in dataclasses.fields(config):
        if field.type == "int":
            _check(config, field.name, getattr(config, field.name) > 0, "a number above 0")


def _check_frequencies(config: Any, count: float) -> None:
    frequencies = config.rope_inv_freq
    valid = len(frequencies) == count and all(0 < frequency < math.inf for frequency in frequencies)
    _check(config, "rope_inv_freq", valid, f"{count:g} numbers above 0")


def _check(config: Any, name: str, valid: bool, expected: str) -> None:
    if not valid:
        raise ValueError(f"{name} is {getattr(config, name)!r}, expected {expected}")


def _build(kind: type, fields: dict[str, Any]) -> Any:
    """Make a config of values read from JSON; raises `TypeError` for what is not of its field's type."""
    for field in dataclasses.fields(kind):
        if field.type in ("TextConfig", "VisionConfig"):
            continue
        value, is_tuple = fields[field.name], field.type.startswith("tuple")
        numbers = (int, float) if "float" in field.type else (int,)
        elements = value if isinstance(value, list) else [value]
        if isinstance(value, list) != is_tuple or not all(type(x) in numbers and 0 <= x < 2**31 for x in elements):
            raise TypeError(f"{field.name} is {value!r}, not {field.type}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
