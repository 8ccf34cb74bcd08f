"""The torch face of FlashAttention2: the op `pascalvl::flash_attention_2`, and Qwen3-VL's way to call it.

Importing this module makes ``attn_implementation="pascalvl"`` known to transformers: a drop-in for ordinary PyTorch use
(`from_pretrained(..., attn_implementation=ATTN_IMPLEMENTATION)`), and what export traces.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from pascalvl.export import torch_kernels
from pascalvl.export.tiled_attention import TiledAttention
from pascalvl.plugins.errors import UserError

ATTN_IMPLEMENTATION = "pascalvl"
PACKED_ATTN_IMPLEMENTATION = "pascalvl_flash"
"""The same function under a name with "flash" in it, for which transformers' vision encoder hands over ``cu_seqlens``
instead of splitting the pictures (which cannot be traced). Set it on the config of a model that is loaded: while one is
being loaded, transformers would look for kernels of that name on its hub."""


@torch.library.custom_op("pascalvl::flash_attention_2", mutates_args=())
def flash_attention_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_length: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> torch.Tensor:
    """Attention as `pascalvl.plugins.flash_attention` defines it.

    Tensors on CUDA go to the kernels, in float32; others to `pascalvl.export.tiled_attention`, in any float type.
    Differentiable once in q, k, v, past_key and past_value, on any device; memory is linear in the length both ways.

    Args:
        q: ``[batch, num_heads, seq, head_dim]``.
        k, v: ``[batch, num_kv_heads, seq, head_dim]``.
        cu_seqlens: int32 ``[segments + 1]``, bounds of the packed sequences; where not causal.
        past_key, past_value: ``[batch, num_kv_heads, capacity, head_dim]``, float32 or float16; where causal. None: no
            past.
        past_length: int32 ``[batch]``, valid rows of the past; where there is one.
        causal: which of the two modes.
        softmax_scale: factor on q k^T.

    Returns:
        ``[batch, seq, num_heads, head_dim]``, of ``q``'s type.

    Raises:
        ValueError: the kernels do not support the arguments, for example the head size; says which they do.
    """
    if not torch_kernels.serves(q.device):
        past = past_key, past_value, past_length
        return TiledAttention(q, k, v, cu_seqlens, *past, causal, softmax_scale).forward()
    kernels = torch_kernels.library(q.device)
    try:
        return torch_kernels.attention(
            kernels,
            q,
            k,
            v,
            causal=causal,
            softmax_scale=softmax_scale,
            cu_seqlens=cu_seqlens,
            past_key=past_key,
            past_value=past_value,
            past_length=past_length,
        )
    except UserError as error:
        raise ValueError(str(error)) from None


@flash_attention_2.register_fake
def _(q, k, v, cu_seqlens, past_key, past_value, past_length, causal, softmax_scale):
    batch, num_heads, seq, head_dim = q.shape
    return q.new_empty(batch, seq, num_heads, head_dim)


@torch.library.custom_op("pascalvl::flash_attention_2_backward", mutates_args=())
def _flash_attention_2_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    past_length: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v and, where there is a past, of past_key and past_value; ``grad`` is that of the output.

    An op of its own, because its loops depend on lengths: a compiler traces over them.
    """
    past = past_key, past_value, past_length
    return TiledAttention(q, k, v, cu_seqlens, *past, causal, softmax_scale).backward(grad)


@_flash_attention_2_backward.register_fake
def _(grad, q, k, v, cu_seqlens, past_key, past_value, past_length, causal, softmax_scale):
    return [torch.empty_like(x) for x in (q, k, v, past_key, past_value) if x is not None]


def _save_inputs(ctx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.causal, ctx.softmax_scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, *of_past = _flash_attention_2_backward(grad, *ctx.saved_tensors, ctx.causal, ctx.softmax_scale)
    return dq, dk, dv, None, *(of_past or (None, None)), None, None, None


flash_attention_2.register_autograd(_gradients, setup_context=_save_inputs)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    past_length: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``.
        key, value: ``[batch, num_kv_heads, past + seq, head_dim]``, the past (transformers' cache) first.
        attention_mask: None, or ``[batch, past + seq]`` that is true at tokens and false at padding.
        cu_seq_lens_q: bounds of packed sequences, where transformers packs them.
        past_key, past_value, past_length: an external cache, as `flash_attention_2` takes it; ``key`` and ``value`` are
            then those of the new tokens alone.

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
        return flash_attention_2(query, key, value, cu_seq_lens_q, None, None, None, False, scaling), None
    if past_length is not None:
        external = past_key, past_value, past_length
        return flash_attention_2(query, key, value, None, *external, True, scaling), None
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
        return flash_attention_2(query, *new, None, None, None, None, True, scaling)
    # The kernels read the past where it lies if it is contiguous, as all of it is, and a slice is not.
    length = torch.full(key.shape[:1], past, dtype=torch.int32, device=key.device)
    return flash_attention_2(query, *new, None, key, value, length, True, scaling)


for _name in (ATTN_IMPLEMENTATION, PACKED_ATTN_IMPLEMENTATION):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, flash_attention_mask)
