"""The two PyTorch modules that are exported: Hugging Face's own layers behind the engine interface of `bindings`.

Where weights are quantised, `QuantLinear` takes the place of linear layers, one for those that read the same inputs;
`MERGED` says of which they are made. `pascalvl.export.quantised_weights` tells its values.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextMLP,
    apply_rotary_pos_emb,
)

from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.ops.flash_attention.torch_op import PACKED_ATTN_IMPLEMENTATION, attention_forward
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear
from pascalvl.plugins.weight_format import F32, FLOAT_WEIGHTS, WeightConfig, WeightFormat

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
MERGED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
"""Layers that read the same inputs and are one where they are quantised; gates and values lie as `Activation` says."""


class VisionEncoder(nn.Module):
    """Patches to image embeddings and DeepStack features; inputs and outputs as `bindings.vision_inputs` lists them."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, form: WeightFormat = F32) -> None:
        super().__init__()
        self.visual = model.model.visual
        self.visual.config._attn_implementation = PACKED_ATTN_IMPLEMENTATION
        if form.bits == 32:
            return
        for block in self.visual.blocks:
            _quantise(block.attn, ("qkv", "proj"), form)
            has_kernel = self.visual.config.hidden_act == "gelu_pytorch_tanh"
            _quantise(block.mlp, ("linear_fc1",), form, Activation.GELU_TANH if has_kernel else Activation.NONE)
            _quantise(block.mlp, ("linear_fc2",), form)
            if has_kernel:
                block.mlp.act_fn = nn.Identity()
        for merger in (self.visual.merger, *self.visual.deepstack_merger_list):
            _quantise(merger, ("linear_fc1", "linear_fc2"), form)

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
    """A decoder layer's attention, with values of the length that is cached.

    Takes over the submodules of Hugging Face's, with their names. Where values have a length of their own, ``v_proj``
    and ``o_proj`` are new, and have no values yet; `pascalvl.export.transforms` tells them.
    """

    is_causal = True

    def __init__(self, attention: Qwen3VLTextAttention, text: TextConfig, layer: int, form: WeightFormat) -> None:
        super().__init__()
        self._num_heads, self._num_kv_heads = text.num_attention_heads, text.num_key_value_heads
        self._head_dim, self._value_dim = text.head_dim, text.value_dims[layer]
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        like = {"device": attention.v_proj.weight.device, "dtype": attention.v_proj.weight.dtype}
        has_bias, has_output_bias = attention.v_proj.bias is not None, attention.o_proj.bias is not None
        hidden, of_values = text.hidden_size, self._num_heads * self._value_dim
        heads = self._num_heads, self._num_kv_heads, self._num_kv_heads
        dims = self._head_dim, self._head_dim, self._value_dim
        self._widths = [count * dim for count, dim in zip(heads, dims, strict=True)]
        """Of queries, keys and values of a token."""
        if form.bits != 32:
            self.qkv_proj = QuantLinear(hidden, sum(self._widths), form, has_bias, device=like["device"])
            self.o_proj = QuantLinear(of_values, hidden, form, has_output_bias, device=like["device"])
        else:
            self.qkv_proj = None
            self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
                attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            )  # fmt: skip
            if self._value_dim != self._head_dim:
                self.v_proj = nn.Linear(hidden, self._widths[2], has_bias, **like)
                self.o_proj = nn.Linear(of_values, hidden, has_output_bias, **like)

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        new: list[tuple[torch.Tensor, torch.Tensor]] | None,
        past: dict[str, torch.Tensor | str | None] | None,
    ) -> torch.Tensor:
        """Returns ``residual`` plus what the layer's attention makes of ``hidden_states``.

        Args:
            new: to which this call's keys and values are added, ``[batch, num_kv_heads, seq, dim]``; None: nowhere.
            past: the external cache, as `attention_forward` takes it; None: there is none.
        """
        batch, seq, _ = hidden_states.shape
        if self.qkv_proj is None:
            query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        else:
            whole, (queries, keys, _) = (
                self.qkv_proj(hidden_states),
                self._widths,
            )  # ONNX's Split has no way to opset 17
            query, key = whole[..., :queries], whole[..., queries : queries + keys]
            value = whole[..., queries + keys :]
        query = self.q_norm(query.view(batch, seq, self._num_heads, self._head_dim)).transpose(1, 2)
        key = self.k_norm(key.view(batch, seq, self._num_kv_heads, self._head_dim)).transpose(1, 2)
        value = value.view(batch, seq, self._num_kv_heads, self._value_dim).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if new is not None:
            new.append((key, value))
        output, _ = attention_forward(self, query, key, value, None, self._head_dim**-0.5, **(past or {}))
        return _added(self.o_proj, output.flatten(2), residual)


class GatedMLP(nn.Module):
    """A decoder layer's MLP in quantised weights, its hidden width padded to whole blocks of gates."""

    def __init__(self, mlp: Qwen3VLTextMLP, form: WeightFormat) -> None:
        super().__init__()
        width = -(-mlp.intermediate_size // GATED_BLOCK) * GATED_BLOCK
        device = mlp.down_proj.weight.device
        self.gate_up_proj = QuantLinear(mlp.hidden_size, 2 * width, form, False, Activation.SILU_GATED, device)
        self.down_proj = QuantLinear(width, mlp.hidden_size, form, device=device)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_up_proj(hidden_states), residual)


class DecoderLayer(nn.Module):
    """Hugging Face's decoder layer over the external cache; takes over its submodules, with their names."""

    def __init__(self, layer: Qwen3VLTextDecoderLayer, text: TextConfig, index: int, form: WeightFormat) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn = Attention(layer.self_attn, text, index, form)
        self.mlp = layer.mlp if form.bits == 32 else GatedMLP(layer.mlp, form)

    def forward(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        new: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
        past: dict[str, torch.Tensor | str | None] | None = None,
        **_: object,
    ) -> torch.Tensor:
        """As Hugging Face's model calls it too, whose cache stays empty; arguments as those of `Attention`."""
        hidden = self.self_attn(self.input_layernorm(hidden), hidden, position_embeddings, new, past)
        return _added(self.mlp, self.post_attention_layernorm(hidden), hidden)


def _added(layer: nn.Module, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """``residual + layer(x)``, in one where the layer's weights are quantised."""
    return layer(x, residual) if isinstance(layer, QuantLinear | GatedMLP) else residual + layer(x)


def _quantise(
    module: nn.Module, names: tuple[str, ...], form: WeightFormat, activation: Activation = Activation.NONE
) -> None:
    """Put `QuantLinear` in the place of a module's linear layers."""
    for name in names:
        linear = getattr(module, name)
        size, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        setattr(module, name, QuantLinear(*size, form, has_bias, activation, linear.weight.device))


class Decoder(nn.Module):
    """New tokens and the cache to logits and new keys and values; arguments as `bindings.decoder_inputs` lists them.

    ``logit_row``, int32 ``[1]``, is the token whose logits are wanted; None, as exported: the last.

    Returns what `bindings.decoder_outputs` lists, then the hidden states after each layer. Replaces ``model``'s layers
    by `DecoderLayer`, so that the model's parameters, by their names, are those of the decoder.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, text: TextConfig, weights: WeightConfig = FLOAT_WEIGHTS
    ) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        if weights.lm_head.bits != 32:
            _quantise(model, ("lm_head",), weights.lm_head)
        self.lm_head = model.lm_head
        layers = self.language_model.layers
        for index, form in enumerate(weights.layers(len(layers))):
            layers[index] = DecoderLayer(layers[index], text, index, form)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        deepstack_embeds: torch.Tensor,
        past_length: torch.Tensor,
        past_visible: torch.Tensor,
        caches: list[dict[str, torch.Tensor | str]],
        logit_row: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        new: list[tuple[torch.Tensor, torch.Tensor]] = []
        hidden = inputs_embeds
        after_layers = []
        lengths = {"past_length": past_length, "past_visible": past_visible}
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer(hidden, (rope_cos, rope_sin), new, {**lengths, **caches[index]})
            if index < deepstack_embeds.shape[0]:
                hidden = hidden + deepstack_embeds[index]
            after_layers.append(hidden)
        # A slice, then a reshape: TensorRT's importers hand a constant index of -1 on to Gather, where it is undefined.
        last = (hidden[:, -1:] if logit_row is None else hidden.index_select(1, logit_row)).flatten(0, 1)
        logits = self.lm_head(self.language_model.norm(last))
        return logits, *(tensor for pair in new for tensor in pair), *after_layers
