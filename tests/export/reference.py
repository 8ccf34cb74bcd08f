"""Attention by its definition in float64, dense and differentiable, and random cases for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch


class _Case:
    @property
    def floats(self) -> dict[str, torch.Tensor]:
        """The floating inputs by name."""
        return {name: x for name, x in vars(self).items() if torch.is_tensor(x) and x.is_floating_point()}

    def expected(self) -> np.ndarray:
        """`output`, for NumPy."""
        return self.output().numpy()


Case = TypeVar("Case", bound=_Case)


@dataclasses.dataclass(frozen=True)
class CausalCase(_Case):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    past_length: torch.Tensor
    past_key: torch.Tensor
    past_value: torch.Tensor
    scale: float

    @property
    def arguments(self) -> tuple:
        """Those of the drop-in."""
        past = self.past_key, self.past_value, self.past_length
        return self.q, self.k, self.v, None, *past, None, True, self.scale

    def output(self) -> torch.Tensor:
        """``[batch, seq, heads, head_dim]``"""
        outputs = []
        for b, past in enumerate(self.past_length.tolist()):
            keys = torch.cat([self.past_key[b, :, :past].double(), self.k[b].double()], dim=1)
            values = torch.cat([self.past_value[b, :, :past].double(), self.v[b].double()], dim=1)
            seq = self.q.shape[2]
            visible = torch.ones(seq, past + seq, dtype=torch.bool).tril(past)
            outputs.append(attend(self.q[b], keys, values, visible, self.scale))
        return torch.stack(outputs)


@dataclasses.dataclass(frozen=True)
class PackedCase(_Case):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    scale: float

    @property
    def arguments(self) -> tuple:
        """Those of the drop-in."""
        return self.q, self.k, self.v, self.cu_seqlens, *[None] * 4, False, self.scale

    def output(self) -> torch.Tensor:
        """``[1, total, heads, head_dim]``"""
        segment = torch.searchsorted(self.cu_seqlens, torch.arange(self.q.shape[2]), right=True)
        return attend(self.q[0], self.k[0], self.v[0], segment[:, None] == segment, self.scale)[None]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention of ``[heads, seq, head_dim]`` over ``[kv_heads, length, head_dim]``, in float64."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, dim=0) for x in (k, v))
    scores = torch.einsum("hqd,hkd->hqk", q.double(), k) * scale
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,hkd->qhd", weights, v)


def converted(case: Case, dtype: torch.dtype) -> Case:
    """The case in another floating type."""
    return _mapped(case, lambda x: x.to(dtype, copy=True))


def sliced(case: Case, head_dim: int) -> Case:
    """The case with the first channels of every head."""
    return _mapped(case, lambda x: x[..., :head_dim].contiguous())


def _mapped(case: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return dataclasses.replace(case, **{name: change(x) for name, x in case.floats.items()})


def gradients(case: _Case, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the case's floating inputs by name, from the output's, by autograd in float64."""
    leaves = {name: x.detach().to(torch.float64, copy=True).requires_grad_() for name, x in case.floats.items()}
    output = dataclasses.replace(case, **leaves).output()
    return dict(zip(leaves, torch.autograd.grad(output, list(leaves.values()), grad.double()), strict=True))


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
