"""The torch face of FlashAttention2: the op `pascalvl::flash_attention_2`, and Qwen3-VL's way to call it.

Importing this module makes ``attn_implementation="pascalvl"`` known to transformers: a drop-in for ordinary PyTorch use
(`from_pretrained(..., attn_implementation=ATTN_IMPLEMENTATION)`), and what export traces.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from pascalvl.plugins.errors import UserError
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import KVFormat
from pascalvl.plugins.ops.flash_attention.tiled import TiledAttention

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
    past_visible: torch.Tensor | None,
    past_scale: torch.Tensor | None,
    recent_key: torch.Tensor | None,
    recent_value: torch.Tensor | None,
    recent_length: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    kv_format: str,
) -> torch.Tensor:
    """Attention as `pascalvl.plugins.ops.flash_attention.op` defines it.

    Tensors on CUDA go to the kernels, in float32; others to `TiledAttention`, in any float type, with a cache of
    floats. Differentiable once in q, k, v, past_key and past_value where those are floats, on any device; memory is
    linear in the length both ways.

    Args:
        q: ``[batch, num_heads, seq, key_dim]``.
        k: ``[batch, num_kv_heads, seq, key_dim]``.
        v: ``[batch, num_kv_heads, seq, value_dim]``.
        cu_seqlens: int32 ``[segments + 1]``, bounds of the packed sequences; where not causal.
        past_key, past_value: ``[batch, num_kv_heads, capacity, row]``; where causal. None: no past. In float16 either
            int32 words or, in ordinary PyTorch use, float16 tensors ``[..., dim]``.
        past_length: int32 ``[batch]``, valid rows of the past; where there is one.
        past_visible: int32 ``[batch, capacity]`` or ``[batch, 1]``; None: every new token sees all of the past.
        past_scale: int32 ``[2, batch, num_kv_heads, capacity / 2]``, words of halves; where the past is quantised.
        recent_key, recent_value: int32 ``[batch, num_kv_heads, recent, dim / 2]``, likewise, and their int32
            ``[batch]`` recent_length; None: none are kept.
        causal: which of the two modes.
        softmax_scale: factor on q k^T.
        kv_format: name of the past's `pascalvl.plugins.kv_format.KVFormat`.

    Returns:
        ``[batch, seq, num_heads, value_dim]``, of ``q``'s type.

    Raises:
        ValueError: the kernels do not support the arguments, for example the head size; says which they do. Or a
            quantised past, without them.
    """
    if not torch_calls.serves(q.device):
        if past_scale is not None or recent_key is not None:
            raise ValueError(f"a cache in {kv_format} is for the kernels, on CUDA; found tensors on {q.device}")
        if past_key is not None and past_key.dtype == torch.int32:
            past_key, past_value = past_key.view(torch.float16), past_value.view(torch.float16)
        past = past_key, past_value, past_length, past_visible
        return TiledAttention(q, k, v, cu_seqlens, *past, causal, softmax_scale).forward()
    kernels = torch_calls.library(q.device)
    try:
        return torch_calls.attention(
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
            past_visible=past_visible,
            past_scale=past_scale,
            recent_key=recent_key,
            recent_value=recent_value,
            recent_length=recent_length,
            kv_format=KVFormat(kv_format),
        )
    except UserError as error:
        raise ValueError(str(error)) from None


@flash_attention_2.register_fake
def _(q, k, v, *_):
    batch, num_heads, seq, _ = q.shape
    return q.new_empty(batch, seq, num_heads, v.shape[3])


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
    past_visible: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
) -> list[torch.Tensor]:
    """Gradients of q, k, v and, where there is a past, of past_key and past_value; ``grad`` is that of the output.

    An op of its own, because its loops depend on lengths: a compiler traces over them.
    """
    past = past_key, past_value, past_length, past_visible
    return TiledAttention(q, k, v, cu_seqlens, *past, causal, softmax_scale).backward(grad)


@_flash_attention_2_backward.register_fake
def _(grad, q, k, v, cu_seqlens, past_key, past_value, *_):
    return [torch.empty_like(x) for x in (q, k, v, past_key, past_value) if x is not None]


def _save_inputs(ctx, inputs: tuple, output: torch.Tensor) -> None:
    *tensors, ctx.causal, ctx.softmax_scale, ctx.kv_format = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, _, _, _, _ = ctx.saved_tensors
    past_key = tensors[4]
    if past_key is not None and not past_key.is_floating_point():
        raise ValueError(f"a cache in words ({ctx.kv_format}) has no gradients: give float32 or float16 tensors")
    dq, dk, dv, *of_past = _flash_attention_2_backward(grad, *tensors, ctx.causal, ctx.softmax_scale)
    return dq, dk, dv, None, *(of_past or (None, None)), *[None] * 9


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
    past_visible: torch.Tensor | None = None,
    past_scale: torch.Tensor | None = None,
    recent_key: torch.Tensor | None = None,
    recent_value: torch.Tensor | None = None,
    recent_length: torch.Tensor | None = None,
    kv_format: str = KVFormat.F32.value,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention function of transformers' interface.

    Args:
        query: ``[batch, num_heads, seq, head_dim]``.
        key, value: ``[batch, num_kv_heads, past + seq, head_dim]``, the past (transformers' cache) first.
        attention_mask: None, or ``[batch, past + seq]`` that is true at tokens and false at padding.
        cu_seq_lens_q: bounds of packed sequences, where transformers packs them.
        past_key to kv_format: an external cache, as `flash_attention_2` takes it; ``key`` and ``value`` are then those
            of the new tokens alone.

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
        return flash_attention_2(query, key, value, cu_seq_lens_q, *[None] * 8, False, scaling, kv_format), None
    if past_length is not None:
        external = past_key, past_value, past_length, past_visible, past_scale, recent_key, recent_value, recent_length
        return flash_attention_2(query, key, value, None, *external, True, scaling, kv_format), None
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
    kv_format = (KVFormat.F16 if key.dtype == torch.float16 else KVFormat.F32).value
    if not past:
        return flash_attention_2(query, *new, None, *[None] * 8, True, scaling, kv_format)
    # The kernels read the past where it lies if it is contiguous, as all of it is, and a slice is not.
    length = torch.full(key.shape[:1], past, dtype=torch.int32, device=key.device)
    return flash_attention_2(query, *new, None, key, value, length, *[None] * 5, True, scaling, kv_format)


for _name in (ATTN_IMPLEMENTATION, PACKED_ATTN_IMPLEMENTATION):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, flash_attention_mask)
