"""The two PyTorch modules that are exported: Hugging Face's own layers behind the engine interface of `bindings`."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, apply_rotary_pos_emb

from pascalvl.export.attention import PACKED_ATTN_IMPLEMENTATION, attention_forward
from pascalvl.plugins.model_config import TextConfig


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


class Attention(nn.Module):
    """A decoder layer's attention, with keys and values of the lengths that are cached.

    Takes over the submodules of Hugging Face's, with their names. Where values have a length of their own, ``v_proj``
    and ``o_proj`` are new; where keys have, ``query_basis`` and ``key_basis`` ``[num_kv_heads, head_dim, key_dim]`` are
    multiplied in after RoPE. What is new has no values yet; `pascalvl.export.transforms` tells them.
    """

    is_causal = True

    def __init__(self, attention: Qwen3VLTextAttention, text: TextConfig, layer: int) -> None:
        super().__init__()
        self._num_heads, self._num_kv_heads = text.num_attention_heads, text.num_key_value_heads
        self._head_dim, self._key_dim, self._value_dim = text.head_dim, text.key_dims[layer], text.value_dims[layer]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
        )  # fmt: skip
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        like = {"device": self.v_proj.weight.device, "dtype": self.v_proj.weight.dtype}
        if self._value_dim != self._head_dim:
            hidden, has_bias = text.hidden_size, self.v_proj.bias is not None
            self.v_proj = nn.Linear(hidden, self._num_kv_heads * self._value_dim, has_bias, **like)
            self.o_proj = nn.Linear(self._num_heads * self._value_dim, hidden, self.o_proj.bias is not None, **like)
        if self._key_dim != self._head_dim:
            shape = self._num_kv_heads, self._head_dim, self._key_dim
            self.query_basis = nn.Parameter(torch.empty(shape, **like))
            self.key_basis = nn.Parameter(torch.empty(shape, **like))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        new: list[tuple[torch.Tensor, torch.Tensor]],
        cache: dict[str, torch.Tensor | str | None],
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """As Hugging Face's layer calls it.

        Args:
            new: to which this call's keys and values are added, ``[batch, num_kv_heads, seq, dim]``.
            cache: the external one, as `attention_forward` takes it.
        """
        batch, seq, _ = hidden_states.shape
        query = self.q_norm(self.q_proj(hidden_states).view(batch, seq, -1, self._head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(batch, seq, -1, self._head_dim)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(batch, seq, -1, self._value_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self._key_dim != self._head_dim:
            # The heads of a group lie one after the other, as if they were its tokens.
            group = self._num_heads // self._num_kv_heads
            query = query.reshape(batch, self._num_kv_heads, group * seq, self._head_dim) @ self.query_basis
            query = query.reshape(batch, self._num_heads, seq, self._key_dim)
            key = key @ self.key_basis
        new.append((key, value))
        # The scale is the whole head's: a rank approximates its scores.
        output, _ = attention_forward(self, query, key, value, None, self._head_dim**-0.5, **cache)
        return self.o_proj(output.reshape(batch, seq, -1)), None


class Decoder(nn.Module):
    """New tokens and the cache to logits and new keys and values; arguments as `bindings.decoder_inputs` lists them.

    Returns what `bindings.decoder_outputs` lists, then the hidden states after each layer. Replaces the attention of
    ``model``'s layers by `Attention`, so that the model's parameters, by their names, are those of the decoder.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, text: TextConfig) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head
        for index, layer in enumerate(self.language_model.layers):
            layer.self_attn = Attention(layer.self_attn, text, index)

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
        new: list[tuple[torch.Tensor, torch.Tensor]] = []
        hidden = inputs_embeds
        after_layers = []
        lengths = {"past_length": past_length, "past_visible": past_visible, "recent_length": recent_length}
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer(
                hidden, position_embeddings=(rope_cos, rope_sin), new=new, cache={**lengths, **caches[index]}
            )
            if index < deepstack_embeds.shape[0]:
                hidden = hidden + deepstack_embeds[index]
            after_layers.append(hidden)
        logits = self.lm_head(self.language_model.norm(hidden[:, -1]))
        return logits, *(tensor for pair in new for tensor in pair), *after_layers
