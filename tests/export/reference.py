"""Attention by its definition in float64 NumPy, and random cases for it."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class CausalCase:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    past_length: torch.Tensor
    past_key: torch.Tensor
    past_value: torch.Tensor
    scale: float

    def expected(self) -> np.ndarray:
        """``[batch, seq, heads, head_dim]``"""
        outputs = []
        for b, past in enumerate(self.past_length.tolist()):
            keys = torch.cat([self.past_key[b, :, :past].float(), self.k[b]], dim=1)
            values = torch.cat([self.past_value[b, :, :past].float(), self.v[b]], dim=1)
            seq = self.q.shape[2]
            visible = np.tril(np.ones((seq, past + seq), dtype=bool), past)
            outputs.append(attend(self.q[b], keys, values, visible, self.scale))
        return np.stack(outputs)


@dataclasses.dataclass(frozen=True)
class PackedCase:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    scale: float

    def expected(self) -> np.ndarray:
        """``[1, total, heads, head_dim]``"""
        segment = np.searchsorted(self.cu_seqlens.numpy(), np.arange(self.q.shape[2]), side="right")
        visible = segment[:, None] == segment[None, :]
        return attend(self.q[0], self.k[0], self.v[0], visible, self.scale)[None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: np.ndarray, scale: float) -> np.ndarray:
    """Softmax attention of ``[heads, seq, head_dim]`` over ``[kv_heads, length, head_dim]``, in float64."""
    q, k, v = (x.double().numpy() for x in (q, k, v))
    group = q.shape[0] // k.shape[0]
    scores = np.einsum("hqd,hkd->hqk", q, np.repeat(k, group, axis=0)) * scale
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,hkd->qhd", weights, np.repeat(v, group, axis=0))


def causal_case(
    heads: int,
    kv_heads: int,
    seq: int,
    past_length: list[int],
    capacity: int,
    past_dtype: torch.dtype = torch.float32,
    head_dim: int = 32,
) -> CausalCase:
    """Random tensors; cache rows beyond each sequence's length hold values that would show if they were read."""
    generator = torch.Generator().manual_seed(heads * 100 + seq)
    batch = len(past_length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    past = [draw(batch, kv_heads, capacity, head_dim) for _ in range(2)]
    for b, length in enumerate(past_length):
        for rows in past:
            rows[b, :, length:] = 1e4
    return CausalCase(
        draw(batch, heads, seq, head_dim),
        draw(batch, kv_heads, seq, head_dim),
        draw(batch, kv_heads, seq, head_dim),
        torch.tensor(past_length, dtype=torch.int32),
        *(rows.to(past_dtype) for rows in past),
        scale=head_dim**-0.5,
    )


def packed_case(cu_seqlens: list[int], heads: int = 3, head_dim: int = 32) -> PackedCase:
    generator = torch.Generator().manual_seed(len(cu_seqlens))
    q, k, v = (torch.randn(1, heads, cu_seqlens[-1], head_dim, generator=generator) for _ in range(3))
    return PackedCase(q, k, v, torch.tensor(cu_seqlens, dtype=torch.int32), head_dim**-0.5)
