"""The torch face of FlashAttention2: the op `pascalvl::flash_attention_2`, which export traces.

`pascalvl.plugins.ops.flash_attention.drop_in` has attention for ordinary PyTorch use, over the same kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, cast

import torch

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import PAGE_SLOTS, KVFormat, pages_of
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.tiled import TiledAttention


@torch.library.custom_op("pascalvl::flash_attention_2", mutates_args=())
def flash_attention_2(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    past_length: torch.Tensor | None,
    page_table: torch.Tensor | None,
    past_visible: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_scale: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    epsilon: float,
    kv_format: str,
) -> list[torch.Tensor]:
    """Attention as `pascalvl.plugins.ops.flash_attention.op` defines it, which tells shapes, types and results.

    Tensors on CUDA go to the kernels; others are computed by PyTorch, with a cache in float32.

    Args:
        qkv to past_scale: the op's inputs, those that there are; past_key None: no past.
        causal to kv_format: `AttentionOptions.flat`.

    Raises:
        ValueError: the kernels do not support the arguments, for example the head size; says which they do. Or a cache
            in another format than f32, without them.
    """
    sizes = num_heads, num_kv_heads, head_dim, value_dim
    options = AttentionOptions.of(causal, softmax_scale, *sizes, epsilon, kv_format)
    past = None
    if past_key is not None:
        past = torch_calls.Past(
            past_key,
            cast(torch.Tensor, past_value),
            past_scale,
            cast(torch.Tensor, page_table),
            cast(torch.Tensor, past_length),
            past_visible,
        )
    if not torch_calls.serves(qkv.device):
        if options.kv_format is not KVFormat.F32:
            raise ValueError(f"a cache in {kv_format} is for the kernels, on CUDA; found tensors on {qkv.device}")
        return _computed(options, qkv, q_norm, k_norm, rope_cos, rope_sin, cu_seqlens, past)
    try:
        kernels = torch_calls.library(qkv.device)
        return torch_calls.attention(kernels, options, qkv, cu_seqlens, q_norm, k_norm, rope_cos, rope_sin, past)
    except UserError as error:
        raise ValueError(str(error)) from None


@flash_attention_2.register_fake
def _(qkv: torch.Tensor, *others: Any) -> list[torch.Tensor]:
    options = AttentionOptions.of(*others[-len(dataclasses.fields(AttentionOptions)) :])
    tokens = qkv.shape[0]  # len() would be a number of this call, not one that varies
    outputs = [qkv.new_empty(tokens, options.num_heads * options.value_dim)]
    if options.causal:
        outputs += [rows for rows in torch_calls.new_rows(options.layout, tokens, qkv.device) if rows is not None]
    return outputs


def _computed(
    options: AttentionOptions,
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    cu_seqlens: torch.Tensor,
    past: torch_calls.Past | None,
) -> list[torch.Tensor]:
    """The op by PyTorch."""
    query, key, value = (
        part.unflatten(-1, (-1, dim)).transpose(0, 1)
        for part, dim in zip(
            qkv.split(options.widths, -1), (options.head_dim, options.head_dim, options.value_dim), strict=True
        )
    )
    query, key = (
        _rotated(x if norm is None else _normed(x, norm, options.epsilon), rope_cos, rope_sin)
        for x, norm in ((query, q_norm), (key, k_norm))
    )
    if not options.causal:
        own = query[None], key[None], value[None]
        tiled = TiledAttention(*own, cu_seqlens, None, None, None, None, False, options.softmax_scale)
        return [tiled.forward().reshape(len(qkv), -1)]
    out = _attended(options, query, key, value, cu_seqlens, past)
    return [out.flatten(1), key.contiguous(), value.contiguous()]


def _attended(
    options: AttentionOptions,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    past: torch_calls.Past | None,
) -> torch.Tensor:
    """Causal attention ``[tokens, num_heads, value_dim]`` of ``[heads, tokens, dim]``, sequence by sequence."""
    out = query.new_zeros(query.shape[1], len(query), options.value_dim)
    for number, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        if begin == end:
            continue
        past_key = past_value = past_length = past_visible = None
        if past is not None:
            past_length = past.length[number : number + 1]
            count = pages_of(int(past_length))
            pages = past.page_table[number, :count].long()
            # [pages, heads, slots, dim] of the sequence to [1, heads, slots, dim]
            past_key, past_value = (pool[pages].transpose(0, 1).flatten(1, 2)[None] for pool in (past.key, past.value))
            if past.visible is not None:
                past_visible = past.visible[number : number + 1, : count * PAGE_SLOTS]
        own = query[None, :, begin:end], key[None, :, begin:end], value[None, :, begin:end]
        operands = past_key, past_value, past_length, past_visible
        out[begin:end] = TiledAttention(*own, None, *operands, True, options.softmax_scale).forward()[0]
    return out


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
