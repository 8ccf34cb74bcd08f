"""Times of a KV cache on a GPU, of all layers together: storing a token, and attention over a full cache in decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pascalvl.plugins.bench.timing import COLD_BYTES, seconds
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import LayerLayout

LENGTH = 32_768
"""Tokens in the cache when it is read."""
_APPENDS = 16
"""Tokens stored one after the other, in a cache that has room for them alone."""

_Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def measure(layouts: Sequence[LayerLayout], num_heads: int, length: int = LENGTH) -> tuple[float, float]:
    """Microseconds, on the current CUDA device, of a token with ``num_heads`` query heads.

    Returns:
        Of storing its keys and values in all layers; and of attention in all layers, over ``length`` tokens that no
        cache of the GPU holds.
    """
    device = torch.device("cuda")
    kernels = torch_calls.library(device)
    torch.zeros(1, device=device)
    kernels.load()
    append = decode = 0.0
    for layout, count in Counter(layouts).items():
        append += _append(kernels, layout, count)
        decode += count * _decode(kernels, layout, num_heads, length)
    return append, decode


def _append(kernels: torch_calls.KernelLibrary, layout: LayerLayout, layers: int) -> float:
    caches = _caches(layout, layers, _APPENDS)
    new = [torch.randn(layers, 1, layout.num_kv_heads, 1, dim, device="cuda") for dim in layout.dims]
    slots = [torch.tensor([[slot]], dtype=torch.int32, device="cuda") for slot in range(_APPENDS)]
    calls = [lambda slot=slot: torch_calls.append_run(kernels, layout, *new, caches, slot) for slot in slots]
    return 1e6 * seconds(calls)


def _decode(kernels: torch_calls.KernelLibrary, layout: LayerLayout, num_heads: int, length: int) -> float:
    size = length * layout.bytes_per_token
    caches = _caches(layout, 2 + COLD_BYTES // size, length)
    q = torch.randn(1, num_heads, 1, layout.key_dim, device="cuda")
    k, v = (torch.randn(1, layout.num_kv_heads, 1, dim, device="cuda") for dim in layout.dims)
    past_length = torch.tensor([length], dtype=torch.int32, device="cuda")

    def attention(key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return torch_calls.attention(
            kernels,
            q,
            k,
            v,
            causal=True,
            softmax_scale=layout.key_dim**-0.5,
            past_key=key,
            past_value=value,
            past_length=past_length,
            past_scale=scale,
            kv_format=layout.kv_format,
        )

    return 1e6 * seconds([lambda cache=cache: attention(*cache) for cache in caches])


def _caches(layout: LayerLayout, layers: int, capacity: int) -> list[_Tensors]:
    """Caches of some layers, filled with small codes or numbers of all kinds."""
    shape = layers, 1, layout.num_kv_heads, capacity
    rows = [
        torch.randint(0, 60, (*shape, size), dtype=torch.uint8, device="cuda").view(getattr(torch, row.dtype.name))
        for row, size in zip(layout.kv_format.rows, layout.row_bytes, strict=True)
    ]
    scales = torch.full((layers, 2, *shape[1:]), 0.01, dtype=torch.float16, device="cuda").view(torch.int32)
    quantised = layout.kv_format.is_quantised
    return [(key, value, scale if quantised else None) for key, value, scale in zip(*rows, scales, strict=True)]
