"""Engine against Hugging Face's model in float32, output by output, through polygraphy.

A prompt is answered greedily by the reference; the candidate is then forced along the same tokens, so that every decode
step of both sees the same past and each step's logits can be compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from pascalvl.engines.tolerance import TOLERANCE
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.prompt import Prompt
from pascalvl.plugins.terminal import shows_progress

if TYPE_CHECKING:
    import torch

VISION_EMBEDS = "vision.embeds"
PREFILL_LOGITS = "prefill.logits"


def vision_deepstack(level: int) -> str:
    return f"vision.deepstack.{level}"


def prefill_hidden_states(layer: int) -> str:
    return f"prefill.hidden_states.{layer}"


def decode_logits(step: int) -> str:
    return f"decode.logits.{step}"


Outputs = Mapping[str, np.ndarray]
Candidate = Callable[[str, Sequence[int]], Outputs]
"""Answers the prompt of that name forced along the given tokens; returns outputs by the names above."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One output of one prompt compared: its largest absolute error against what is allowed."""

    prompt: str
    output: str
    max_error: float
    tolerance: float
    scale: float
    """Largest absolute value that the reference has there."""

    @property
    def passed(self) -> bool:
        return self.max_error <= self.tolerance  # false for NaN


class ReferenceRunner(BaseRunner):
    """Hugging Face's Qwen3-VL, float32 on the CPU; ``forced`` receives its greedy answers by the prompts' names."""

    def __init__(self, checkpoint: Path, prompts: Mapping[str, Prompt], new_tokens: int) -> None:
        super().__init__(name="reference", prefix="reference")
        self._checkpoint = checkpoint
        self._prompts = list(prompts.items())
        self._new_tokens = new_tokens
        self.forced: dict[str, list[int]] = {}

    def activate_impl(self) -> None:
        from transformers.utils import logging

        from pascalvl.export.checkpoint import load_model

        if not shows_progress():
            logging.disable_progress_bar()
        self._model = load_model(self._checkpoint)

    def deactivate_impl(self) -> None:
        del self._model

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _PROMPT_METADATA

    def infer_impl(self, feed_dict: dict[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        import torch

        from pascalvl.export.checkpoint import model_inputs

        start = time.perf_counter()
        name, prompt = self._prompts[int(feed_dict["prompt"][0])]
        with torch.no_grad(), _hidden_states(self._model) as hidden:
            outputs = OrderedDict(self._vision(prompt))
            result = self._model(**model_inputs(self._model, prompt), use_cache=True, logits_to_keep=1)
            outputs[PREFILL_LOGITS] = result.logits[:, -1].numpy()
            outputs.update((prefill_hidden_states(layer), value[0].numpy()) for layer, value in hidden.items())
            forced = []
            for step in range(self._new_tokens):
                forced.append(int(result.logits[0, -1].argmax()))
                token = torch.tensor([[forced[-1]]])
                result = self._model(input_ids=token, past_key_values=result.past_key_values, use_cache=True)
                outputs[decode_logits(step)] = result.logits[:, -1].numpy()
        self.forced[name] = forced
        self.inference_time = time.perf_counter() - start
        return outputs

    def _vision(self, prompt: Prompt) -> list[tuple[str, np.ndarray]]:
        import torch

        features = [
            self._model.model.visual(torch.from_numpy(patches.pixel_values), torch.tensor([patches.grid]))
            for patches in (visual.patches for visual in prompt.visuals)
        ]
        if not features:
            return []
        levels = zip(*(feature.deepstack_features for feature in features), strict=True)
        return [
            (VISION_EMBEDS, torch.cat([feature.pooler_output for feature in features]).numpy()),
            *((vision_deepstack(i), torch.cat(level).numpy()) for i, level in enumerate(levels)),
        ]


class CandidateRunner(BaseRunner):
    """The runtime on the engines, forced along the reference's tokens."""

    def __init__(
        self, candidate: Candidate, prompts: Sequence[str], forced: Mapping[str, Sequence[int]], name: str
    ) -> None:
        super().__init__(name=name, prefix=name)
        self._candidate = candidate
        self._prompts = prompts
        self._forced = forced

    def activate_impl(self) -> None:
        pass

    def deactivate_impl(self) -> None:
        pass

    def get_input_metadata_impl(self) -> TensorMetadata:
        return _PROMPT_METADATA

    def infer_impl(self, feed_dict: dict[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        start = time.perf_counter()
        prompt = self._prompts[int(feed_dict["prompt"][0])]
        outputs = OrderedDict(self._candidate(prompt, self._forced[prompt]))
        self.inference_time = time.perf_counter() - start
        return outputs


_PROMPT_METADATA = TensorMetadata().add("prompt", dtype=np.int64, shape=(1,))


def validate(
    checkpoint: Path,
    candidate: Candidate,
    prompts: Mapping[str, Prompt],
    allowed: float,
    new_tokens: int = 16,
    allowed_of_vision: float = TOLERANCE[KVFormat.F32],
    name: str = "engine",
) -> list[Row]:
    """Compare the candidate's outputs with those of the checkpoint in float32; returns one row an output and prompt.

    ``prompts`` are by name, ``allowed`` is `pascalvl.engines.tolerance.tolerance` of the candidate's cache and weights,
    ``allowed_of_vision`` its `vision_tolerance`.

    Raises:
        UserError: the candidate does not return an output that the reference has.
    """
    reference = ReferenceRunner(checkpoint, prompts, new_tokens)
    runners = [reference, CandidateRunner(candidate, list(prompts), reference.forced, name)]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(
            runners, data_loader=[{"prompt": np.array([i], np.int64)} for i in range(len(prompts))]
        )
        (_, expected), (_, found) = results.items()
        return [
            row
            for prompt, reference_outputs, outputs in zip(prompts, expected, found, strict=True)
            for row in _compare(prompt, reference_outputs, outputs, allowed, allowed_of_vision)
        ]


def _compare(prompt: str, expected: Outputs, found: Outputs, allowed: float, allowed_of_vision: float) -> list[Row]:
    if missing := [name for name in expected if name not in found and not name.startswith("prefill.hidden_states")]:
        raise UserError(f"the engine returned no {', '.join(missing)} for prompt {prompt!r}: it is for another model.")
    names = sorted((name for name in expected if name in found), key=_stage)
    allowed_of = {n: (allowed_of_vision if n.startswith("vision") else allowed) * _rms(expected[n]) for n in names}
    compare = SimpleCompareFunc(atol=allowed_of, rtol={name: 0.0 for name in names}, check_error_stat="max")
    results = compare(*(IterationResult({name: outputs[name] for name in names}) for outputs in (expected, found)))
    return [
        Row(prompt, name, float(results[name].max_absdiff), allowed_of[name], float(np.abs(expected[name]).max()))
        for name in names
    ]


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def summarise(rows: Sequence[Row]) -> list[Row]:
    """The worst row of each stage over all prompts and decode steps: vision, prefill, decode."""
    worst: dict[str, Row] = {}
    for row in rows:
        stage = re.sub(r"^decode\.logits\.\d+$", "decode.logits", row.output)
        row = dataclasses.replace(row, output=stage)
        if stage not in worst or not row.max_error / row.tolerance <= worst[stage].max_error / worst[stage].tolerance:
            worst[stage] = row
    return sorted(worst.values(), key=lambda row: _stage(row.output))


def first_deviation(rows: Sequence[Row]) -> Row | None:
    """The first output, in the order of computation, that is out of tolerance; None if there is none."""
    return next((row for row in sorted(rows, key=lambda row: _stage(row.output)) if not row.passed), None)


def _stage(output: str) -> tuple[int, int]:
    """Rank of an output in the order of computation: its stage, and its layer, level or step there."""
    stages = ("vision", "prefill.hidden_states", "prefill.logits", "decode")
    rank = next(rank for rank, prefix in enumerate(stages) if output.startswith(prefix))
    number = output.rpartition(".")[2]
    return rank, int(number) if number.isdigit() else -1


@contextlib.contextmanager
def _hidden_states(model: Any) -> Iterator[dict[int, torch.Tensor]]:
    """Collect, during a forward pass of several tokens, what each decoder layer hands to the next (DeepStack added)."""
    collected: dict[int, torch.Tensor] = {}
    language_model = model.model.language_model

    def note(layer: int) -> Callable[..., None]:
        def hook(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            collected.setdefault(layer, hidden)

        return hook

    receivers = [*language_model.layers[1:], language_model.norm]
    handles = [
        receiver.register_forward_pre_hook(note(layer), with_kwargs=True) for layer, receiver in enumerate(receivers)
    ]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
