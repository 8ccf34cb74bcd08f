"""The Qwen3-VL forward pass for training: the Hugging Face model's weights, batched over pictures of one size.

Hugging Face's own forward loops over pictures in Python. This one computes the same function on uniform batches, with
the two kinds of block compiled once for all sizes. That it is the same function shows in evaluate.py, which runs the
checkpoint through Hugging Face's.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import Qwen3VLForConditionalGeneration

from tests.nano.batches import Batch, patchify, pixels
from tests.nano.checkpoint import PATCH_SIZE
from tests.nano.scenes import paint, put

VISION_ROPE_THETA = 10000.0
VISION_EPS = 1e-6
"""Both as Hugging Face's Qwen3VLVisionModel has them; the configuration does not."""
TEXT_EPS = 1e-6
"""The configuration's rms_norm_eps."""


class VisionWeights(NamedTuple):
    """A vision block's parameters."""

    norm1: torch.Tensor
    norm1_bias: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor
    proj: torch.Tensor
    proj_bias: torch.Tensor
    norm2: torch.Tensor
    norm2_bias: torch.Tensor
    fc1: torch.Tensor
    fc1_bias: torch.Tensor
    fc2: torch.Tensor
    fc2_bias: torch.Tensor


class TextWeights(NamedTuple):
    """A decoder layer's parameters."""

    norm1: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    norm2: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def vision_heads(w: VisionWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A vision block up to its attention: x [patches, hidden] to q, k, v, each [patches, heads, head_dim]."""
    h = functional.layer_norm(x, w.norm1.shape, w.norm1, w.norm1_bias, VISION_EPS)
    q, k, v = functional.linear(h, w.qkv, w.qkv_bias).unflatten(-1, (3, -1, cos.shape[-1])).unbind(1)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def vision_rest(w: VisionWeights, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """A vision block after its attention."""
    x = x + functional.linear(attended, w.proj, w.proj_bias)
    h = functional.layer_norm(x, w.norm2.shape, w.norm2, w.norm2_bias, VISION_EPS)
    h = functional.gelu(functional.linear(h, w.fc1, w.fc1_bias), approximate="tanh")
    return x + functional.linear(h, w.fc2, w.fc2_bias)


def text_heads(w: TextWeights, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A decoder layer up to its attention: x [tokens, hidden] to q, k, v, each [tokens, heads, head_dim]."""
    h = functional.rms_norm(x, w.norm1.shape, w.norm1, TEXT_EPS)
    heads = (-1, cos.shape[-1])
    q = functional.rms_norm(functional.linear(h, w.q).unflatten(-1, heads), w.q_norm.shape, w.q_norm, TEXT_EPS)
    k = functional.rms_norm(functional.linear(h, w.k).unflatten(-1, heads), w.k_norm.shape, w.k_norm, TEXT_EPS)
    v = functional.linear(h, w.v).unflatten(-1, heads)
    return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v


def text_rest(w: TextWeights, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """A decoder layer after its attention."""
    x = x + functional.linear(attended, w.o)
    h = functional.rms_norm(x, w.norm2.shape, w.norm2, TEXT_EPS)
    return x + functional.linear(functional.silu(functional.linear(h, w.gate)) * functional.linear(h, w.up), w.down)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x [tokens, heads, head_dim]; channel i is paired with i + head_dim / 2. Keeps x's type."""
    first, second = x.float().chunk(2, -1)
    return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: int, causal: bool) -> torch.Tensor:
    """Attention within each of `batch` equal parts of q, k, v [tokens, heads, head_dim]; returns [tokens, hidden].

    Causal needs no mask for padding: it is on the right, where nothing looks at it.
    """
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


@functools.cache
def vision_tables(rows: int, cols: int, side: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """For a picture of rows x cols patches, in the order of its patches: the bilinear weights [patches, side * side] of
    the learned position grid (corners aligned), and the rotary cos and sin [patches, head_dim]."""

    def merged(table: torch.Tensor) -> torch.Tensor:  # [rows, cols, ...] to [patches, ...], four to a visual token
        blocks = table.unflatten(1, (-1, 2)).unflatten(0, (-1, 2))
        return blocks.transpose(1, 2).flatten(0, 3)

    def taps(size: int) -> torch.Tensor:
        position = torch.linspace(0, side - 1, size)
        return (1 - (position[:, None] - torch.arange(side)).abs()).clamp(min=0)  # [size, side]

    weights = taps(rows)[:, None, :, None] * taps(cols)[None, :, None, :]
    frequency = VISION_ROPE_THETA ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    y = torch.arange(rows)[:, None, None].expand(-1, cols, 1) * frequency
    x = torch.arange(cols)[None, :, None].expand(rows, -1, 1) * frequency
    angle = merged(torch.cat([y, x, y, x], -1))
    return tuple(table.to(device) for table in (merged(weights.flatten(2)), angle.cos(), angle.sin()))


def parameters(block: torch.nn.Module) -> list[torch.Tensor]:
    """A block's parameters in the order of VisionWeights or TextWeights: by the modules' use, weight before bias."""
    order = (
        ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.linear_fc1", "mlp.linear_fc2"),
        (
            "input_layernorm",
            *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            "post_attention_layernorm",
            *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
        ),
    )[hasattr(block, "self_attn")]
    return [parameter for name in order for parameter in block.get_submodule(name).parameters()]


class Output(NamedTuple):
    logits: torch.Tensor
    """[labels, vocabulary], at the places whose next token is trained."""
    patches: list[torch.Tensor]
    """One a slot: the vision encoder's last block, [all patches, hidden]."""
    tokens: list[torch.Tensor]
    """One a slot: the visual tokens given to the text model, [all tokens, hidden]."""


class Forward:
    """Runs a model on batches. `compiled` compiles the blocks with torch.compile, once for all sizes.

    The compiled functions take weights, not modules, which would be compiled for each layer anew, and leave attention
    out, whose kernels make the compiler tell sizes apart by their alignment.
    """

    def __init__(self, model: Qwen3VLForConditionalGeneration, compiled: bool = False) -> None:
        self.model = model
        self.vision_weights = [VisionWeights(*parameters(block)) for block in model.model.visual.blocks]
        self.text_weights = [TextWeights(*parameters(layer)) for layer in model.model.language_model.layers]
        self.compiled = compiled
        self.vision_heads, self.vision_rest, self.text_heads, self.text_rest, self.compiled_paint = (
            torch.compile(function) if compiled else function
            for function in (vision_heads, vision_rest, text_heads, text_rest, paint)
        )

    def any_length(self, *tensors: torch.Tensor, axes: tuple[int, ...] = (0,)) -> None:
        """Tells the compiler that these axes change from batch to batch."""
        if self.compiled:
            for tensor in tensors:
                for axis in axes:
                    torch._dynamo.mark_dynamic(tensor, axis)

    def paint(self, x: torch.Tensor, y: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        self.any_length(x, y, axes=(0, 1))
        self.any_length(*others[:-1])
        return self.compiled_paint(x, y, *others)

    def vision(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Frames [batch, frames, 3, height, width] to the last block's patches [all patches, hidden], visual tokens
        [all tokens, hidden] and DeepStack features like those."""
        visual = self.model.model.visual
        rows, cols = frames.shape[3] // PATCH_SIZE, frames.shape[4] // PATCH_SIZE
        head_dim = visual.config.hidden_size // visual.config.num_heads
        weights, cos, sin = vision_tables(rows, cols, visual.num_grid_per_side, head_dim, frames.device)
        kernel = visual.patch_embed.proj
        x = functional.linear(patchify(frames), kernel.weight.flatten(1), kernel.bias)
        x = x.float() + functional.linear(weights, visual.pos_embed.weight.t())
        pictures = len(x)
        x, cos, sin = x.flatten(0, 1), cos.repeat(pictures, 1), sin.repeat(pictures, 1)
        deep: list[torch.Tensor] = []
        for i, w in enumerate(self.vision_weights):
            self.any_length(x, cos, sin)
            attended = attend(*self.vision_heads(w, x, cos, sin), pictures, causal=False)
            self.any_length(attended)
            x = self.vision_rest(w, x, attended)
            if i in visual.deepstack_visual_indexes:
                deep.append(visual.deepstack_merger_list[len(deep)](x))
        return x, visual.merger(x), deep

    def __call__(self, batch: Batch, device: torch.device) -> Output:
        text = self.model.model.language_model
        rows, length = batch.input_ids.shape
        x = text.embed_tokens(put(batch.input_ids, device)).flatten(0, 1)
        index = put(batch.visual_index + np.arange(rows, dtype=np.int32)[:, None] * length, device).long().flatten()
        seen = [self.vision(pixels(slot, device, self.paint)) for slot in batch.slots]
        features: list[torch.Tensor] = []
        if seen:
            parts = [[tokens, *deep] for _, tokens, deep in seen]
            split = [[feature.unflatten(0, (rows, -1)) for feature in part] for part in parts]
            features = [torch.cat(slots, 1).flatten(0, 1).to(x.dtype) for slots in zip(*split, strict=True)]
            x = x.index_copy(0, index, features[0])
        cos, sin = (table.flatten(0, 1) for table in text.rotary_emb(x, put(batch.position_ids, device)))
        for i, w in enumerate(self.text_weights):
            self.any_length(x, cos, sin)
            attended = attend(*self.text_heads(w, x, cos, sin), rows, causal=True)
            self.any_length(attended)
            x = self.text_rest(w, x, attended)
            if i + 1 < len(features):
                x = x.index_add(0, index, features[i + 1])
        logits = self.model.lm_head(text.norm(x[put(batch.label_index, device)]))
        return Output(logits, [patches for patches, _, _ in seen], [tokens for _, tokens, _ in seen])
