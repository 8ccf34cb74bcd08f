"""The pool of pages in a device's memory, and the decoder's steps over it: recorded as CUDA graphs where they recur."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pascalvl.engines.choice import Choice
from pascalvl.engines.device.choices import CHOICES, ChoiceRecords
from pascalvl.engines.device.engine import DeviceEngine
from pascalvl.engines.device.memory import Buffer, Graph
from pascalvl.engines.device.padding import BATCHES, StepShape
from pascalvl.engines.device.tensors import StagedTensors, Tensors, arrays_in, shape_of
from pascalvl.engines.engine import ALWAYS_VISIBLE, SLOTS, NewTokens, Session, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.kernels.library import AppendArgs, AppendLayer, Rows

_CHOSEN = [
    bindings.Binding("token", np.dtype(np.int32), ("batch",)),
    bindings.Binding("logit", np.dtype(np.float32), ("batch",)),
]


class DeviceSession(Session):
    """The pool in the device's memory.

    The decoder writes the new rows of all layers beside the pool, and one launch copies them into it. Steps of tokens
    that see all of their past are padded, see `StepShape`, and recorded when they first run, that of one token at once.
    They never run at the same time, and their inputs share memory.
    """

    def __init__(self, engine: DeviceEngine, sequence_pages: int, pages: int) -> None:
        super().__init__(engine, sequence_pages, pages)
        self.engine, self.device = engine, engine.device
        # As many tokens as the engine takes, however few a sequence has: a step runs those of several.
        tokens = max(engine.max_prefill, *BATCHES)
        self.pool = Tensors(self.device, self.stored, self.sizes)
        self.outputs = Tensors(self.device, engine.outputs[bindings.DECODER], self.sizes_of(tokens, BATCHES[-1]))
        self._new_rows = [bindings.new_rows(self.model, self.cache, layer) for layer in range(len(self.layouts))]
        self._layers = [self._layer(number) for number in range(len(self.layouts))]
        # From where the copies of a page do not wait for each other.
        self._page_sizes = {**self.sizes, bindings.PAGES: 1}
        self._page_memory = self.device.host_array(Tensors.nbytes_of(self.stored, self._page_sizes))
        self._page = arrays_in(self._page_memory, self.stored, self._page_sizes)
        self._steps: dict[StepShape, Step] = {}
        largest = StepShape(max((*engine.lengths, BATCHES[-1])), BATCHES[-1], self.model.num_deepstack)
        self.staging = self.device.allocate(Step.staged_bytes(self, largest))
        self.records = ChoiceRecords(self._copy, lambda copy, at, array: self.device.upload(copy.pointer + at, array))
        engine.prepare(self.sizes_of)
        self.decode_step = self._new_step(StepShape(1, 1, 0))
        self.decode_step.record()

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes

    def sizes_of(self, tokens: int, batch: int) -> dict[str, int]:
        """Dimensions of a step of so many tokens of so many sequences, which see all of their past."""
        return {
            **self.sizes,
            "tokens": tokens,
            "batch": batch,
            "batch_plus_1": batch + 1,
            "rows": batch,
            "visible_slots": 1,
        }

    def step(self, sequences: Sequence[NewTokens]) -> dict[str, np.ndarray]:
        pointers = self.outputs.pointers if self._padded(sequences) else self._run_as_it_is(sequences)
        stay = {binding.name for of_layer in self._new_rows for binding in of_layer}
        sizes = {
            "tokens": sum(map(len, sequences)),
            "rows": sum(len(new.logit_rows) for new in sequences),
        }
        outputs = {
            binding.name: np.empty(shape_of(binding, sizes), binding.dtype)
            for binding in self.engine.outputs[bindings.DECODER]
            if binding.name not in stay
        }
        for name, array in outputs.items():
            self.device.download(array, pointers[name])
        self.device.synchronize()
        return outputs

    def choose(
        self, sequences: Sequence[NewTokens], choices: Sequence[Choice] | None = None
    ) -> list[tuple[int, float]]:
        rows = sum(len(new.logit_rows) for new in sequences)
        if step := self._padded(sequences, choices):
            self._chosen_from = self.outputs.pointers[bindings.LOGITS], rows
            return step.chosen[: len(sequences)]
        logits = self._run_as_it_is(sequences)[bindings.LOGITS]
        self._chosen_from = logits, rows
        return self._chosen_of(logits, choices or [Choice()] * rows)

    def logits(self) -> np.ndarray:
        pointer, rows = self._chosen_from
        array = np.empty((rows, self.model.text.vocab_size), np.float32)
        self.device.download(array, pointer)
        self.device.synchronize()
        return array

    def _chosen_of(self, logits: int, choices: Sequence[Choice]) -> list[tuple[int, float]]:
        """Choose from the logits of a step that is not recorded, which are at an address."""
        records = np.zeros(len(choices), CHOICES.dtype)
        self.records.fill(records, choices)
        buffers = self.engine.buffers
        token, logit = (np.empty(len(choices), binding.dtype) for binding in _CHOSEN)
        places = [buffers.get(f"step {b.name}", len(choices) * b.dtype.itemsize) for b in (CHOICES, *_CHOSEN)]
        self.device.upload(places[0], records)
        self.launch_choice(logits, len(choices), *places)
        for array, place in ((token, places[1]), (logit, places[2])):
            self.device.download(array, place)
        self.device.synchronize()
        return list(zip(token.tolist(), logit.tolist(), strict=True))

    def launch_choice(self, logits: int, rows: int, choices: int, token: int, logit: int) -> None:
        """Start the choice of tokens, all at addresses."""
        self.device.kernels.choose(logits, rows, self.model.text.vocab_size, choices, token, logit, self.device.stream)

    def decode_launches(self) -> int | None:
        return self.decode_step.launches

    def _padded(self, sequences: Sequence[NewTokens], choices: Sequence[Choice] | None = None) -> Step | None:
        """Run a step that is padded; None: this is none."""
        shape = StepShape.padded(sequences, self.engine.lengths, self.model.num_deepstack)
        if shape is None or (shape.levels and not self.engine.lengths):
            return None
        step = self._steps.get(shape) or self._new_step(shape)
        step.run(sequences, choices or [Choice()] * len(sequences))
        return step

    def _new_step(self, shape: StepShape) -> Step:
        step = self._steps[shape] = Step(self, shape)
        return step

    def _run_as_it_is(self, sequences: Sequence[NewTokens]) -> dict[str, int]:
        """Run a step that is not recorded, without waiting for it; returns where its outputs come to be."""
        arrays, visuals = self.inputs(sequences), self.visuals_of(sequences)
        buffers = self.engine.buffers
        pointers = {name: buffers.get(f"step {name}", array.nbytes) for name, array in arrays.items()}
        for name, array in arrays.items():
            self.device.upload(pointers[name], array)
        tokens = len(arrays[bindings.INPUTS_EMBEDS])
        if visuals:
            nbytes = self.model.num_deepstack * tokens * self.model.text.hidden_size * 4
            pointers[bindings.DEEPSTACK_EMBEDS] = buffers.get(f"step {bindings.DEEPSTACK_EMBEDS}", nbytes)
            self.place(visuals, tokens, pointers)
        batch, visible_slots = arrays[bindings.PAST_VISIBLE].shape
        rows = len(arrays[bindings.LOGIT_ROWS])
        sizes = {**self.sizes_of(tokens, batch), "rows": rows, "visible_slots": visible_slots}
        outputs = dict(self.outputs.pointers)
        if rows > BATCHES[-1]:
            outputs[bindings.LOGITS] = buffers.get(bindings.LOGITS, rows * self.model.text.vocab_size * 4)
        slots = pointers.pop(SLOTS.name)
        self.engine.program(bindings.DECODER, sizes, {**pointers, **self.pool.pointers, **outputs}, kept=False)()
        self.append(tokens, slots)
        return outputs

    def place(self, visuals: Sequence[VisualRows], tokens: int, pointers: Mapping[str, int]) -> None:
        """Copy features to the embeddings of a step of so many tokens, and to DeepStack's: zeros elsewhere."""
        width = self.model.text.hidden_size * 4
        levels = pointers[bindings.DEEPSTACK_EMBEDS]
        self.device.fill_zeros(levels, self.model.num_deepstack * tokens * width)
        for visual in visuals:
            for start, stop in _runs_of(visual.tokens):
                token, source = int(visual.tokens[start]), visual.source.start + start
                nbytes = (stop - start) * width
                embeds = pointers[bindings.INPUTS_EMBEDS] + token * width
                self.device.copy(embeds, visual.features.embeds.at(source), nbytes)
                for level in range(self.model.num_deepstack):
                    to = levels + (level * tokens + token) * width
                    self.device.copy(to, visual.features.levels.at(level, source), nbytes)

    def append(self, tokens: int, slots: int) -> None:
        """Copy the new rows of all layers into their pools, to slots at an address."""
        args = AppendArgs.of(
            self._layers,
            slots=slots,
            num_kv_heads=self.model.text.num_key_value_heads,
            tokens=tokens,
            num_pages=self.pages,
        )
        self.device.kernels.kv_append(args, self.device.stream)

    def _layer(self, number: int) -> AppendLayer:
        """Where a layer's new rows are and where they go."""
        new, pool = (
            Rows(**dict(zip(("key", "value", "scale"), (tensors.pointers[b.name] for b in names), strict=False)))
            for tensors, names in ((self.outputs, self._new_rows[number]), (self.pool, self.layer_inputs[number]))
        )
        key_row, value_row = self.layouts[number].row_bytes
        return AppendLayer(new_rows=new, pool=pool, key_row=key_row, value_row=value_row)

    def _copy(self, array: np.ndarray) -> Buffer:
        """An array on the device."""
        buffer = self.device.allocate(array.nbytes)
        self.device.upload(buffer.pointer, array)
        self.device.synchronize()
        return buffer

    def copy_page(self, page: int, to: int) -> None:
        for binding in self.stored:
            nbytes = math.prod(self.shape_of(binding)[1:]) * binding.dtype.itemsize
            pointer = self.pool.pointers[binding.name]
            self.device.copy(pointer + to * nbytes, pointer + page * nbytes, nbytes)

    def read(self, pages: np.ndarray) -> dict[str, np.ndarray]:
        if len(pages) != 1:
            return super().read(pages)
        for name, array in self._page.items():
            self.device.download(array, self.pool.pointers[name] + int(pages[0]) * array.nbytes)
        self.device.synchronize()
        return arrays_in(self._page_memory.copy(), self.stored, self._page_sizes)

    def write(self, pages: np.ndarray, rows: Mapping[str, np.ndarray]) -> None:
        if len(pages) != 1:
            super().write(pages, rows)
            return
        for name, array in self._page.items():
            array[:] = rows[name][:1]
            self.device.upload(self.pool.pointers[name] + int(pages[0]) * array.nbytes, array)
        self.device.synchronize()

    def _read(self, binding: bindings.Binding, pages: np.ndarray) -> np.ndarray:
        array = np.empty((len(pages), *self.shape_of(binding)[1:]), binding.dtype)
        for part, pointer in self._runs(binding, pages, array):
            self.device.download(part, pointer)
        self.device.synchronize()
        return array

    def _write(self, binding: bindings.Binding, pages: np.ndarray, array: np.ndarray) -> None:
        for part, pointer in self._runs(binding, pages, np.ascontiguousarray(array)):
            self.device.upload(pointer, part)
        self.device.synchronize()

    def _runs(
        self, binding: bindings.Binding, pages: np.ndarray, array: np.ndarray
    ) -> Iterator[tuple[np.ndarray, int]]:
        """Parts of an array of pages that follow each other in the pool, too, and where they are there."""
        for start, stop in _runs_of(pages):
            yield array[start:stop], self.pool.pointers[binding.name] + int(pages[start]) * array[0].nbytes


class Step:
    """A step of a padded shape.

    What varies is written to one array in host memory, and copied to the device from there, places in the cache with
    it: the host's word counts, also after an interrupt. Tokens that are not there go nowhere, and none sees them.
    """

    def __init__(self, session: DeviceSession, shape: StepShape) -> None:
        self._session, self._device, self._shape = session, session.device, shape
        sizes = session.sizes_of(shape.tokens, shape.batch)
        inputs, deepstack = self._staged(session)
        memory = session.staging.pointer
        self._inputs = StagedTensors(self._device, inputs, sizes, memory)
        self._inputs.arrays[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
        memory += self._inputs.nbytes
        self._chosen = StagedTensors(self._device, _CHOSEN, sizes, memory)
        self._pointers = dict(self._inputs.pointers)
        if shape.levels:
            memory += self._chosen.nbytes
            self._pointers |= Tensors(self._device, deepstack, sizes, memory).pointers
        pointers = {**self._pointers, **session.pool.pointers, **session.outputs.pointers}
        del pointers[SLOTS.name], pointers[CHOICES.name]
        self._decode = session.engine.program(bindings.DECODER, sizes, pointers, kept=True)
        self._graph: Graph | None = None
        self._is_tried = False

    @classmethod
    def staged_bytes(cls, session: DeviceSession, shape: StepShape) -> int:
        """Of `DeviceSession.staging`, what one of such a shape takes."""
        inputs, deepstack = cls._staged(session)
        tensors = [*inputs, *_CHOSEN, *(deepstack if shape.levels else ())]
        return Tensors.nbytes_of(tensors, session.sizes_of(shape.tokens, shape.batch))

    @staticmethod
    def _staged(session: DeviceSession) -> tuple[list[bindings.Binding], list[bindings.Binding]]:
        """The inputs that come from the host, and DeepStack's."""
        pool = {binding.name for binding in session.stored}
        inputs = [b for b in session.engine.inputs[bindings.DECODER] if b.name not in pool]
        deepstack = [b for b in inputs if b.name == bindings.DEEPSTACK_EMBEDS]
        return [*(b for b in inputs if b not in deepstack), SLOTS, CHOICES], deepstack

    @property
    def launches(self) -> int | None:
        """Kernels that it launches on a GPU; None: it is no CUDA graph."""
        return self._graph.kernels if self._graph else None

    @property
    def chosen(self) -> list[tuple[int, float]]:
        """Of each sequence the token chosen, and the highest logit."""
        tokens, logits = (self._chosen.arrays[binding.name].tolist() for binding in _CHOSEN)
        return list(zip(tokens, logits, strict=True))

    def record(self) -> None:
        """Make the CUDA graph before there is anything to run."""
        self._inputs.arrays[SLOTS.name][:] = -1
        self._start()
        self._capture()

    def run(self, sequences: Sequence[NewTokens], choices: Sequence[Choice]) -> None:
        """Run up to as many sequences and tokens, and wait; the first time, record it for the next times."""
        self._session.fill(self._inputs.arrays, sequences)
        self._session.records.fill(self._inputs.arrays[CHOICES.name], choices)
        if self._shape.levels:  # behind the upload
            self._inputs.upload()
            self._session.place(self._session.visuals_of(sequences), self._shape.tokens, self._pointers)
        (self._graph or self._start)()
        self._device.synchronize()
        if not self._is_tried:
            self._capture()

    def _capture(self) -> None:
        self._is_tried = True
        self._graph = self._device.capture(self._start)

    def _start(self) -> None:
        """From the inputs, on the device where visuals are among them, to the next tokens on the host, without waiting
        for the device."""
        session = self._session
        if not self._shape.levels:
            self._inputs.upload()
        self._decode()
        session.append(self._shape.tokens, self._pointers[SLOTS.name])
        places = (self._pointers[CHOICES.name], *(self._chosen.pointers[binding.name] for binding in _CHOSEN))
        session.launch_choice(session.outputs.pointers[bindings.LOGITS], self._shape.batch, *places)
        self._chosen.download()


def _runs_of(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where numbers that follow each other start and stop."""
    bounds = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1), len(numbers)]
    return ((int(start), int(stop)) for start, stop in itertools.pairwise(bounds) if stop > start)
