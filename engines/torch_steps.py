"""Calls of the torch backend's decoder as CUDA graphs: a decode step, and prefill of padded lengths."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from pascalvl.engines.session import ALWAYS_VISIBLE, SLOTS, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.model_config import TextConfig

log = logging.getLogger(__name__)


class PlacedVisuals:
    """Features of pictures and videos among a call's ``seq`` tokens; they stay on the device."""

    def __init__(self, text: TextConfig, device: torch.device, seq: int, levels: int) -> None:
        self._rows = torch.zeros(1 + levels, 1, seq, text.hidden_size, device=device)
        """Embeddings, then DeepStack's levels."""
        self._is_visual = torch.zeros(1, seq, 1, dtype=torch.bool, device=device)

    def place(self, visuals: Sequence[VisualRows]) -> None:
        """Set which tokens are of visuals."""
        self._rows.zero_()
        self._is_visual.zero_()
        for visual in visuals:
            tokens = torch.from_numpy(visual.tokens).to(self._rows.device)
            self._rows[0, 0, tokens] = visual.features.embeds[visual.source]
            self._rows[1:, 0, tokens] = visual.features.levels[:, visual.source]
            self._is_visual[0, tokens] = True

    def inputs(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """The decoder's inputs where ``embeds`` ``[1, seq, hidden_size]`` are those of the text."""
        mixed = torch.where(self._is_visual, self._rows[0], embeds)
        return {bindings.INPUTS_EMBEDS: mixed, bindings.DEEPSTACK_EMBEDS: self._rows[1:]}


class CapturedStep:
    """The decoder and what appends over up to ``seq`` tokens, which see all of the past, fed from one pinned array.

    The step itself copies that array to the device, places in the cache with it: the host's word counts, also after an
    interrupt. Tokens up to ``seq`` that are not there go nowhere, and none sees them.

    Args:
        what: how logs call it.
        run: the decoder on inputs by name on the device, and the appending; returns the decoder's outputs.
        text: the model's.
        device: where it runs.
        seq: tokens.
        levels: of DeepStack; there are visuals among the tokens, see `place`. 0: there are none.
        pool: memory of another step's graph, which this one's is made in; None: its own.

    Attributes:
        graph: from the first run on, where the device can and the step could be captured.
        logits: on the device, ``[1, vocab_size]``, of the last token that was there.
    """

    def __init__(
        self,
        what: str,
        run: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
        text: TextConfig,
        device: torch.device,
        seq: int,
        levels: int = 0,
        pool: object | None = None,
    ) -> None:
        self._what, self._decode, self._device, self._pool = what, run, device, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self._is_tried = device.type != "cuda"
        floats = {
            bindings.INPUTS_EMBEDS: (1, seq, text.hidden_size),
            bindings.ROPE_COS: (1, seq, text.head_dim),
            bindings.ROPE_SIN: (1, seq, text.head_dim),
        }
        integers = {bindings.PAST_LENGTH: (1,), bindings.PAST_VISIBLE: (1, 1), bindings.LOGIT_ROWS: (1,)}
        shapes = {**floats, **integers, SLOTS.name: (1, seq)}
        sizes = [math.prod(shape) for shape in shapes.values()]
        self._staged = torch.zeros(sum(sizes), pin_memory=device.type == "cuda")
        self._inputs = self._staged.to(device)
        staged, self._step_inputs = (
            {
                name: (part if name in floats else part.view(torch.int32)).view(shapes[name])
                for name, part in zip(shapes, whole.split(sizes), strict=True)
            }
            for whole in (self._staged, self._inputs)
        )
        self._visuals = PlacedVisuals(text, device, seq, levels) if levels else None
        self._no_deepstack = torch.zeros(0, 1, seq, text.hidden_size, device=device)
        self._host = {name: tensor.numpy() for name, tensor in staged.items()}
        self._host[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
        self.store_nothing()
        self._likeliest = torch.zeros(2, dtype=torch.float64, pin_memory=device.type == "cuda")

    def store_nothing(self) -> None:
        """Let the next run append nothing."""
        self._host[SLOTS.name][:] = -1

    def stage(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set the inputs of the tokens that there are: feeds, and a placement's arrays."""
        count = arrays[SLOTS.name].shape[1]
        self.store_nothing()
        for name, array in arrays.items():
            staged = self._host[name]
            if staged.ndim < 2:
                staged[:] = array
            elif name == SLOTS.name:
                staged[:, :count] = array
            else:
                staged[..., :count, :] = array
        self._host[bindings.LOGIT_ROWS][:] = count - 1

    def place(self, visuals: Sequence[VisualRows]) -> None:
        """Set which tokens of the next run are of visuals."""
        if self._visuals:
            self._visuals.place(visuals)

    def run(self) -> None:
        """Run what is staged, and wait for it; the first time on CUDA, record it for the next times."""
        if self.graph:
            self.graph.replay()
            self.logits = self._graph_logits
        elif not self._is_tried:
            self._run_and_capture()
        else:
            self.step()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @property
    def likeliest(self) -> tuple[int, float]:
        """The first of the likeliest tokens, and its logit, NaN if any is."""
        token, logit = self._likeliest.tolist()
        return int(token), logit

    def step(self) -> None:
        """From what is staged to `logits` on the device and `likeliest` on the host, without waiting for the device."""
        self._inputs.copy_(self._staged, non_blocking=True)
        inputs = {**self._step_inputs, bindings.DEEPSTACK_EMBEDS: self._no_deepstack}
        if self._visuals:
            inputs |= self._visuals.inputs(inputs[bindings.INPUTS_EMBEDS])
        self.logits = self._decode(inputs)[bindings.LOGITS]
        logit, token = self.logits[0].max(0)  # the first of equal ones, or of NaNs
        self._likeliest.copy_(torch.stack((token.double(), logit.double())), non_blocking=True)

    def _run_and_capture(self) -> None:
        """Run, which sets up what cannot be set up in a capture, then record `graph`, or say why it cannot be."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # which a capture that fails would leave the current one
            self.step()
            logits, self._is_tried = self.logits, True
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    self.step()
                self.graph, self._graph_logits = graph, self.logits
            except (RuntimeError, ValueError, UserError) as error:
                cause = error.__context__ or error  # ending a capture that failed is an error of its own
                log.warning("%s is no CUDA graph, and slower: it cannot be captured (%s)", self._what, cause)
        self.logits = logits  # a capture computes none
        torch.cuda.current_stream(self._device).wait_stream(stream)
