"""Times of a KV cache on a GPU, of all layers together: storing a token, and attention over a full cache in decode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from pascalvl.plugins.bench.timing import COLD_BYTES, seconds
from pascalvl.plugins.kernels import torch_calls
from pascalvl.plugins.kv_format import PAGE_SLOTS, LayerLayout, pages_of
from pascalvl.plugins.ops.flash_attention.op import AttentionOptions

LENGTH = 32_768
"""Tokens in the cache when it is read."""
_APPENDS = 16
"""Tokens stored one after the other, in a page."""


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
    pools = [_pool(layout, 1) for layout in layouts]
    new = [_filled(torch_calls.new_rows(layout, 1, torch.device("cuda"))) for layout in layouts]
    slots = [torch.tensor([slot], dtype=torch.int32, device="cuda") for slot in range(_APPENDS)]
    calls = [lambda slot=slot: torch_calls.kv_append(kernels, layouts, new, pools, slot) for slot in slots]
    return 1e6 * seconds(calls)


def _decode(kernels: torch_calls.KernelLibrary, layout: LayerLayout, num_heads: int, length: int) -> float:
    size, pages = length * layout.bytes_per_token, pages_of(length)
    pools = [_pool(layout, pages) for _ in range(2 + COLD_BYTES // size)]
    options = AttentionOptions(
        True, layout.head_dim**-0.5, num_heads, layout.num_kv_heads, *layout.dims, kv_format=layout.kv_format
    )
    qkv = torch.randn(1, sum(options.widths), device="cuda")
    bounds, past_length = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 1], [length]))
    page_table = torch.randperm(pages, dtype=torch.int32, device="cuda")[None]
    pasts = [torch_calls.Past(*pool, page_table, past_length) for pool in pools]
    calls = [lambda past=past: torch_calls.attention(kernels, options, qkv, bounds, past=past) for past in pasts]
    return 1e6 * seconds(calls)


def _pool(layout: LayerLayout, pages: int) -> torch_calls.Cached:
    """A layer's pool."""
    rows = torch_calls.new_rows(layout, pages * PAGE_SLOTS, torch.device("cuda"))
    lead = pages, layout.num_kv_heads, PAGE_SLOTS
    key, value, scale = _filled(rows)
    return (
        key.view(*lead, *key.shape[2:]),
        value.view(*lead, *value.shape[2:]),
        None if scale is None else scale.view(lead),
    )


def _filled(rows: torch_calls.Cached) -> torch_calls.Cached:
    """Rows with small codes or numbers of all kinds in them."""
    for array in rows:
        if array is not None:
            array.view(torch.uint8).random_(0, 60)  # of scales, halves of up to 1
    return rows
