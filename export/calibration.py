"""Statistics of a model's keys, values and queries on a user's own prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, Qwen3VLForConditionalGeneration, Qwen3VLTextConfig
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextRotaryEmbedding,
    Qwen3VLVisionRotaryEmbedding,
)
from transformers.utils import logging

from pascalvl.export.checkpoint import TOKEN_EMBEDDINGS, Checkpoint, model_inputs
from pascalvl.export.transforms import DECODER_LAYERS, LayerStatistics, WeightSource
from pascalvl.plugins.errors import UserError
from pascalvl.plugins.ops.flash_attention.drop_in import attention_forward
from pascalvl.plugins.prompt import Prompt

LEAST_TOKENS = 128
"""A head's statistics have as many dimensions."""
_ATTN_IMPLEMENTATION = "pascalvl_calibration"


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise `UserError` where there are too few tokens to learn from."""
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    if tokens < LEAST_TOKENS:
        raise UserError(
            f"expected prompts of at least {LEAST_TOKENS} tokens to calibrate with, better a few thousand, found "
            f"{len(prompts)} of {tokens} tokens: give more of them, and pictures, as the model will be asked."
        )


def calibrate(
    checkpoint: Path, prompts: Sequence[Prompt], progress: Callable[[], None] = lambda: None
) -> list[LayerStatistics]:
    """Run prompts through Hugging Face's layers, in float32 on the CPU; returns each layer's statistics.

    Every token counts alike. Memory holds a layer and all prompts' hidden states. Equal prompts give equal statistics.

    Args:
        checkpoint: folder of the Hugging Face model.
        prompts: at least `LEAST_TOKENS` tokens together.
        progress: called after each layer.

    Raises:
        UserError: too few tokens, or the model's answer is not finite.
    """
    statistics = []
    with Checkpoint(checkpoint) as opened:
        hidden = HiddenStates(opened, prompts)
        for _ in range(cast(Qwen3VLTextConfig, opened.hf_config.text_config).num_hidden_layers):
            statistics.append(hidden.statistics(opened, keep=True))
            progress()
    return statistics


class HiddenStates:
    """What prompts are between two decoder layers of a checkpoint's model, float32.

    Attributes:
        layer: number of the layer that comes next.
        states: of each prompt, ``[1, seq, hidden_size]``.
    """

    def __init__(self, checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> None:
        check_prompts(prompts)
        self._model = checkpoint.meta_model()
        make_runnable(self._model, checkpoint)
        visual, language_model = self._model.model.visual, self._model.model.language_model
        # Of the text alone, not of the vision encoder.
        language_model.config._attn_implementation = _ATTN_IMPLEMENTATION
        assign(visual, {name: checkpoint.tensor(f"model.visual.{name}") for name, _ in visual.named_parameters()})
        self.layer = 0
        self.states: list[torch.Tensor] = []
        self._positions: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._visual: list[tuple[torch.Tensor, list[torch.Tensor]] | None] = []
        language_model.forward = self._record
        with torch.no_grad():
            for prompt in prompts:
                with contextlib.suppress(_RecordedError):
                    self._model.model(**model_inputs(self._model, prompt), use_cache=False)
        visual.to("meta")

    def _record(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None,
        visual_pos_masks: torch.Tensor | None = None,
        deepstack_visual_embeds: list[torch.Tensor] | None = None,
        **_: object,
    ) -> None:
        """Takes the place of the language model."""
        self.states.append(inputs_embeds)
        if position_ids is None:  # of text alone
            position_ids = torch.arange(inputs_embeds.shape[1]).expand(3, 1, -1)
        self._positions.append(self._model.model.language_model.rotary_emb(inputs_embeds, position_ids[-3:]))
        if visual_pos_masks is None or deepstack_visual_embeds is None:
            self._visual.append(None)
        else:
            self._visual.append((visual_pos_masks, list(deepstack_visual_embeds)))
        raise _RecordedError

    def run(self, layer: nn.Module, keep: bool) -> None:
        """Run a layer on all prompts; where told to ``keep`` them, its outputs take the place of what it was given."""
        with torch.no_grad():
            for number, state in enumerate(self.states):
                out = layer(state, position_embeddings=self._positions[number], attention_mask=None)
                if not keep:
                    continue
                if (visual := self._visual[number]) and self.layer < len(visual[1]):
                    out = out.clone()
                    out[visual[0]] += visual[1][self.layer]
                self.states[number] = out
        self.layer += keep

    def statistics(self, weights: WeightSource, keep: bool) -> LayerStatistics:
        """Run the next layer as Hugging Face has it, with ``weights``, and see to its queries, keys and values."""
        layer = self._model.model.language_model.layers[self.layer]
        prefix = f"{DECODER_LAYERS}{self.layer}."
        assign(layer, {name: weights.tensor(prefix + name) for name, _ in layer.named_parameters()})
        layer.self_attn.moments = _Moments()
        index = self.layer
        self.run(layer, keep)
        layer.to("meta")
        return layer.self_attn.moments.statistics(index)

    def layer_module(self) -> Qwen3VLTextDecoderLayer:
        """The next layer, without weights."""
        return cast(Qwen3VLTextDecoderLayer, self._model.model.language_model.layers[self.layer])


def make_runnable(model: Qwen3VLForConditionalGeneration, checkpoint: Checkpoint) -> None:
    """Give a model on the meta device what is no parameter, and its token embeddings, mapped from the checkpoint."""
    visual, language_model = model.model.visual, model.model.language_model
    language_model.rotary_emb = Qwen3VLTextRotaryEmbedding(language_model.config)
    visual.rotary_pos_emb = Qwen3VLVisionRotaryEmbedding(visual.config)
    language_model.embed_tokens = _Embedding(checkpoint.tensor(TOKEN_EMBEDDINGS))


class _RecordedError(Exception):
    """The language model's inputs are known."""


class _Embedding(nn.Module):
    """Rows of a table, widened as they are read."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self._table = table

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(token_ids, self._table).float()


def assign(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Give a module on the meta device its parameters, in float32."""
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


class _Moments:
    """Sums of x x^T over tokens, of one layer's queries, keys and values."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: torch.Tensor | int = 0

    def add(self, *states: torch.Tensor) -> None:
        """Count a prompt's query, key and value, ``[1, heads, seq, head_dim]``."""
        (_, heads, seq, dim), rows = states[1].shape, []
        for x in states:
            grouped = x[0].double().reshape(heads, -1, dim)
            rows.append(grouped.mT @ grouped)
        self._sums += torch.stack(rows)
        self._tokens += seq

    def statistics(self, layer: int) -> LayerStatistics:
        means = torch.as_tensor(self._sums / self._tokens)
        if not means.isfinite().all():
            raise UserError(
                f"layer {layer} of the model computes values that are not finite on the prompts to calibrate with: "
                "download the model again."
            )
        return LayerStatistics(*means.numpy())


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **options: Any
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
