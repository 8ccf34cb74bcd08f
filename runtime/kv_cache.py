"""The external KV cache: keys and values of one sequence, which the decoder reads and only the runtime writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.model_config import TextConfig


class KVCache:
    """Room for ``capacity`` tokens in every layer, of which the first `length` are in use.

    The arrays stay where they are for the cache's life. Pages of memory that were never written cost nothing yet.

    Args:
        config: the decoder's shape.
        kv_format: how rows are stored.
        capacity: tokens of prompt and answer together.

    Raises:
        UserError: there is not that much memory.
    """

    def __init__(self, config: TextConfig, kv_format: KVFormat, capacity: int) -> None:
        shape = (config.num_hidden_layers, 2, 1, config.num_key_value_heads, capacity, config.head_dim)
        try:
            self._rows = np.zeros(shape, kv_format.dtype)
        except MemoryError:
            needed = capacity * self.bytes_per_token(config, kv_format)
            raise UserError(
                f"a context of {capacity} tokens needs {needed / 1e9:.1f} GB for its KV cache, which is more than can "
                "be allocated: ask for a shorter context."
            ) from None
        self.capacity = capacity
        self._identities = np.zeros(capacity, np.int64)
        self._past_length = np.zeros(1, np.int32)
        self._layers = [
            (bindings.new_key(layer), keys, bindings.new_value(layer), values)
            for layer, (keys, values) in enumerate(self._rows)
        ]
        self.feeds: dict[str, np.ndarray] = {
            bindings.PAST_LENGTH: self._past_length,
            **{bindings.past_key(layer): keys for layer, (keys, _) in enumerate(self._rows)},
            **{bindings.past_value(layer): values for layer, (_, values) in enumerate(self._rows)},
        }
        """What the decoder takes of the cache: always the same arrays, ``[1, num_kv_heads, capacity, head_dim]``."""

    @staticmethod
    def bytes_per_token(config: TextConfig, kv_format: KVFormat) -> int:
        """Bytes that one token takes in all layers, keys and values together."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * kv_format.row_bytes(config.head_dim)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self._past_length[0])

    def append(self, outputs: Mapping[str, np.ndarray], identities: np.ndarray) -> None:
        """Add the tokens of one decoder call.

        Args:
            outputs: the decoder's outputs, with new keys and values ``[1, num_kv_heads, seq, head_dim]``.
            identities: int64 ``[seq]``; equal numbers are tokens whose embeddings are equal.
        """
        start, stop = self.length, self.length + len(identities)
        with np.errstate(over="ignore"):  # a value too large for the format is stored as infinity
            for new_key, keys, new_value, values in self._layers:
                keys[:, :, start:stop] = outputs[new_key]
                values[:, :, start:stop] = outputs[new_value]
        self._identities[start:stop] = identities
        # Last, so that an interrupt anywhere above leaves the cache as it was.
        self._past_length[0] = stop

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self._past_length[0] = min(length, self.length)

    def common_prefix(self, identities: np.ndarray) -> int:
        """How many of the first ``identities`` are the tokens that the cache begins with."""
        shared = min(self.length, len(identities))
        differs = self._identities[:shared] != identities[:shared]
        return int(differs.argmax()) if differs.any() else shared
