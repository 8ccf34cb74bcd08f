"""FlashAttention-2 in PyTorch: any device, head size and float type, in memory linear in the length.

Dao, arXiv:2307.08691, section 3.1: a tile of queries meets its keys tile by tile with an online softmax; the backward
computes statistics and weights anew, so that only the inputs are kept. Statistics and sums are float32, or float64 for
float64 queries.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch

QUERY_TILE = 128
KEY_TILE = 256
"""Large enough that the time goes into matrix products, small enough that a head's tile of scores stays in cache."""


class _KeyTile(NamedTuple):
    """Keys that a tile of queries sees."""

    in_past: bool
    slots: slice
    diagonal: int | None
    """Query ``i`` of the tile sees keys up to ``i + diagonal`` of this one; None: all."""


@dataclasses.dataclass(frozen=True)
class TiledAttention:
    """One call of the op `torch_op.flash_attention_2`, which tells shapes and meanings."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor | None
    past_key: torch.Tensor | None
    past_value: torch.Tensor | None
    past_length: torch.Tensor | None
    past_visible: torch.Tensor | None
    causal: bool
    softmax_scale: float

    def __post_init__(self) -> None:
        if not self.q.shape[2] == self.k.shape[2] == self.v.shape[2]:
            q, k, v = (list(x.shape) for x in (self.q, self.k, self.v))
            raise ValueError(f"k and v have q's tokens; found q {q}, k {k}, v {v}")

    def forward(self) -> torch.Tensor:
        """``[batch, seq, num_heads, head_dim]``, of ``q``'s type."""
        batch, num_heads, seq, _ = self.q.shape
        out = self.q.new_empty(batch, seq, num_heads, self.v.shape[3])
        for b, rows, tiles in self._plan():
            attended, _ = self._attend(b, rows, self._queries(b, rows), tiles)
            out[b, rows] = self._unfolded(attended, rows).transpose(0, 1)
        return out

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """Gradients of q, k, v and, where there is a past, past_key and past_value, from that of `forward`'s output."""
        inputs = [x for x in (self.q, self.k, self.v, self.past_key, self.past_value) if x is not None]
        gradients = [torch.zeros_like(x, dtype=self._dtype) for x in inputs]
        dq, *of_keys = gradients
        for b, rows, tiles in self._plan():
            queries = self._queries(b, rows)
            out, log_sum_exp = self._attend(b, rows, queries, tiles)
            d_out = self._folded(grad[b, rows].transpose(0, 1))
            delta = (d_out * out).sum(-1, keepdim=True)
            d_queries = torch.zeros_like(queries)
            for tile in tiles:
                keys, values = self._keys(b, tile)
                dk, dv = (x[b, :, tile.slots] for x in (of_keys[2:] if tile.in_past else of_keys[:2]))
                weights = self._scores(b, rows, queries, keys, tile).sub_(log_sum_exp).exp_()
                dv += weights.mT @ d_out
                d_scores = (d_out @ values.mT).sub_(delta).mul_(weights)
                d_queries += d_scores @ keys
                dk += d_scores.mT @ queries
            dq[b, :, rows] = self._unfolded(d_queries * self.softmax_scale, rows)
        return [gradient.to(x.dtype) for gradient, x in zip(gradients, inputs, strict=True)]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)

    def _plan(self) -> Iterator[tuple[int, slice, list[_KeyTile]]]:
        """For each tile of queries: which of the batch it is in, its rows, and the keys it sees."""
        batch, _, seq, _ = self.q.shape
        if not self.causal:
            bounds = cast(torch.Tensor, self.cu_seqlens).tolist()
            if batch != 1 or bounds != sorted(bounds) or (bounds[0], bounds[-1]) != (0, seq):
                raise ValueError(f"packed attention: batch 1, cu_seqlens from 0 to {seq}; found {batch}, {bounds}")
            spans = [(0, start, stop, 0) for start, stop in itertools.pairwise(bounds)]
        else:
            past_lengths = [0] * batch if self.past_length is None else self.past_length.tolist()
            spans = [(b, 0, seq, past) for b, past in enumerate(past_lengths)]
        for b, start, stop, past in spans:
            seen = [_KeyTile(True, slots, None) for slots in _cut(0, past, KEY_TILE)]
            for rows in _cut(start, stop, QUERY_TILE):
                new = _cut(start, rows.stop if self.causal else stop, KEY_TILE)
                # First the new ones, of which every query sees one: its maximum is a number from then on.
                yield b, rows, [_KeyTile(False, s, rows.start - s.start if self.causal else None) for s in new] + seen

    def _attend(
        self, b: int, rows: slice, queries: torch.Tensor, tiles: list[_KeyTile]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[num_kv_heads, rows, head_dim]`` and log-sum-exp ``[num_kv_heads, rows, 1]`` of folded queries."""
        most = queries.new_full((*queries.shape[:2], 1), -torch.inf)
        total = torch.zeros_like(most)
        out = queries.new_zeros(*queries.shape[:2], self.v.shape[3])
        for tile in tiles:
            keys, values = self._keys(b, tile)
            scores = self._scores(b, rows, queries, keys, tile)
            before, most = most, torch.maximum(most, scores.amax(-1, keepdim=True))
            weights, shrink = scores.sub_(most).exp_(), before.sub_(most).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            out = out.mul_(shrink).add_(weights @ values)
        return out / total, total.log_().add_(most)

    def _scores(self, b: int, rows: slice, queries: torch.Tensor, keys: torch.Tensor, tile: _KeyTile) -> torch.Tensor:
        """``[num_kv_heads, rows, keys]`` of folded queries."""
        scores = queries @ keys.mT
        hidden = None
        if tile.in_past and self.past_visible is not None:
            numbers = torch.arange(rows.start, rows.stop, device=scores.device)
            capacity = cast(torch.Tensor, self.past_key).shape[2]
            hidden = self.past_visible[b].expand(capacity)[tile.slots] <= numbers[:, None]
        elif tile.diagonal is not None and tile.diagonal < keys.shape[1] - 1:
            shape = rows.stop - rows.start, keys.shape[1]
            hidden = torch.ones(shape, dtype=torch.bool, device=scores.device).triu(tile.diagonal + 1)
        if hidden is not None:
            scores.unflatten(1, (self.q.shape[1] // self.k.shape[1], -1)).masked_fill_(hidden, -torch.inf)
        return scores

    def _queries(self, b: int, rows: slice) -> torch.Tensor:
        return self._folded(self.q[b, :, rows]) * self.softmax_scale

    def _keys(self, b: int, tile: _KeyTile) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self.k, self.v
        if tile.in_past:
            k, v = cast(torch.Tensor, self.past_key), cast(torch.Tensor, self.past_value)
        return k[b, :, tile.slots].to(self._dtype), v[b, :, tile.slots].to(self._dtype)

    def _folded(self, heads: torch.Tensor) -> torch.Tensor:
        """``[num_heads, rows, dim]`` to ``[num_kv_heads, group * rows, dim]``: a kv head's queries side by side."""
        return heads.to(self._dtype).unflatten(0, (self.k.shape[1], -1)).flatten(1, 2)

    def _unfolded(self, folded: torch.Tensor, rows: slice) -> torch.Tensor:
        """`_folded`'s inverse."""
        return folded.unflatten(1, (-1, rows.stop - rows.start)).flatten(0, 1)


def _cut(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
