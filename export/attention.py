"""The torch face of FlashAttention2: the op `pascalvl::flash_attention_2`, and Qwen3-VL's way to call it.

Importing this module makes ``attn_implementation="pascalvl"`` known to transformers: a drop-in for ordinary PyTorch use
(`from_pretrained(..., attn_implementation=ATTN_IMPLEMENTATION)`), and what export traces.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

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

    Args:
        q: ``[batch, num_heads, seq, head_dim]``.
        k, v: ``[batch, num_kv_heads, seq, head_dim]``.
        cu_seqlens: int32 ``[segments + 1]``, bounds of the packed sequences; where not causal.
        past_key, past_value: ``[batch, num_kv_heads, capacity, head_dim]``, float32 or float16; where causal.
        past_length: int32 ``[batch]``, valid rows of the past; where causal.
        causal: which of the two modes.
        softmax_scale: factor on q k^T.

    Returns:
        ``[batch, seq, num_heads, head_dim]``, of ``q``'s type.
    """
    if causal:
        sequences = [
            _attend_causal(q[b], k[b], v[b], past_key[b, :, :past], past_value[b, :, :past], softmax_scale)
            for b, past in enumerate(past_length.tolist())
        ]
        return torch.stack(sequences).transpose(1, 2).contiguous()
    lengths = cu_seqlens.diff().tolist()
    segments = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    attended = [scaled_dot_product_attention(*segment, scale=softmax_scale) for segment in segments]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def _attend_causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past_k: torch.Tensor, past_v: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of one sequence's new tokens (``[heads, seq, head_dim]``) over its past and themselves."""
    seq, past = q.shape[1], past_k.shape[1]
    visible = torch.ones(seq, past + seq, dtype=torch.bool, device=q.device).tril(past)
    return scaled_dot_product_attention(
        q[None],
        torch.cat([past_k.to(k.dtype), k], dim=1)[None],
        torch.cat([past_v.to(v.dtype), v], dim=1)[None],
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
    )[0]


@flash_attention_2.register_fake
def _(q, k, v, cu_seqlens, past_key, past_value, past_length, causal, softmax_scale):
    batch, num_heads, seq, head_dim = q.shape
    return q.new_empty(batch, seq, num_heads, head_dim)


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
        length = torch.full((query.shape[0],), past, dtype=torch.int32, device=query.device)
        return _causal(query, key, value, past, length, scaling), None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"{ATTN_IMPLEMENTATION} takes a padding mask [batch, length], found shape {tuple(attention_mask.shape)}"
        )
    # Each sequence runs alone over its own tokens, so padding on either side costs nothing and is never seen.
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for b, tokens in enumerate(attention_mask.bool()):
        keys, queries = tokens.nonzero()[:, 0], tokens[past:].nonzero()[:, 0]
        own_past = keys.numel() - queries.numel()
        length = torch.full((1,), own_past, dtype=torch.int32, device=query.device)
        own = query[b : b + 1, :, queries], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        output[b, queries] = _causal(*own, own_past, length, scaling)[0]
    return output, None


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, length: torch.Tensor, scaling: float
) -> torch.Tensor:
    return flash_attention_2(
        query, key[:, :, past:], value[:, :, past:], None, key[:, :, :past], value[:, :, :past], length, True, scaling
    )


for _name in (ATTN_IMPLEMENTATION, PACKED_ATTN_IMPLEMENTATION):
    AttentionInterface.register(_name, attention_forward)
    AttentionMaskInterface.register(_name, flash_attention_mask)
