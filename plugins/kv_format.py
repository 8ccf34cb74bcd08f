"""The byte layout of the external KV cache, and the grammar in which a user asks for one.

The one definition for Python, the ONNX function body and the kernels.

Keys and values of a layer live in two separate pools of pages, ``[pages, num_kv_heads, PAGE_SLOTS, row]``; a row holds
one token's head and starts on a 16-byte boundary. Quantised rows are codes, whose scales, one float16 a row, live in a
third array ``[pages, num_kv_heads, PAGE_SLOTS]`` of int32 words: a slot's has the key's scale in its lower half and the
value's in its upper. A sequence's slots are those of its pages, in the order of its page table.

Codes and halves travel as int32 words, their bytes unchanged, two halves to a word, the first in its lower half:
TensorRT hands no half to a plugin unless all of its layers may compute in half, at 1/64 of the rate on SM61.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

import numpy as np

from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.model_config import LONGEST_GRAMMAR, TextConfig

ROW_LAYOUT = 3
"""Of pages, rows and scales as described above: one more whenever what engines and their runtime must share changes."""
PAGE_SLOTS = 128
"""Of a page: tokens."""
ROW_ALIGNMENT = 16
WORD_BYTES = 4
ROTATED_DIM = 128
"""Length of the keys that the kernels rotate (by the Hadamard matrix); others are stored as they come."""
RANKS = (64, 96, 112, 128)
"""Lengths of keys and values that the kernels take."""
_LEAST_WINDOW = 16


class RowFormat(enum.IntEnum):
    """How the elements of a cache row are stored; numbered as in the kernels' C ABI."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT8 = 2
    """Two's complement, -127 to 127."""
    INT4 = 3
    """Code + 8 in a nibble; of eight elements, byte i holds number i low and number i + 4 high.

    The element of largest magnitude has code -8, so that the scale has the other sign: all 16 codes are of use.
    """

    @property
    def is_quantised(self) -> bool:
        """Whether rows have a scale, in an array of their own: element = code * scale."""
        return self in (RowFormat.INT8, RowFormat.INT4)

    @property
    def dtype(self) -> np.dtype:
        """Element type of the array that holds the rows: float32, or words of what else there is."""
        return np.dtype(np.float32 if self is RowFormat.FLOAT32 else np.int32)

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of ``dim`` elements."""
        bits = {RowFormat.FLOAT32: 32, RowFormat.FLOAT16: 16, RowFormat.INT8: 8, RowFormat.INT4: 4}[self]
        return -(-dim * bits // 8 // ROW_ALIGNMENT) * ROW_ALIGNMENT


class KVFormat(enum.Enum):
    """Storage format of a layer's cached keys and values; the value is its name everywhere."""

    F32 = "f32"
    F16 = "f16"
    K8V8 = "k8v8"
    K8V4 = "k8v4"
    K4V4 = "k4v4"

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """Return the format called ``text``; raises `UserError` naming the formats there are."""
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(f.value for f in cls)
            raise UserError(f"unknown KV cache format {shown(text)}: expected one of {known}.") from None

    @property
    def rows(self) -> tuple[RowFormat, RowFormat]:
        """Formats of keys and of values."""
        f32, f16, int8, int4 = RowFormat
        return {
            KVFormat.F32: (f32, f32),
            KVFormat.F16: (f16, f16),
            KVFormat.K8V8: (int8, int8),
            KVFormat.K8V4: (int8, int4),
            KVFormat.K4V4: (int4, int4),
        }[self]

    @property
    def is_quantised(self) -> bool:
        return self.rows[0].is_quantised


@dataclasses.dataclass(frozen=True)
class LayerLayout:
    """One layer's cache."""

    kv_format: KVFormat
    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def is_rotated(self) -> bool:
        """Whether keys are stored, and queries meet them, rotated."""
        return self.kv_format.is_quantised and self.head_dim == ROTATED_DIM

    @property
    def dims(self) -> tuple[int, int]:
        """Elements of a key and of a value."""
        return self.head_dim, self.value_dim

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of a key's row and of a value's."""
        key, value = (row.row_bytes(dim) for row, dim in zip(self.kv_format.rows, self.dims, strict=True))
        return key, value

    @property
    def row_elements(self) -> tuple[int, int]:
        """The same in elements of the arrays' type."""
        key, value = (size // WORD_BYTES for size in self.row_bytes)
        return key, value

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values with their scales."""
        scales = 2 * np.dtype(np.float16).itemsize if self.kv_format.is_quantised else 0
        return self.num_kv_heads * (sum(self.row_bytes) + scales)


@dataclasses.dataclass(frozen=True)
class Window:
    """What a token sees of a long past: the first ``sinks`` tokens, and the last ``length``, itself included.

    StreamingLLM (Xiao et al., arXiv:2309.17453), but with the positions that the tokens have. Pinned tokens are always
    seen, and counted as all others are.
    """

    sinks: int
    length: int

    def __str__(self) -> str:
        return f"{self.sinks}+{self.length}"


Rank = int | float
"""Of values in all layers; a fraction: in each layer the lowest that leaves no more than this error."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a user asks of the KV cache; `parse` reads it, `str` writes it.

    Compare by what each part is fixed by: ``value_rank`` by an export, formats by a build, ``window`` and
    ``pin_images`` by each run.
    """

    kv_format: KVFormat = KVFormat.K8V8
    """By default the smallest that leaves 99.5% of the nano checkpoint's likeliest tokens what they are."""
    value_rank: Rank | None = None
    """None: as the model has it."""
    window: Window | None = None
    """None: everything is kept."""
    pin_images: bool = False
    """Whether the tokens of pictures and videos stay, whatever the window."""
    overrides: tuple[tuple[int, int, KVFormat], ...] = ()
    """Layers, first and last, with another format; a later one counts more."""

    GRAMMAR = (
        "FORMAT[,rv=RANK][,window=SINKS+LENGTH][,pin=image][,layer.FIRST-LAST=FORMAT], "
        f"FORMAT one of {', '.join(f.value for f in KVFormat)}, RANK one of {', '.join(map(str, RANKS))} or auto:ERROR"
    )

    @classmethod
    def parse(cls, text: str) -> CacheConfig:
        """Read, for example, ``k8v8,rv=96,window=64+8192,pin=image,layer.0-1=f16``.

        Raises:
            UserError: the text is none of that; names what is.
        """
        if len(text) > LONGEST_GRAMMAR:
            raise UserError(f"the KV cache {shown(text)} is too long: expected {LONGEST_GRAMMAR} characters at most.")
        first, *options = (part.strip() for part in text.split(","))
        found: dict[str, Any] = {"kv_format": KVFormat.parse(first)}
        overrides = []
        for option in options:
            name, _, value = option.partition("=")
            if layers := re.fullmatch(r"layer\.(\d{1,4})(?:-(\d{1,4}))?", name):
                start = int(layers[1])
                overrides.append((start, int(layers[2] or start), KVFormat.parse(value)))
                if overrides[-1][0] > overrides[-1][1]:
                    raise UserError(
                        f"the KV cache option {shown(option)} names no layers: expected the first one first."
                    )
                continue
            if name not in _OPTIONS:
                raise UserError(f"unknown KV cache option {shown(option)}: expected {cls.GRAMMAR}.")
            field, read = _OPTIONS[name]
            if field in found:
                raise UserError(f"the KV cache option {name} is given twice: expected it once.")
            found[field] = read(option, value)
        config = cls(**found, overrides=tuple(overrides))
        if config.pin_images and not config.window:
            raise UserError("the KV cache option pin=image is for a window, without which all is kept: give one.")
        return config

    def __str__(self) -> str:
        parts = [self.kv_format.value]
        if (rank := self.value_rank) is not None:
            parts.append(f"rv={rank if isinstance(rank, int) else f'auto:{np.format_float_positional(rank)}'}")
        if self.window:
            parts.append(f"window={self.window}")
        if self.pin_images:
            parts.append("pin=image")
        for first, last, kv_format in self.overrides:
            layers = str(first) if first == last else f"{first}-{last}"
            parts.append(f"layer.{layers}={kv_format.value}")
        return ",".join(parts)

    def with_rank_of(self, exported: CacheConfig) -> CacheConfig:
        """The same with a model bundle's rank where none is given."""
        return self if self.value_rank is not None else dataclasses.replace(self, value_rank=exported.value_rank)

    def layers(self, text: TextConfig) -> tuple[LayerLayout, ...]:
        """The layout of each layer of a model; raises `UserError` for layers that it does not have."""
        count = text.num_hidden_layers
        formats = [self.kv_format] * count
        for first, last, kv_format in self.overrides:
            if last >= count:
                raise UserError(
                    f"the KV cache option layer.{last} is out of range: this model has layers 0-{count - 1}."
                )
            formats[first : last + 1] = [kv_format] * (last + 1 - first)
        layouts = tuple(
            LayerLayout(kv_format, text.num_key_value_heads, text.head_dim, value_dim)
            for kv_format, value_dim in zip(formats, text.value_dims, strict=True)
        )
        for layout in layouts:
            if layout.kv_format.is_quantised and not all(dim in RANKS for dim in layout.dims):
                raise UserError(
                    f"{layout.kv_format.value} is for heads of {', '.join(map(str, RANKS))}; this model has keys of "
                    f"{layout.head_dim} and values of {layout.value_dim}: take f32 or f16."
                )
        return layouts

    def bytes_per_token(self, text: TextConfig) -> int:
        """Bytes that one token takes in all layers, keys and values together."""
        return sum(layer.bytes_per_token for layer in self.layers(text))

    def slots(self, tokens: int, pinned: int = 0) -> int:
        """Slots that a conversation of so many tokens takes, of which so many are pinned."""
        if self.window is None:
            return tokens
        return min(tokens, self.window.sinks + self.window.length - 1 + pinned)

    def nbytes(self, text: TextConfig, tokens: int, pinned: int = 0) -> int:
        """Bytes of the pages of such a conversation."""
        return pages_of(self.slots(tokens, pinned)) * PAGE_SLOTS * self.bytes_per_token(text)


def pages_of(slots: int) -> int:
    """Pages that have so many slots."""
    return -(-slots // PAGE_SLOTS)


def _read_rank(option: str, value: str) -> Rank:
    if value in map(str, RANKS):
        return int(value)
    if (error := re.fullmatch(r"auto:(0?\.\d+)", value)) and float(error[1]) > 0:
        return float(error[1])
    raise UserError(
        f"the KV cache option {shown(option)} is no rank: expected one of {', '.join(map(str, RANKS))}, or auto:0.01 "
        "for the lowest with up to that error."
    )


def _read_window(option: str, value: str) -> Window:
    parts = re.fullmatch(r"(\d{1,9})\+(\d{1,9})", value)
    if not parts or int(parts[2]) < _LEAST_WINDOW:
        raise UserError(
            f"the KV cache option {shown(option)} is no window: expected first and last tokens, at least "
            f"{_LEAST_WINDOW} of those, as in window=64+8192."
        )
    return Window(int(parts[1]), int(parts[2]))


def _read_pin(option: str, value: str) -> bool:
    if value != "image":
        raise UserError(f"unknown KV cache option {shown(option)}: expected pin=image.")
    return True


_OPTIONS = {
    "rv": ("value_rank", _read_rank),
    "window": ("window", _read_window),
    "pin": ("pin_images", _read_pin),
}
"""By name: the field of `CacheConfig`, and what reads its value."""
