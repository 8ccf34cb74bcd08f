"""Statistics of a model's keys, values and queries on a user's own prompts."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import logging

from pascalvl.export.attention import attention_forward
from pascalvl.export.transforms import LayerStatistics
from pascalvl.plugins.errors import UserError

LEAST_TOKENS = 128
"""A head's statistics have as many dimensions."""
_ATTN_IMPLEMENTATION = "pascalvl_calibration"


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationVisual:
    """A preprocessed picture or video: ``pixel_values`` ``[patches, patch_dim]`` and its ``grid`` (t, h, w)."""

    pixel_values: np.ndarray
    grid: tuple[int, int, int]
    is_video: bool


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationPrompt:
    """A tokenised prompt, ``token_ids`` int64 ``[n]`` with placeholders expanded, and its visuals in order."""

    token_ids: np.ndarray
    visuals: Sequence[CalibrationVisual] = ()


def check_prompts(prompts: Sequence[CalibrationPrompt]) -> None:
    """Raise `UserError` where there are too few tokens to learn from."""
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"expected prompts of at least {LEAST_TOKENS} tokens to calibrate with, better a few thousand, found "
            f"{len(prompts)} of {tokens} tokens: give more of them, and pictures, as the model will be asked."
        )


def calibrate(
    checkpoint: Path, prompts: Sequence[CalibrationPrompt], progress: Callable[[], None] = lambda: None
) -> list[LayerStatistics]:
    """Run prompts through Hugging Face's model, in float32 on the CPU; returns each layer's statistics.

    Every token counts alike. Memory holds the model, one prompt's activations and the moments. Equal prompts give equal
    statistics.

    Args:
        checkpoint: folder of the Hugging Face model.
        prompts: at least `LEAST_TOKENS` tokens together.
        progress: called after each prompt.

    Raises:
        UserError: too few tokens, or the model's answer is not finite.
    """
    check_prompts(prompts)
    with quiet():
        model = Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    language_model = model.model.language_model
    language_model.config._attn_implementation = _ATTN_IMPLEMENTATION  # of the text alone, not of the vision encoder
    for layer in language_model.layers:
        layer.self_attn.moments = _Moments()
    with torch.no_grad():
        for prompt in prompts:
            model.model(**model_inputs(model, prompt), use_cache=False)
            progress()
    return [layer.self_attn.moments.statistics(index) for index, layer in enumerate(language_model.layers)]


def model_inputs(model: Qwen3VLForConditionalGeneration, prompt: CalibrationPrompt) -> dict[str, torch.Tensor]:
    """A prompt as Hugging Face's model takes it."""
    token_ids = torch.from_numpy(prompt.token_ids)[None]
    is_image, is_video = (token_ids == token for token in (model.config.image_token_id, model.config.video_token_id))
    inputs = {"input_ids": token_ids, "mm_token_type_ids": is_image.int() + 2 * is_video}
    for of_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        if visuals := [visual for visual in prompt.visuals if visual.is_video == of_video]:
            inputs[pixels] = torch.from_numpy(np.concatenate([visual.pixel_values for visual in visuals]))
            inputs[grid] = torch.tensor([visual.grid for visual in visuals])
    return inputs


class _Moments:
    """Sums of x x^T over tokens, of one layer's queries, keys and values."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums = 0

    def add(self, *states: torch.Tensor) -> None:
        """Count a prompt's query, key and value, ``[1, heads, seq, head_dim]``."""
        (_, heads, seq, dim), rows = states[1].shape, []
        for x in states:
            grouped = x[0].double().reshape(heads, -1, dim)
            rows.append(grouped.mT @ grouped)
        self._sums += torch.stack(rows)
        self._tokens += seq

    def statistics(self, layer: int) -> LayerStatistics:
        means = self._sums / self._tokens
        if not means.isfinite().all():
            raise UserError(
                f"layer {layer} of the model computes values that are not finite on the prompts to calibrate with: "
                "download the model again."
            )
        return LayerStatistics(*means.numpy())


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object, **options: object
) -> tuple[torch.Tensor, None]:
    """`attention_forward`, after counting what it is given."""
    module.moments.add(query, key, value)
    return attention_forward(module, query, key, value, *rest, **options)


AttentionInterface.register(_ATTN_IMPLEMENTATION, _attention)
AttentionMaskInterface.register(_ATTN_IMPLEMENTATION, flash_attention_mask)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bar: the export has one."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
