"""Times of a KV cache on a GPU, of all layers together: storing a token, and attention over a full cache in decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pascalvl.plugins.bench.timing import COLD_BYTES, seconds
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import LayerLayout
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions

LENGTH = 32_768
"""Tokens in the cache when it is read."""
_APPENDS = 16
"""Tokens stored one after the other, in a cache that has room for them alone."""


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
    decode = sum(count * _decode(kernels, layout, num_heads, length) for layout, count in Counter(layouts).items())
    return _append(kernels, layouts), decode


def _append(kernels: torch_calls.KernelLibrary, layouts: Sequence[LayerLayout]) -> float:
    caches, new = ([_rows(layout, capacity) for layout in layouts] for capacity in (_APPENDS, 1))
    slots = [torch.tensor([[slot]], dtype=torch.int32, device="cuda") for slot in range(_APPENDS)]
    calls = [lambda slot=slot: torch_calls.kv_append(kernels, layouts, new, caches, slot) for slot in slots]
    return 1e6 * seconds(calls)


def _decode(kernels: torch_calls.KernelLibrary, layout: LayerLayout, num_heads: int, length: int) -> float:
    size = length * layout.bytes_per_token
    caches = [_rows(layout, length) for _ in range(2 + COLD_BYTES // size)]
    options = AttentionOptions(
        True, layout.head_dim**-0.5, num_heads, layout.num_kv_heads, *layout.dims, kv_format=layout.kv_format
    )
    qkv = torch.randn(1, 1, sum(options.widths), device="cuda")
    past_length = torch.tensor([length], dtype=torch.int32, device="cuda")
    pasts = [torch_calls.Past(*cache, past_length) for cache in caches]
    return 1e6 * seconds([lambda past=past: torch_calls.attention(kernels, options, qkv, past=past) for past in pasts])


def _rows(layout: LayerLayout, capacity: int) -> torch_calls.Cached:
    """Rows of a layer, filled with small codes or numbers of all kinds."""
    rows = torch_calls.new_rows(layout, 1, capacity, torch.device("cuda"))
    for array in rows:
        if array is not None:
            array.view(torch.uint8).random_(0, 60)  # of scales, halves of up to 1
    return rows
