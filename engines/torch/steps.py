"""Steps of the torch backend's decoder as CUDA graphs: of padded numbers of tokens and sequences."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pascalvl.engines.device.choices import CHOICES
from pascalvl.engines.device.padding import StepShape
from pascalvl.engines.engine import ALWAYS_VISIBLE, SLOTS, VisualRows
from pascalvl.plugins import bindings
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kernels.library import CHOICE, KernelLibrary
from pascalvl.plugins.model_config import TextConfig

log = logging.getLogger(__name__)


class PlacedVisuals:
    """Features of pictures and videos among a step's ``tokens``; they stay on the device."""

    def __init__(self, text: TextConfig, device: torch.device, tokens: int, levels: int) -> None:
        self._rows = torch.zeros(1 + levels, tokens, text.hidden_size, device=device)
        """Embeddings, then DeepStack's levels."""
        self._is_visual = torch.zeros(tokens, 1, dtype=torch.bool, device=device)

    def place(self, visuals: Sequence[VisualRows]) -> None:
        """Set which tokens are of visuals."""
        self._rows.zero_()
        self._is_visual.zero_()
        for visual in visuals:
            tokens = torch.from_numpy(visual.tokens).to(self._rows.device)
            self._rows[0, tokens] = visual.features.embeds[visual.source]
            self._rows[1:, tokens] = visual.features.levels[:, visual.source]
            self._is_visual[tokens] = True

    def inputs(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """The decoder's inputs where ``embeds`` ``[tokens, hidden_size]`` are those of the text."""
        mixed = torch.where(self._is_visual, self._rows[0], embeds)
        return {bindings.INPUTS_EMBEDS: mixed, bindings.DEEPSTACK_EMBEDS: self._rows[1:]}


class CapturedStep:
    """The decoder and what appends, over tokens that see all of their past, fed from one pinned array.

    The step itself copies that array to the device, places in the cache with it: the host's word counts, also after an
    interrupt. Tokens that are not there go nowhere, and none sees them; of each sequence the last token's logits come.

    Args:
        what: how logs call it.
        run: the decoder on inputs by name on the device, and the appending; returns the decoder's outputs.
        kernels: for the choice of tokens.
        text: the model's.
        device: where it runs.
        shape: how many tokens and sequences there may be.
        sequence_pages: that a sequence may have.
        memory: gives memory of another step's graph, which this one's is made in; None: its own.

    Attributes:
        host: its inputs by name, in the pinned array: set them before a run.
        graph: from the first run on, where the device can and the step could be captured.
        outputs: on the device: logits ``[batch, vocab_size]``, and of marked layers hidden states of all tokens.
    """

    def __init__(
        self,
        what: str,
        run: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
        kernels: KernelLibrary,
        text: TextConfig,
        device: torch.device,
        shape: StepShape,
        sequence_pages: int,
        memory: Callable[[], Any],
    ) -> None:
        self._what, self._decode, self._device, self._memory = what, run, device, memory
        self._kernels = kernels
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Mapping[str, torch.Tensor] = {}
        self._graph_outputs: Mapping[str, torch.Tensor] = {}
        self._is_tried = device.type != "cuda"
        tokens, batch = shape.tokens, shape.batch
        floats = {
            bindings.INPUTS_EMBEDS: (tokens, text.hidden_size),
            bindings.ROPE_COS: (tokens, text.head_dim),
            bindings.ROPE_SIN: (tokens, text.head_dim),
        }
        integers = {
            CHOICES.name: (batch, CHOICE.itemsize // 4),  # first of them, where it is aligned
            bindings.CU_SEQLENS: (batch + 1,),
            bindings.PAST_LENGTH: (batch,),
            bindings.PAGE_TABLE: (batch, sequence_pages),
            bindings.PAST_VISIBLE: (batch, 1),
            bindings.LOGIT_ROWS: (batch,),
            SLOTS.name: (tokens,),
        }
        shapes = {**floats, **integers}
        sizes = [math.prod(sizes) for sizes in shapes.values()]
        self._staged = torch.zeros(sum(sizes), pin_memory=device.type == "cuda")
        self._inputs = self._staged.to(device)
        staged, self._step_inputs = (
            {
                name: (part if name in floats else part.view(torch.int32)).view(shapes[name])
                for name, part in zip(shapes, whole.split(sizes), strict=True)
            }
            for whole in (self._staged, self._inputs)
        )
        self._visuals = PlacedVisuals(text, device, tokens, shape.levels) if shape.levels else None
        self._no_deepstack = torch.zeros(0, tokens, text.hidden_size, device=device)
        self.host = {name: tensor.numpy() for name, tensor in staged.items()}
        self.host[CHOICES.name] = self.host[CHOICES.name].view(CHOICE)[:, 0]
        self.host[bindings.PAST_VISIBLE][:] = ALWAYS_VISIBLE
        self.store_nothing()
        self._token, self._logit = (torch.zeros(batch, dtype=t, device=device) for t in (torch.int32, torch.float32))
        self._chosen = torch.zeros(2, batch, dtype=torch.int32, pin_memory=device.type == "cuda")

    def store_nothing(self) -> None:
        """Let the next run append nothing, and choose the likeliest tokens."""
        self.host[SLOTS.name][:] = -1
        self.host[CHOICES.name][:] = np.zeros((), CHOICE)

    def place(self, visuals: Sequence[VisualRows]) -> None:
        """Set which tokens of the next run are of visuals."""
        if self._visuals:
            self._visuals.place(visuals)

    def run(self) -> None:
        """Run on what `host` holds, and wait for it; the first time on CUDA, record it for the next times."""
        if self.graph:
            self.graph.replay()
            self.outputs = self._graph_outputs
        elif not self._is_tried:
            self._run_and_capture()
        else:
            self._step()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    @property
    def chosen(self) -> list[tuple[int, float]]:
        """Of each sequence the token chosen, and the highest logit, NaN if any is."""
        token, logit = self._chosen
        return list(zip(token.tolist(), logit.view(torch.float32).tolist(), strict=True))

    def _step(self) -> None:
        """From `host` to `outputs` on the device and `chosen` on the host, without waiting for the device."""
        self._inputs.copy_(self._staged, non_blocking=True)
        choices = self._step_inputs[CHOICES.name]
        inputs = {name: tensor for name, tensor in self._step_inputs.items() if name != CHOICES.name}
        inputs = {**inputs, bindings.DEEPSTACK_EMBEDS: self._no_deepstack}
        if self._visuals:
            inputs |= self._visuals.inputs(inputs[bindings.INPUTS_EMBEDS])
        self.outputs = self._decode(inputs)
        torch_calls.choose(self._kernels, self.outputs[bindings.LOGITS], choices, self._token, self._logit)
        self._chosen.copy_(torch.stack((self._token, self._logit.view(torch.int32))), non_blocking=True)

    def _run_and_capture(self) -> None:
        """Run, which sets up what cannot be set up in a capture, then record `graph`, or say why it cannot be."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # which a capture that fails would leave the current one
            self._step()
            outputs, self._is_tried = self.outputs, True
            try:
                with torch.cuda.graph(graph, pool=self._memory(), stream=stream):
                    self._step()
                self.graph, self._graph_outputs = graph, self.outputs
            except (RuntimeError, ValueError, UserError) as error:
                cause = error.__context__ or error  # ending a capture that failed is an error of its own
                log.warning("%s is no CUDA graph, and slower: it cannot be captured (%s)", self._what, cause)
        self.outputs = outputs  # a capture computes none
        torch.cuda.current_stream(self._device).wait_stream(stream)
