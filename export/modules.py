"""The two PyTorch modules that are exported: Hugging Face's model behind the engine interface of `bindings`.

Every linear layer is a `QuantLinear`, in whatever format, with the norm before it, the activation behind it and the
residual in it; one takes the place of all that read the same inputs, as `MERGED` says. Norms stay Hugging Face's own
modules. `pascalvl.export.quantised_weights` tells the layers' values.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLTextAttention,
    Qwen3VLTextDecoderLayer,
    Qwen3VLTextMLP,
    Qwen3VLVisionAttention,
    Qwen3VLVisionBlock,
    Qwen3VLVisionMLP,
    Qwen3VLVisionPatchEmbed,
    Qwen3VLVisionPatchMerger,
)

from pascalvl.plugins.errors import UserError, shown
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.model_config import TextConfig
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.torch_op import flash_attention_2
from pascalvl.plugins.ops.quant_linear.op import GATED_BLOCK, Activation
from pascalvl.plugins.ops.quant_linear.torch_op import QuantLinear
from pascalvl.plugins.weight_format import F32, FLOAT_WEIGHTS, WeightConfig, WeightFormat

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
MERGED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
"""Layers that read the same inputs and are one; gates and values lie as `Activation` says."""
ACTIVATIONS = {
    "text_config": {"silu": Activation.SILU_GATED},
    "vision_config": {"gelu_pytorch_tanh": Activation.GELU_TANH, "gelu": Activation.GELU_ERF},
}
"""By a config's part: what the op has of its ``hidden_act``."""


def activation(part: str, hidden_act: str) -> Activation:
    """That of a config's part; raises `UserError` for one that the op does not have."""
    known = ACTIVATIONS[part]
    if hidden_act not in known:
        raise UserError(
            f"hidden_act {shown(hidden_act)} of the {part} is not supported: expected {' or '.join(known)}."
        )
    return known[hidden_act]


def _like(linear: nn.Linear, form: WeightFormat, kind: Activation = Activation.NONE) -> QuantLinear:
    """What takes the place of a linear layer."""
    device, has_bias = linear.weight.device, linear.bias is not None
    return QuantLinear(linear.in_features, linear.out_features, form, has_bias, kind, device)


class PatchEmbed(nn.Module):
    """Hugging Face's: a convolution whose stride is its kernel is a matrix product over flattened patches.

    Its weight is in float: no checkpoint has codes for it, and it is some 0.4% of the encoder's work.
    """

    def __init__(self, patch_embed: Qwen3VLVisionPatchEmbed, form: WeightFormat) -> None:
        super().__init__()
        weight = patch_embed.proj.weight
        form = WeightFormat(max(form.bits, 16), form.group)
        has_bias = patch_embed.proj.bias is not None
        self.proj = QuantLinear(weight[0].numel(), len(weight), form, has_bias, device=weight.device)

    def forward(self, pixel_values: torch.Tensor, position_embeds: torch.Tensor | None = None) -> torch.Tensor:
        return self.proj(pixel_values, position_embeds)


class VisionAttention(nn.Module):
    """Hugging Face's."""

    def __init__(self, attention: Qwen3VLVisionAttention, form: WeightFormat) -> None:
        super().__init__()
        heads, head_dim = attention.num_heads, attention.head_dim
        self._options = AttentionOptions(False, attention.scaling, heads, heads, head_dim, head_dim)
        self.qkv, self.proj = _like(attention.qkv, form), _like(attention.proj, form)

    def forward(
        self,
        hidden: torch.Tensor,
        norm: nn.Module,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Returns ``hidden``, ``[patches, hidden_size]``, plus what attention makes of it, normed."""
        qkv = self.qkv(hidden, norm=norm)
        (out,) = flash_attention_2(qkv, None, None, *position_embeddings, cu_seqlens, *[None] * 6, *self._options.flat)
        return self.proj(out, hidden)


class VisionMLP(nn.Module):
    """Hugging Face's."""

    def __init__(self, mlp: Qwen3VLVisionMLP, form: WeightFormat, kind: Activation) -> None:
        super().__init__()
        self.linear_fc1, self.linear_fc2 = _like(mlp.linear_fc1, form, kind), _like(mlp.linear_fc2, form)

    def forward(self, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Returns ``hidden`` plus what the MLP makes of it, normed."""
        return self.linear_fc2(self.linear_fc1(hidden, norm=norm), hidden)


class VisionBlock(nn.Module):
    """Hugging Face's vision block; takes over its norms."""

    def __init__(self, block: Qwen3VLVisionBlock, form: WeightFormat, kind: Activation) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn, self.mlp = VisionAttention(block.attn, form), VisionMLP(block.mlp, form, kind)

    def forward(
        self,
        hidden: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **_: object,
    ) -> torch.Tensor:
        """As Hugging Face's model calls it too."""
        return self.mlp(self.attn(hidden, self.norm1, cu_seqlens, position_embeddings), self.norm2)


class PatchMerger(nn.Module):
    """Hugging Face's; its norm is over each patch of those that are merged, or over all of them."""

    def __init__(self, merger: Qwen3VLVisionPatchMerger, form: WeightFormat) -> None:
        super().__init__()
        self.norm = merger.norm
        size = merger.norm.weight.numel()
        if form.is_quantised and size != merger.linear_fc1.in_features and size % form.group:
            raise UserError(
                f"the vision encoder's hidden size of {size} is no multiple of groups of {form.group} inputs, as the "
                "kernels need it: give --weights another group, or vision=f16."
            )
        self.linear_fc1 = _like(merger.linear_fc1, form, Activation.GELU_ERF)
        self.linear_fc2 = _like(merger.linear_fc2, form)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear_fc2(self.linear_fc1(hidden.view(-1, self.linear_fc1.in_features), norm=self.norm))


class VisionEncoder(nn.Module):
    """Patches to image embeddings and DeepStack features; inputs and outputs as `bindings.vision_inputs` lists them.

    Replaces the layers of ``model``'s vision encoder, so that its parameters, by their names, are those of this module.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, form: WeightFormat = F32) -> None:
        super().__init__()
        self.visual = visual = model.model.visual
        kind = activation("vision_config", visual.config.hidden_act)
        visual.patch_embed = PatchEmbed(visual.patch_embed, form)
        for index, block in enumerate(visual.blocks):
            visual.blocks[index] = VisionBlock(block, form, kind)
        visual.merger = PatchMerger(visual.merger, form)
        for level, merger in enumerate(visual.deepstack_merger_list):
            visual.deepstack_merger_list[level] = PatchMerger(merger, form)

    def forward(
        self,
        pixel_values: torch.Tensor,
        position_embeds: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        cu_seqlens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        visual = self.visual
        hidden = visual.patch_embed(pixel_values, position_embeds)
        deepstack = {}
        for index, block in enumerate(visual.blocks):
            hidden = block(hidden, cu_seqlens, (rope_cos, rope_sin))
            if index in visual.deepstack_visual_indexes:
                level = visual.deepstack_visual_indexes.index(index)
                deepstack[level] = visual.deepstack_merger_list[level](hidden)
        return visual.merger(hidden), torch.stack([deepstack[level] for level in sorted(deepstack)])


NewRows = tuple[torch.Tensor, ...]
"""A layer's new keys, values and, of quantised formats, scales, as the cache has them."""
Past = dict[str, torch.Tensor | str]
"""A layer's cache: past_key, past_value, past_scale where quantised; kv_format; and of the call cu_seqlens,
past_length, page_table, past_visible."""


class Attention(nn.Module):
    """A decoder layer's attention, with values of the length that is cached; takes over Hugging Face's norms."""

    def __init__(self, attention: Qwen3VLTextAttention, text: TextConfig, layer: int, form: WeightFormat) -> None:
        super().__init__()
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        heads, head_dim = (text.num_attention_heads, text.num_key_value_heads), text.head_dim
        epsilon = attention.q_norm.variance_epsilon
        self._options = AttentionOptions(True, head_dim**-0.5, *heads, head_dim, text.value_dims[layer], epsilon)
        has_bias, has_output_bias = attention.v_proj.bias is not None, attention.o_proj.bias is not None
        device, width = attention.v_proj.weight.device, sum(self._options.widths)
        of_values = text.num_attention_heads * text.value_dims[layer]
        self.qkv_proj = QuantLinear(text.hidden_size, width, form, has_bias, device=device)
        self.o_proj = QuantLinear(of_values, text.hidden_size, form, has_output_bias, device=device)

    def forward(
        self,
        hidden: torch.Tensor,
        norm: nn.Module,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        new: list[NewRows] | None,
        past: Past | None,
    ) -> torch.Tensor:
        """Returns ``hidden`` plus what the layer's attention makes of it, normed.

        Args:
            hidden: ``[tokens, hidden_size]``; without a cache ``[batch, seq, hidden_size]``, as Hugging Face's are.
            new: to which this call's rows are added; None: nowhere.
            past: the external cache; None: there is none.
        """
        options, norms = self._options, (self.q_norm.weight, self.k_norm.weight)
        qkv = self.qkv_proj(hidden, norm=norm)
        if past is None:
            batch, seq = hidden.shape[:2]
            bounds = seq * torch.arange(batch + 1, dtype=torch.int32, device=hidden.device)
            tables = (table.expand(batch, -1, -1).flatten(0, 1) for table in position_embeddings)
            out, *_ = flash_attention_2(qkv.flatten(0, 1), *norms, *tables, bounds, *[None] * 6, *options.flat)
            return self.o_proj(out.view(batch, seq, -1), hidden)
        names = "cu_seqlens", "past_length", "page_table", "past_visible", "past_key", "past_value", "past_scale"
        options = dataclasses.replace(options, kv_format=KVFormat(past.get("kv_format", KVFormat.F32)))
        cache = [past.get(name) for name in names]
        out, *rows = flash_attention_2(qkv, *norms, *position_embeddings, *cache, *options.flat)
        if new is not None:
            new.append(tuple(rows))
        return self.o_proj(out, hidden)


class GatedMLP(nn.Module):
    """A decoder layer's MLP, its hidden width padded to whole blocks of gates."""

    def __init__(self, mlp: Qwen3VLTextMLP, form: WeightFormat) -> None:
        super().__init__()
        width = -(-mlp.intermediate_size // GATED_BLOCK) * GATED_BLOCK
        kind, device = activation("text_config", mlp.config.hidden_act), mlp.down_proj.weight.device
        self.gate_up_proj = QuantLinear(mlp.hidden_size, 2 * width, form, False, kind, device)
        self.down_proj = QuantLinear(width, mlp.hidden_size, form, device=device)

    def forward(self, hidden: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """Returns ``hidden`` plus what the MLP makes of it, normed."""
        return self.down_proj(self.gate_up_proj(hidden, norm=norm), hidden)


class DecoderLayer(nn.Module):
    """Hugging Face's decoder layer over the external cache; takes over its norms, with their names."""

    def __init__(self, layer: Qwen3VLTextDecoderLayer, text: TextConfig, index: int, form: WeightFormat) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.self_attn = Attention(layer.self_attn, text, index, form)
        self.mlp = GatedMLP(layer.mlp, form)

    def forward(
        self,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        new: list[NewRows] | None = None,
        past: Past | None = None,
        **_: object,
    ) -> torch.Tensor:
        """As Hugging Face's model calls it too, whose cache stays empty; arguments as those of `Attention`."""
        hidden = self.self_attn(hidden, self.input_layernorm, position_embeddings, new, past)
        return self.mlp(hidden, self.post_attention_layernorm)


class Decoder(nn.Module):
    """New tokens and the cache to logits and new keys and values; arguments as `bindings.decoder_inputs` lists them.

    Returns what `bindings.decoder_outputs` lists, then the hidden states after each layer. Replaces ``model``'s layers
    and lm_head, so that the model's parameters, by their names, are those of the decoder.
    """

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, text: TextConfig, weights: WeightConfig = FLOAT_WEIGHTS
    ) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.lm_head = model.lm_head = _like(model.lm_head, weights.lm_head)
        layers = self.language_model.layers
        for index, form in enumerate(weights.layers(len(layers))):
            layers[index] = DecoderLayer(layers[index], text, index, form)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        deepstack_embeds: torch.Tensor,
        cu_seqlens: torch.Tensor,
        past_length: torch.Tensor,
        page_table: torch.Tensor,
        past_visible: torch.Tensor,
        logit_rows: torch.Tensor,
        caches: list[Past],
    ) -> tuple[torch.Tensor, ...]:
        new: list[NewRows] = []
        hidden = inputs_embeds
        after_layers = []
        call = {"cu_seqlens": cu_seqlens, "past_length": past_length}
        call |= {"page_table": page_table, "past_visible": past_visible}
        for index, layer in enumerate(self.language_model.layers):
            hidden = layer(hidden, (rope_cos, rope_sin), new, {**call, **caches[index]})
            if index < deepstack_embeds.shape[0]:
                hidden = hidden + deepstack_embeds[index]
            after_layers.append(hidden)
        wanted = nn.functional.embedding(logit_rows, hidden)
        logits = self.lm_head(wanted, norm=self.language_model.norm)
        return logits, *(rows for of_layer in new for rows in of_layer), *after_layers
