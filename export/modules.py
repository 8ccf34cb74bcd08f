"""The two PyTorch modules that are exported: Hugging Face's own layers behind the engine interface of `bindings`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration

from pascalvl.export.attention import PACKED_ATTN_IMPLEMENTATION


class VisionEncoder(nn.Module):
    """Patches to image embeddings and DeepStack features; inputs and outputs as `bindings.vision_inputs` lists them."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.visual.config._attn_implementation = PACKED_ATTN_IMPLEMENTATION

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_indices: torch.Tensor,
        position_weights: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visual = self.visual
        # A convolution whose stride is its kernel is a matrix product over flattened patches.
        projection = visual.patch_embed.proj
        hidden = nn.functional.linear(pixel_values, projection.weight.flatten(1), projection.bias)
        taps = nn.functional.embedding(position_indices, visual.pos_embed.weight)
        hidden = hidden + (taps * position_weights[:, :, None]).sum(1)
        deepstack = {}
        for index, block in enumerate(visual.blocks):
            hidden = block(hidden, cu_seqlens=cu_seqlens, position_embeddings=(rope_cos, rope_sin), max_seqlen=0)
            if index in visual.deepstack_visual_indexes:
                level = visual.deepstack_visual_indexes.index(index)
                deepstack[level] = visual.deepstack_merger_list[level](hidden)
        return visual.merger(hidden), torch.stack([deepstack[level] for level in sorted(deepstack)])


class _NewKeysValues:
    """Stands where transformers expects a cache: notes this call's keys and values, leaves the past to the caller."""

    def __init__(self) -> None:
        self.by_layer: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.by_layer.append((key, value))
        return key, value


class Decoder(nn.Module):
    """New tokens and the cache to logits and new keys and values; arguments as `bindings.decoder_inputs` lists them.

    Returns what `bindings.decoder_outputs` lists, then the hidden states after each layer.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        deepstack_embeds: torch.Tensor,
        past_length: torch.Tensor,
        past_visible: torch.Tensor,
        caches: list[dict[str, torch.Tensor | str]],
        recent_length: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        new = _NewKeysValues()
        hidden = inputs_embeds
        after_layers = []
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer(
                hidden,
                position_embeddings=(rope_cos, rope_sin),
                past_key_values=new,
                past_length=past_length,
                past_visible=past_visible,
                recent_length=recent_length,
                **caches[index],
            )
            if index < deepstack_embeds.shape[0]:
                hidden = hidden + deepstack_embeds[index]
            after_layers.append(hidden)
        logits = self.lm_head(self.language_model.norm(hidden[:, -1]))
        return logits, *(tensor for pair in new.by_layer for tensor in pair), *after_layers
