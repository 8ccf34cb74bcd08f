"""The torch face of FlashAttention2: the op `pascalvl::flash_attention_2`, which export traces.

`pascalvl.plugins.ops.flash_attention.drop_in` has attention for ordinary PyTorch use, over the same kernels.
"""

from __future__ import annotations

import torch

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions
from pascalvl.plugins.ops.flash_attention.tiled import TiledAttention


@torch.library.custom_op("pascalvl::flash_attention_2", mutates_args=())
def flash_attention_2(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_scale: torch.Tensor | None,
    past_length: torch.Tensor | None,
    past_visible: torch.Tensor | None,
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
        qkv to past_visible: the op's inputs, those that there are; past_key None: no past.
        causal to kv_format: `AttentionOptions.flat`.

    Raises:
        ValueError: the kernels do not support the arguments, for example the head size; says which they do. Or a cache
            in another format than f32, without them.
    """
    sizes = num_heads, num_kv_heads, head_dim, value_dim
    options = AttentionOptions.of(causal, softmax_scale, *sizes, epsilon, kv_format)
    if not torch_calls.serves(qkv.device):
        if options.kv_format is not KVFormat.F32:
            raise ValueError(f"a cache in {kv_format} is for the kernels, on CUDA; found tensors on {qkv.device}")
        masks = cu_seqlens, past_key, past_value, past_length, past_visible
        return _computed(options, qkv, q_norm, k_norm, rope_cos, rope_sin, *masks)
    past = None
    if past_key is not None:
        past = torch_calls.Past(past_key, past_value, past_scale, past_length, past_visible)
    try:
        kernels = torch_calls.library(qkv.device)
        return torch_calls.attention(kernels, options, qkv, q_norm, k_norm, rope_cos, rope_sin, cu_seqlens, past)
    except UserError as error:
        raise ValueError(str(error)) from None


@flash_attention_2.register_fake
def _(
    qkv, q_norm, k_norm, rope_cos, rope_sin, cu_seqlens, past_key, past_value, past_scale, past_length, past_visible,
    causal, softmax_scale, num_heads, num_kv_heads, head_dim, value_dim, epsilon, kv_format,
):  # fmt: skip
    outputs = [qkv.new_empty(*qkv.shape[:-1], num_heads * value_dim)]
    if causal:
        sizes = num_heads, num_kv_heads, head_dim, value_dim
        layout = AttentionOptions.of(causal, softmax_scale, *sizes, epsilon, kv_format).layout
        outputs += [rows for rows in torch_calls.new_rows(layout, *qkv.shape[:2], qkv.device) if rows is not None]
    return outputs


def _computed(
    options: AttentionOptions,
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    rope_cos: torch.Tensor,
    rope_sin: torch.Tensor,
    *masks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """The op by PyTorch; ``masks`` as `TiledAttention` has them, bounds and the past."""
    lead = qkv.shape[:-1]
    batched = qkv if options.causal else qkv[None]
    query, key, value = (
        part.unflatten(-1, (-1, dim)).transpose(1, 2)
        for part, dim in zip(
            batched.split(options.widths, -1), (options.head_dim, options.head_dim, options.value_dim), strict=True
        )
    )
    tables = [table.reshape(-1, 1, *batched.shape[1:2], options.head_dim) for table in (rope_cos, rope_sin)]
    query, key = (
        _rotated(x if norm is None else _normed(x, norm, options.epsilon), *tables)
        for x, norm in ((query, q_norm), (key, k_norm))
    )
    out = TiledAttention(query, key, value, *masks, options.causal, options.softmax_scale).forward()
    return [out.reshape(*lead, -1), *(x.contiguous() for x in (key, value) if options.causal)]


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
