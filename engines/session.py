"""The device side of the external KV cache: a decoder at work on one sequence."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pascalvl.plugins import bindings

if TYPE_CHECKING:
    from pascalvl.engines.backend import Engine


class Session(abc.ABC):
    """One sequence's keys and values, where the engine reads them, and the decoder run over new tokens.

    The storage, ``[num_hidden_layers, 2, 1, num_kv_heads, capacity, head_dim]`` with keys before values, stays where it
    is for the session's life. Its first `length` tokens are in use; what is to be kept is for the caller to say. A call
    that raises, or that an interrupt ends, appends nothing.

    Args:
        capacity: tokens that there is room for; calls must not append more.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of the storage."""

    @abc.abstractmethod
    def prefill(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run new tokens and append their keys and values.

        Args:
            feeds: `bindings.INPUTS_EMBEDS`, `ROPE_COS`, `ROPE_SIN` and `DEEPSTACK_EMBEDS` of the tokens, batch 1.

        Returns:
            `bindings.LOGITS` of the last, ``[1, vocab_size]``; of an engine opened with marked layers also the
            `bindings.hidden_states`, ``[1, seq, hidden_size]``.

        Raises:
            MemoryError: the outputs or intermediate results do not fit in memory.
        """

    @abc.abstractmethod
    def decode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        """Run one token of text, ``feeds`` without `bindings.DEEPSTACK_EMBEDS`; returns logits ``[1, vocab_size]``."""

    def decode_greedy(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, float]:
        """As `decode`, but returns only the first of the likeliest tokens, and its logit (NaN if any logit is)."""
        logits = self.decode(feeds)[0]
        token = int(logits.argmax())
        return token, float(logits[token])

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first ``length``."""
        self.length = min(length, self.length)


class HostSession(Session):
    """The storage as a NumPy array, for engines that take their inputs from the host.

    Pages of memory that were never written cost nothing yet.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        super().__init__(capacity)
        self._engine = engine
        model, kv_format = engine.manifest.model, engine.manifest.kv_format
        self._rows = np.zeros(kv_format.storage_shape(model.text, capacity), kv_format.dtype)
        self._past_length = np.zeros(1, np.int32)
        self._layers = [
            (bindings.new_key(layer), keys, bindings.new_value(layer), values)
            for layer, (keys, values) in enumerate(self._rows)
        ]
        self._past = {
            bindings.PAST_LENGTH: self._past_length,
            **{bindings.past_key(layer): keys for layer, (keys, _) in enumerate(self._rows)},
            **{bindings.past_value(layer): values for layer, (_, values) in enumerate(self._rows)},
        }
        self._no_deepstack = np.zeros((model.num_deepstack, 1, 1, model.text.hidden_size), np.float32)

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes

    def prefill(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = self.length
        self._past_length[0] = start
        outputs = self._engine.run(bindings.DECODER, {**self._past, **feeds})
        stop = start + feeds[bindings.INPUTS_EMBEDS].shape[1]
        with np.errstate(over="ignore"):  # a value too large for the format is stored as infinity
            for new_key, keys, new_value, values in self._layers:
                keys[:, :, start:stop] = outputs.pop(new_key)
                values[:, :, start:stop] = outputs.pop(new_value)
        # Last, so that an interrupt anywhere above leaves the cache as it was.
        self.length = stop
        return outputs

    def decode(self, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.prefill({**feeds, bindings.DEEPSTACK_EMBEDS: self._no_deepstack})[bindings.LOGITS]
