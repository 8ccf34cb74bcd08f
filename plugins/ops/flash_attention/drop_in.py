"""Attention for ordinary PyTorch use, over the kernels of FlashAttention2: the op `pascalvl::attention`.

Importing this module makes ``attn_implementation="pascalvl"`` known to transformers: a drop-in
(`from_pretrained(..., attn_implementation=ATTN_IMPLEMENTATION)`).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import PAGE_SLOTS, pages_of
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.tiled import TiledAttention

ATTN_IMPLEMENTATION = "pascalvl"


@torch.library.custom_op("pascalvl::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_length: torch.Tensor | None,
    past_visible: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """softmax(softmax_scale * q k^T + mask) v, masks as in `pascalvl.plugins.ops.flash_attention.op`.

    Tensors on CUDA go to the kernels, in float32; others to `TiledAttention`, in any float type. Differentiable once in
    q, k, v, past_key and past_value, on any device; memory is linear in the length both ways.

    Args:
        q: ``[batch, num_heads, seq, head_dim]``.
        k: ``[batch, num_kv_heads, seq, head_dim]``.
        v: ``[batch, num_kv_heads, seq, value_dim]``.
        cu_seqlens: int32 ``[segments + 1]``, bounds of the packed sequences; where not causal.
        past_key, past_value: ``[batch, num_kv_heads, capacity, dim]``; where causal. None: no past.
        past_length: int32 ``[batch]``, valid rows of the past; where there is one.
        past_visible: int32 ``[batch, capacity]`` or ``[batch, 1]``; None: every new token sees all of the past.
        causal: which of the two modes.
        softmax_scale: factor on q k^T.

    Returns:
        ``[batch, seq, num_heads, value_dim]``, of ``q``'s type.

    Raises:
        ValueError: the kernels do not support the arguments, for example the head size; says which they do.
    """
    if not torch_calls.serves(q.device):
        operands = past_key, past_value, past_length, past_visible
        return TiledAttention(q, k, v, cu_seqlens, *operands, causal, softmax_scale).forward()
    batch, num_heads, seq, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.shape[0] != batch or x.shape[2] != seq or x.shape[1] != k.shape[1]:
            raise ValueError(f"k and v have q's tokens; found q {list(q.shape)}, {name} {list(x.shape)}")
    for name, past_rows in (("past_key", past_key), ("past_value", past_value)):
        if past_rows is not None and past_rows.shape[:2] != k.shape[:2]:
            raise ValueError(
                f"the past has k's sequences and heads; found k {list(k.shape)}, {name} {list(past_rows.shape)}"
            )
    if not causal and batch != 1:
        raise ValueError(f"packed sequences have batch 1; found {batch}")
    qkv = torch.cat([x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (q, k, v)], -1)
    options = AttentionOptions(causal, softmax_scale, num_heads, k.shape[1], head_dim, v.shape[3])
    if causal:
        cu_seqlens = seq * torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    past = None
    if past_key is not None and past_key.shape[2]:
        past = _paged(past_key, cast(torch.Tensor, past_value), cast(torch.Tensor, past_length), past_visible)
    try:
        kernels = torch_calls.library(q.device)
        out, *_ = torch_calls.attention(kernels, options, qkv, cast(torch.Tensor, cu_seqlens), past=past)
    except UserError as error:
        raise ValueError(str(error)) from None
    return out.view(batch, seq, num_heads, v.shape[3])


def _paged(
    key: torch.Tensor, value: torch.Tensor, length: torch.Tensor, visible: torch.Tensor | None
) -> torch_calls.Past:
    """A past ``[batch, num_kv_heads, capacity, dim]`` copied into pages, as the kernels read it."""
    batch, capacity = key.shape[0], key.shape[2]
    pages = pages_of(capacity)
    missing = pages * PAGE_SLOTS - capacity
    keys, values = (
        nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1).contiguous()
        for rows in (key, value)
    )
    table = torch.arange(batch * pages, dtype=torch.int32, device=key.device).view(batch, pages)
    if visible is not None and visible.shape[1] != 1:
        visible = nn.functional.pad(visible, (0, missing))
    return torch_calls.Past(keys, values, None, table, length, visible)


@attention.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object) -> torch.Tensor:
    batch, num_heads, seq = q.shape[:3]
    return q.new_empty(batch, seq, num_heads, v.shape[3])


@torch.library.custom_op("pascalvl::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_length: torch.Tensor | None,
    past_visible: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v and, where there is a past, of past_key and past_value; ``grad`` is that of the output.

    An op of its own, because its loops depend on lengths: a compiler traces over them.
    """
    past = past_key, past_value, past_length, past_visible
    return TiledAttention(q, k, v, cu_seqlens, *past, causal, softmax_scale).backward(grad)


@_attention_backward.register_fake
def _(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    *_: object,
) -> list[torch.Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, past_key, past_value) if x is not None]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.causal, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, *of_past = _attention_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.softmax_scale)
    return dq, dk, dv, None, *(of_past or (None, None)), *[None] * 4


attention.register_autograd(_gradients, setup_context=_save_inputs)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``.
        key, value: ``[batch, num_kv_heads, past + seq, head_dim]``, the past (transformers' cache) first.
        attention_mask: None, or ``[batch, past + seq]`` that is true at tokens and false at padding.
        cu_seq_lens_q: bounds of packed sequences, where transformers packs them.

    Returns:
        ``[batch, seq, num_heads, head_dim]`` and None: attention weights are never materialised.
    """
    if dropout:
        raise ValueError(f"{ATTN_IMPLEMENTATION} has no attention dropout; found {dropout}, set attention_dropout=0")
    for name in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{ATTN_IMPLEMENTATION} has no {name}; found {kwargs[name]}, use another implementation")
    if not module.is_causal:
        if cu_seq_lens_q is None:
            cu_seq_lens_q = torch.tensor([0, query.shape[2]], dtype=torch.int32, device=query.device)
        return attention(query, key, value, cu_seq_lens_q, *[None] * 4, False, scaling), None
    past = key.shape[2] - query.shape[2]
    if attention_mask is None:
        return _causal(query, key, value, past, scaling), None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"{ATTN_IMPLEMENTATION} takes a padding mask [batch, length], found shape {tuple(attention_mask.shape)}"
        )
    # Each sequence runs alone over its own tokens, so padding on either side costs nothing and is never seen.
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for b, tokens in enumerate(attention_mask.bool()):
        keys, queries = tokens.nonzero()[:, 0], tokens[past:].nonzero()[:, 0]
        if not queries.numel():
            continue
        own_past = keys.numel() - queries.numel()
        own = query[b : b + 1, :, queries], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        output[b, queries] = _causal(*own, own_past, scaling)[0]
    return output, None


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, scaling: float) -> torch.Tensor:
    """Attention over ``past`` tokens and then the new ones, both in ``key`` and ``value``."""
    new = key[:, :, past:], value[:, :, past:]
    if not past:
        return attention(query, *new, *[None] * 5, True, scaling)
    length = torch.full(key.shape[:1], past, dtype=torch.int32, device=key.device)
    return attention(query, *new, None, key, value, length, None, True, scaling)


AttentionInterface.register(ATTN_IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, flash_attention_mask)
