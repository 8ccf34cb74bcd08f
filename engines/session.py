"""The device side of the external KV cache: a decoder at work on one sequence."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pascalvl.plugins import bindings
from pascalvl.plugins.bindings import Binding

if TYPE_CHECKING:
    from pascalvl.engines.backend import Engine

SLOTS = Binding("slots", np.dtype(np.int32), ("batch", "seq"))
"""Where new tokens go: an input of what stores their keys and values, not of the engine."""
ALWAYS_VISIBLE = np.iinfo(np.int32).max
"""In a `Placement.visible`: every new token sees the slot."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """How the tokens of a call meet the cache, and where their own keys and values go then."""

    past_length: int
    """Slots, from the first on, that the tokens see ..."""
    slots: np.ndarray
    """int32 ``[seq]``: where each token goes; negative: nowhere."""
    visible: np.ndarray | None = None
    """... each of them, int32 ``[capacity]``, by as many of the call's first tokens; None: by all."""

    @property
    def last(self) -> np.ndarray:
        """`bindings.LOGIT_ROWS` of the call's last token."""
        return np.array([len(self.slots) - 1], np.int32)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of inputs, `SLOTS` among them; without `bindings.PAST_VISIBLE`."""
        return {bindings.PAST_LENGTH: np.array([self.past_length], np.int32), SLOTS.name: self.slots[None]}


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """What the vision encoder makes of a picture or video, wherever an engine keeps it: NumPy's arrays, or its own.

    ``embeds`` are ``[tokens, hidden_size]``, DeepStack's ``levels`` ``[num_deepstack, tokens, hidden_size]``.
    """

    embeds: Any
    levels: Any


@dataclasses.dataclass(frozen=True, eq=False)
class VisualRows:
    """Tokens of a call that are of a picture or video."""

    features: Features
    source: slice
    """Which of its tokens."""
    tokens: np.ndarray
    """int64 ``[n]``: their numbers in the call."""


class Session(abc.ABC):
    """One sequence's keys and values, where the engine reads them, and the decoder run over new tokens.

    The storage stays where it is for the session's life; `bindings.cache_inputs` tells a layer's tensors. Which token
    is in which slot, and what is to be kept, is for the caller to say.

    Args:
        engine: what runs.
        capacity: slots that there is room for.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        self.capacity = capacity
        self.model, self.cache = engine.manifest.model, engine.manifest.kv_cache
        self.layouts = self.cache.layers(self.model.text)
        self.layer_inputs = [bindings.cache_inputs(self.model, self.cache, layer) for layer in range(len(self.layouts))]
        """By layer: the tensors of its cache."""
        self.sizes = {"batch": 1, bindings.CAPACITY: capacity}

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of the storage."""

    @abc.abstractmethod
    def prefill(
        self, feeds: Mapping[str, np.ndarray], placement: Placement, visuals: Sequence[VisualRows] = ()
    ) -> dict[str, np.ndarray]:
        """Run new tokens and store their keys and values.

        Args:
            feeds: `bindings.INPUTS_EMBEDS`, `ROPE_COS` and `ROPE_SIN` of the tokens, batch 1.
            placement: where their past and their own places are.
            visuals: what takes the place of some tokens' embeddings, and is added behind the first layers.

        Returns:
            `bindings.LOGITS` of the last, ``[1, vocab_size]``; of an engine opened with marked layers also the
            `bindings.hidden_states`, ``[1, seq, hidden_size]``.

        Raises:
            MemoryError: the outputs or intermediate results do not fit in memory.
        """

    @abc.abstractmethod
    def decode(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> np.ndarray:
        """Run one token of text, which sees all of its past; ``feeds`` as for `prefill`.

        Returns logits ``[1, vocab_size]``.
        """

    def decode_greedy(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> tuple[int, float]:
        """As `decode`, but returns only the first of the likeliest tokens, and its logit (NaN if any logit is)."""
        logits = self.decode(feeds, placement)[0]
        token = int(logits.argmax())
        return token, float(logits[token])

    def decode_launches(self) -> int | None:
        """Kernels that a decode step launches on a GPU, copies not counted; None: there is none, or it is not known.

        Runs a step, which leaves the cache as it is.
        """
        return None

    def read(self, slots: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of what is in ``slots``, by the names of `bindings`: the cache's tensors with as many slots."""
        return {binding.name: np.take(self._fetch(binding), slots, bindings.SLOT_AXIS) for binding in self._stored()}

    def write(self, slots: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Put the first of what `read` gave into ``slots``."""
        for binding in self._stored():
            array = self._fetch(binding)
            array[:, :, slots] = rows[binding.name][:, :, : len(slots)]
            self._put(binding, array)

    @abc.abstractmethod
    def _fetch(self, binding: Binding) -> np.ndarray:
        """One of the cache's tensors."""

    @abc.abstractmethod
    def _put(self, binding: Binding, array: np.ndarray) -> None:
        """Set one of the cache's tensors to what `_fetch` gave, changed."""

    def _stored(self) -> list[Binding]:
        """The cache's tensors."""
        return [binding for inputs in self.layer_inputs for binding in inputs]

    def shape_of(self, binding: Binding) -> tuple[int, ...]:
        """Shape of one of the cache's tensors."""
        return tuple(self.sizes[size] if isinstance(size, str) else size for size in binding.shape)

    def with_visuals(self, feeds: Mapping[str, np.ndarray], visuals: Sequence[VisualRows]) -> dict[str, np.ndarray]:
        """Feeds with visuals, whose features are NumPy's, in them, and `bindings.DEEPSTACK_EMBEDS`."""
        embeds = feeds[bindings.INPUTS_EMBEDS].copy()
        deepstack = np.zeros((self.model.num_deepstack, *embeds.shape), np.float32)
        for visual in visuals:
            embeds[0, visual.tokens] = visual.features.embeds[visual.source]
            deepstack[:, 0, visual.tokens] = visual.features.levels[:, visual.source]
        return {**feeds, bindings.INPUTS_EMBEDS: embeds, bindings.DEEPSTACK_EMBEDS: deepstack}

    def visible(self, placement: Placement) -> np.ndarray:
        """`bindings.PAST_VISIBLE` of a call."""
        if placement.visible is None:
            return np.full((1, 1), ALWAYS_VISIBLE, np.int32)
        return placement.visible[None]


class HostSession(Session):
    """The storage as NumPy arrays, for engines that take their inputs from the host.

    Pages of memory that were never written cost nothing yet.
    """

    def __init__(self, engine: Engine, capacity: int) -> None:
        super().__init__(engine, capacity)
        self._engine = engine
        self._past = {binding.name: np.zeros(self.shape_of(binding), binding.dtype) for binding in self._stored()}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._past.values())

    def prefill(
        self, feeds: Mapping[str, np.ndarray], placement: Placement, visuals: Sequence[VisualRows] = ()
    ) -> dict[str, np.ndarray]:
        seen = {
            bindings.PAST_LENGTH: placement.arrays[bindings.PAST_LENGTH],
            bindings.PAST_VISIBLE: self.visible(placement),
            bindings.LOGIT_ROWS: placement.last,
        }
        outputs = self._engine.run(bindings.DECODER, {**self._past, **seen, **self.with_visuals(feeds, visuals)})
        stored = placement.slots >= 0
        for layer, inputs in enumerate(self.layer_inputs):
            for past, new in zip(inputs, bindings.new_rows(self.model, self.cache, layer), strict=True):
                self._past[past.name][:, :, placement.slots[stored]] = outputs.pop(new.name)[:, :, stored]
        return outputs

    def decode(self, feeds: Mapping[str, np.ndarray], placement: Placement) -> np.ndarray:
        return self.prefill(feeds, placement)[bindings.LOGITS]

    def _fetch(self, binding: Binding) -> np.ndarray:
        return self._past[binding.name]

    def _put(self, binding: Binding, array: np.ndarray) -> None:
        pass
