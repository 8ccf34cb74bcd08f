"""The byte layout of the external KV cache: one definition for Python, the ONNX function body and the kernels.

Keys and values of a layer live in two separate arrays ``[batch, num_kv_heads, capacity, row]``; a row holds one
token's head and starts on a 16-byte boundary.
"""

from __future__ import annotations

import enum

import numpy as np

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.model_config import TextConfig


class KVFormat(enum.Enum):
    """Storage format of cached keys and values; the value is the name used on the command line and in manifests."""

    F32 = "f32"
    F16 = "f16"

    @classmethod
    def parse(cls, text: str) -> KVFormat:
        """Return the format called ``text``; raises `UserError` naming the formats there are."""
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(f.value for f in cls)
            raise UserError(f"unknown KV cache format {text!r}: expected one of {known}.") from None

    @property
    def dtype(self) -> np.dtype:
        """Element type of a cache row."""
        return np.dtype({KVFormat.F32: np.float32, KVFormat.F16: np.float16}[self])

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one token's key (or value) of one head."""
        return head_dim * self.dtype.itemsize

    def bytes_per_token(self, text: TextConfig) -> int:
        """Bytes that one token takes in all layers, keys and values together."""
        return 2 * text.num_hidden_layers * text.num_key_value_heads * self.row_bytes(text.head_dim)

    def storage_shape(self, text: TextConfig, capacity: int) -> tuple[int, ...]:
        """Shape of one sequence's rows in all layers; index 1 tells keys (0) from values (1)."""
        return text.num_hidden_layers, 2, 1, text.num_key_value_heads, capacity, text.head_dim
