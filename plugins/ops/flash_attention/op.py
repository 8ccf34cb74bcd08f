"""The FlashAttention2 op: the identity that its torch op, its ONNX node, its TensorRT plugin and its kernels share.

From the packed result of a layer's q/k/v projection to what its output projection reads: queries and keys are normed
(RMS, over a head), rotated by their positions (RoPE: element ``i`` and the one half a head further on make a pair), and
attention is softmax(softmax_scale * q k^T + mask) v with float32 statistics (Dao, arXiv:2307.08691). Query head ``h``
reads kv head ``h // (num_heads / num_kv_heads)``.

Tokens of several sequences lie one behind the other, of which number ``b`` occupies ``cu_seqlens[b] <= t <
cu_seqlens[b + 1]`` (int32 ``[batch + 1]``). Two modes:

- ``causal = 0``: inputs ``qkv`` ``[tokens, 3 * num_heads * head_dim]``, ``rope_cos`` and ``rope_sin`` ``[tokens,
  head_dim]``, ``cu_seqlens``. A token sees its own sequence, both ways. There are no norms. Output: ``[tokens,
  num_heads * head_dim]``.
- ``causal = 1``: inputs ``qkv`` ``[tokens, num_heads * head_dim + num_kv_heads * (head_dim + value_dim)]``, ``q_norm``
  and ``k_norm`` ``[head_dim]``, ``rope_cos`` and ``rope_sin`` ``[tokens, head_dim]``, ``cu_seqlens``, ``past_length``,
  ``page_table``, ``past_visible``, ``past_key``, ``past_value``, and where the cache is quantised ``past_scale``.
  Outputs: the result, ``[tokens, num_heads * value_dim]``, then the new tokens' ``new_key``, ``new_value``
  ``[num_kv_heads, tokens, row]``, and where quantised ``new_scale`` ``[num_kv_heads, tokens]``.

  The past lies in a pool of pages, in ``kv_format``, ``[pages, num_kv_heads, PAGE_SLOTS, row]``
  (`pascalvl.plugins.kv_format` tells what a row is); ``past_scale`` is int32 ``[pages, num_kv_heads, PAGE_SLOTS]``, the
  key's scale, a half, in a word's lower half, the value's in its upper one. Slot ``s`` of sequence ``b`` is slot ``s %
  PAGE_SLOTS`` of page ``page_table[b, s // PAGE_SLOTS]`` (int32 ``[batch, sequence_pages]``); a page may be several
  sequences'. Of these slots it has the first ``past_length[b]`` (int32). ``past_visible`` (int32 ``[batch,
  sequence_pages * PAGE_SLOTS]``, or ``[batch, 1]``, numbers not below those of the new tokens, where all slots are
  seen) says which of a sequence's new tokens see a slot: number ``i`` does where ``i < past_visible``. New token ``i``
  sees the sequence's new tokens up to itself.

  Tokens from ``cu_seqlens[batch]`` on are padding: of them come numbers, which mean nothing. Where there are no more
  tokens than sequences, and one ``past_visible`` for all slots, the call is a decode step, in which no sequence has
  more than one.

  The new keys and values are in the cache's format, and attention reads them so, as it does the past: what comes out
  for a token does not depend on how a prompt is cut into calls. Where keys are quantised, queries meet them quantised
  to int8, one scale a row (its largest magnitude / 127), and if keys are rotated (by the Hadamard matrix), after the
  same rotation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pascalvl.plugins.kv_format import KVFormat, LayerLayout

OP_NAME = "FlashAttention2"
OP_VERSION = "3"
"""In TensorRT: what a node's attribute ``plugin_version`` asks for."""
OP_DOMAIN = "pascalvl"
SERIALISED_LAYOUT = 5
"""Of the attributes in a plan, for TensorRT's plugin: one more whenever it changes."""

ATTR_CAUSAL = "causal"
ATTR_SOFTMAX_SCALE = "softmax_scale"
ATTR_EPSILON = "epsilon"
"""What the norms add to mean squares; only where causal."""
ATTR_NUM_HEADS = "num_heads"
ATTR_NUM_KV_HEADS = "num_kv_heads"
ATTR_HEAD_DIM = "head_dim"
"""Of queries and keys."""
ATTR_VALUE_DIM = "value_dim"
ATTR_KV_FORMAT = "kv_format"
"""Name of a `pascalvl.plugins.kv_format.KVFormat`; only where causal."""


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """The op's attributes."""

    causal: bool
    softmax_scale: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    epsilon: float = 0.0
    kv_format: KVFormat = KVFormat.F32

    @property
    def flat(self) -> tuple[bool, float, int, int, int, int, float, str]:
        """As the torch op takes them."""
        return (*dataclasses.astuple(self)[:-1], self.kv_format.value)

    @classmethod
    def of(cls, *flat: Any) -> AttentionOptions:
        """From what the torch op takes."""
        fields = [*flat[:-1], KVFormat(flat[-1])]
        return cls(*fields)

    @property
    def layout(self) -> LayerLayout:
        """Of the cache."""
        return LayerLayout(self.kv_format, self.num_kv_heads, self.head_dim, self.value_dim)

    @property
    def widths(self) -> list[int]:
        """Of a token's queries, keys and values."""
        return [self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.value_dim]
