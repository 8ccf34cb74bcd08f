"""What a backend offers: an engine that evaluates graphs, and sessions, the device side of the external KV cache: a
decoder at work on sequences whose past lies in a pool of pages.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pascalvl.engines.choice import Choice, choose
from pascalvl.plugins import bindings
from pascalvl.plugins.bindings import Binding
from pascalvl.plugins.bundle import Manifest
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import PAGE_SLOTS, pages_of

SLOTS = Binding("slots", np.dtype(np.int32), ("tokens",))
"""Where new tokens go: an input of what stores their keys and values, not of the engine."""
ALWAYS_VISIBLE = np.iinfo(np.int32).max
"""In a `Placement.visible`: every new token sees the slot."""


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """How a sequence's new tokens meet its past, and where their own keys and values go then."""

    pages: np.ndarray
    """int32 ``[n]``: the sequence's pages of the pool, in the order of its slots."""
    past_length: int
    """Slots, from the first on, that the tokens see ..."""
    slots: np.ndarray
    """int32 ``[seq]``: the sequence's slot where each token goes; negative: nowhere."""
    visible: np.ndarray | None = None
    """... each of them, int32 ``[past_length]`` or more, by as many of its first tokens; None: by all."""

    @property
    def places(self) -> np.ndarray:
        """`SLOTS` of the tokens."""
        pages = self.pages[np.maximum(self.slots, 0) // PAGE_SLOTS]
        return np.where(self.slots < 0, -1, pages * PAGE_SLOTS + self.slots % PAGE_SLOTS).astype(np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """What the vision encoder makes of a picture or video, wherever an engine keeps it: NumPy's arrays, or its own.

    ``embeds`` are ``[tokens, hidden_size]``, DeepStack's ``levels`` ``[num_deepstack, tokens, hidden_size]``.
    """

    embeds: Any
    levels: Any


@dataclasses.dataclass(frozen=True, eq=False)
class VisualRows:
    """Tokens of a sequence that are of a picture or video."""

    features: Features
    source: slice
    """Which of its tokens."""
    tokens: np.ndarray
    """int64 ``[n]``: their numbers among the sequence's new ones."""


class Embeds(Protocol):
    """Embeddings of tokens, read to where they are needed."""

    def __len__(self) -> int: ...

    def read(self, to: np.ndarray) -> None:
        """Write them to float32 ``[seq, hidden_size]``."""


@dataclasses.dataclass(frozen=True, eq=False)
class NewTokens:
    """New tokens of one sequence, at least one."""

    embeds: Embeds
    rope_cos: np.ndarray
    """float32 ``[seq, head_dim]``."""
    rope_sin: np.ndarray
    placement: Placement
    visuals: Sequence[VisualRows] = ()
    """What takes the place of some tokens' embeddings, and is added behind the first layers."""
    rows: Sequence[int] | None = None
    """Numbers of those whose logits are wanted; None: of the last one alone."""

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def logit_rows(self) -> Sequence[int]:
        return (len(self) - 1,) if self.rows is None else self.rows

    @property
    def is_plain(self) -> bool:
        """Whether it sees all of its past, and the last token's logits are wanted."""
        return self.placement.visible is None and self.rows is None

    @property
    def is_decode(self) -> bool:
        """Whether it is one token of text besides."""
        return self.is_plain and len(self) == 1 and not self.visuals


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Bytes that a model takes of a GPU's memory, beside the CUDA context with the kernels in it."""

    weights: int
    cache: int
    steps: int
    """Inputs, results and workspace of the decoder, and of pictures that need no more."""
    picture: int
    """More, while a picture of 1,024 x 1,024 pixels is looked at, and for its features."""

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.steps + self.picture


class Engine(abc.ABC):
    """The engines of one bundle, loaded and ready.

    `run` evaluates one graph, `bindings.DECODER` or `bindings.VISION`. It is a pure function: it never keeps or writes
    its inputs, in particular the cache views that the caller passes.
    """

    gpu: str | None = None
    """Name of the GPU that computes; None: the CPU does."""
    max_pixels: int | None = None
    """Area of the largest picture that it takes; None: any."""
    max_prefill: int | None = None
    """Tokens that one call takes at most; None: any number."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    def close(self) -> None:  # noqa: B027 - what a backend has in the host's memory ends with its objects
        """Give back what it takes of its device, and of a GPU the CUDA context, this process's only one; neither it nor
        its sessions and features may be used any more."""

    @abc.abstractmethod
    def run(self, graph: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluate ``graph`` on ``feeds`` (names, types and shapes of `bindings`) and return its outputs by name.

        Raises:
            MemoryError: the outputs or intermediate results do not fit in memory.
        """

    def encode(self, feeds: Sequence[Mapping[str, np.ndarray]]) -> Features:
        """Evaluate the vision encoder on some feeds, one after the other: a picture's, or those of a video's patches in
        time; raises `MemoryError` as `run` does."""
        outputs = [self.run(bindings.VISION, feed) for feed in feeds]
        embeds, levels = (
            [output[name] for output in outputs] for name in (bindings.IMAGE_EMBEDS, bindings.DEEPSTACK_EMBEDS)
        )
        return Features(np.concatenate(embeds), np.concatenate(levels, axis=1))

    def on_host(self, features: Features) -> Features:
        """Features of this engine as NumPy's arrays."""
        return features

    def open_session(self, capacity: int, pages: int | None = None) -> Session:
        """Lay out a pool for sequences of up to ``capacity`` tokens each; raises `UserError` if there is no room.

        Args:
            capacity: tokens that a sequence has at most.
            pages: of the pool; None: as many as one such sequence takes.
        """
        pages = pages or pages_of(capacity)
        try:
            return self._new_session(pages_of(capacity), pages)
        except MemoryError:
            needed = pages * PAGE_SLOTS * self.manifest.kv_cache.bytes_per_token(self.manifest.model.text)
            several = f" in a pool of {pages} pages" if pages != pages_of(capacity) else ""
            raise UserError(
                f"a context of {capacity} tokens{several} needs {needed / 1e9:.1f} GB for its KV cache, which is more "
                f"than can be allocated: ask for a shorter context{', or fewer sequences' if several else ''}."
            ) from None

    def _new_session(self, sequence_pages: int, pages: int) -> Session:
        return HostSession(self, sequence_pages, pages)


class Session(abc.ABC):
    """Keys and values of sequences in a pool of pages, where the engine reads them; and the decoder, run on new tokens.

    The storage stays where it is for the session's life; `bindings.cache_inputs` tells a layer's tensors. Which page is
    whose, which token is in which slot, and what is to be kept, is for the caller to say.

    Args:
        engine: what runs.
        sequence_pages: pages that a sequence has at most.
        pages: of the pool.
    """

    def __init__(self, engine: Engine, sequence_pages: int, pages: int) -> None:
        self.sequence_pages, self.pages = sequence_pages, pages
        self.model, self.cache = engine.manifest.model, engine.manifest.kv_cache
        self.layouts = self.cache.layers(self.model.text)
        self.layer_inputs = [bindings.cache_inputs(self.model, self.cache, layer) for layer in range(len(self.layouts))]
        """By layer: the tensors of its pool."""
        self.sizes = {bindings.PAGES: pages, bindings.SEQUENCE_PAGES: sequence_pages}

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes of the storage."""

    @abc.abstractmethod
    def step(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        """Run new tokens of some sequences, each of them once, and store their keys and values.

        Returns:
            `bindings.LOGITS` of the rows wanted, sequence by sequence, ``[rows, vocab_size]``; of an engine opened with
            marked layers also the `bindings.hidden_states`, ``[tokens, hidden_size]``.

        Raises:
            MemoryError: the outputs or intermediate results do not fit in memory.
        """

    def choose(
        self, sequences: Sequence[NewTokens], choices: Sequence[Choice] | None = None
    ) -> list[tuple[int, float]]:
        """As `step`, but returns of each row only the token chosen (`NO_TOKEN`: none may be), and the row's highest
        logit (NaN if any is, and then the token means nothing).

        Args:
            sequences: as there.
            choices: of each row; None: the likeliest tokens, the first of equal ones.
        """
        logits = self._logits = self.step(sequences)[bindings.LOGITS]
        choices = choices or [Choice()] * len(logits)
        return [(choose(row, choice), float(row.max())) for row, choice in zip(logits, choices, strict=True)]

    def logits(self) -> np.ndarray:
        """Of the rows of the last `choose`, float32 ``[rows, vocab_size]``; no other step may have run since."""
        return self._logits

    def decode_launches(self) -> int | None:
        """Kernels that a decode step launches on a GPU, copies not counted; None: there is none, or it is not known.

        Runs a step, which leaves the cache as it is.
        """
        return None

    def read(self, pages: np.ndarray) -> dict[str, np.ndarray]:
        """Copies of some pages, by the names of `bindings`: the pool's tensors, with those pages alone."""
        return {binding.name: self._read(binding, pages) for binding in self.stored}

    def write(self, pages: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        """Put the first of what `read` gave into some pages."""
        for binding in self.stored:
            self._write(binding, pages, rows[binding.name][: len(pages)])

    def copy_page(self, page: int, to: int) -> None:
        """Make one page hold what another does."""
        self.write(np.array([to]), self.read(np.array([page])))

    @abc.abstractmethod
    def _read(self, binding: Binding, pages: np.ndarray) -> np.ndarray:
        """Pages of one of the pool's tensors."""

    @abc.abstractmethod
    def _write(self, binding: Binding, pages: np.ndarray, array: np.ndarray) -> None:
        """Set pages of one of the pool's tensors."""

    @property
    def stored(self) -> list[Binding]:
        """The pool's tensors."""
        return [binding for inputs in self.layer_inputs for binding in inputs]

    def shape_of(self, binding: Binding) -> tuple[int, ...]:
        """Shape of one of the pool's tensors."""
        return tuple(self.sizes[size] if isinstance(size, str) else size for size in binding.shape)

    def inputs(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        """The decoder's inputs, without the pool and visuals, and `SLOTS`.

        Raises:
            ValueError: no sequence, one without tokens, or more pages than a sequence may have.
        """
        batch, tokens, text = len(sequences), sum(map(len, sequences)), self.model.text
        sees_all = all(new.placement.visible is None for new in sequences)
        rows = sum(len(new.logit_rows) for new in sequences)
        inputs = {
            bindings.INPUTS_EMBEDS: np.empty((tokens, text.hidden_size), np.float32),
            bindings.ROPE_COS: np.empty((tokens, text.head_dim), np.float32),
            bindings.ROPE_SIN: np.empty((tokens, text.head_dim), np.float32),
            bindings.CU_SEQLENS: np.zeros(batch + 1, np.int32),
            bindings.PAST_LENGTH: np.zeros(batch, np.int32),
            bindings.PAGE_TABLE: np.zeros((batch, self.sequence_pages), np.int32),
            bindings.PAST_VISIBLE: np.full(
                (batch, 1 if sees_all else self.sequence_pages * PAGE_SLOTS), ALWAYS_VISIBLE, np.int32
            ),
            bindings.LOGIT_ROWS: np.zeros(rows, np.int32),
            SLOTS.name: np.empty(tokens, np.int32),
        }
        self.fill(inputs, sequences)
        return inputs

    @staticmethod
    def fill(inputs: Mapping[str, np.ndarray], sequences: Sequence[NewTokens]) -> None:
        """Write what `inputs` gives to arrays that may have room for more tokens, sequences and rows: those that are
        not there are empty and go nowhere. Of `bindings.PAST_VISIBLE`, slots that all tokens see are left as they are.

        Raises:
            ValueError: see `inputs`.
        """
        if not sequences or not all(map(len, sequences)):
            raise ValueError("a step takes at least one sequence, and each of them at least one token")
        bounds, slots, rows = (inputs[name] for name in (bindings.CU_SEQLENS, SLOTS.name, bindings.LOGIT_ROWS))
        begin = row = 0
        for number, new in enumerate(sequences):
            end, placement = begin + len(new), new.placement
            bounds[number], own = begin, slice(begin, end)
            new.embeds.read(inputs[bindings.INPUTS_EMBEDS][own])
            inputs[bindings.ROPE_COS][own], inputs[bindings.ROPE_SIN][own] = new.rope_cos, new.rope_sin
            slots[own] = placement.places
            inputs[bindings.PAST_LENGTH][number] = placement.past_length
            inputs[bindings.PAGE_TABLE][number, : len(placement.pages)] = placement.pages
            if placement.visible is not None:
                inputs[bindings.PAST_VISIBLE][number, : len(placement.visible)] = placement.visible
            for wanted in new.logit_rows:
                rows[row] = begin + wanted
                row += 1
            begin = end
        bounds[len(sequences) :] = begin
        slots[begin:] = -1
        rows[row:] = 0
        inputs[bindings.PAST_LENGTH][len(sequences) :] = 0

    @staticmethod
    def visuals_of(sequences: Sequence[NewTokens]) -> list[VisualRows]:
        """Of all sequences, numbered as the step's tokens are."""
        visuals, begin = [], 0
        for tokens in sequences:
            visuals += [dataclasses.replace(visual, tokens=visual.tokens + begin) for visual in tokens.visuals]
            begin += len(tokens)
        return visuals

    def inputs_with_visuals(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        """`inputs` with visuals, whose features are NumPy's, in them, and `bindings.DEEPSTACK_EMBEDS`."""
        inputs = self.inputs(sequences)
        embeds = inputs[bindings.INPUTS_EMBEDS]
        deepstack = np.zeros((self.model.num_deepstack, *embeds.shape), np.float32)
        for visual in self.visuals_of(sequences):
            embeds[visual.tokens] = visual.features.embeds[visual.source]
            deepstack[:, visual.tokens] = visual.features.levels[:, visual.source]
        return {**inputs, bindings.DEEPSTACK_EMBEDS: deepstack}


class HostSession(Session):
    """The pool as NumPy arrays, for engines that take their inputs from the host.

    Memory that was never written costs nothing yet.
    """

    def __init__(self, engine: Engine, sequence_pages: int, pages: int) -> None:
        super().__init__(engine, sequence_pages, pages)
        self._engine = engine
        self._pool = {binding.name: np.zeros(self.shape_of(binding), binding.dtype) for binding in self.stored}
        layers = range(len(self.layouts))
        self._new_rows = [bindings.new_rows(self.model, self.cache, layer) for layer in layers]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._pool.values())

    def step(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        inputs = self.inputs_with_visuals(sequences)
        places = inputs.pop(SLOTS.name)
        outputs = self._engine.run(bindings.DECODER, {**self._pool, **inputs})
        stored = np.flatnonzero(places >= 0)
        page, slot = np.divmod(places[stored], PAGE_SLOTS)
        for pools, new_rows in zip(self.layer_inputs, self._new_rows, strict=True):
            for pool, new in zip(pools, new_rows, strict=True):
                self._pool[pool.name][page, :, slot] = outputs.pop(new.name)[:, stored].swapaxes(0, 1)
        return outputs

    def _read(self, binding: Binding, pages: np.ndarray) -> np.ndarray:
        return self._pool[binding.name][pages]

    def _write(self, binding: Binding, pages: np.ndarray, array: np.ndarray) -> None:
        self._pool[binding.name][pages] = array
