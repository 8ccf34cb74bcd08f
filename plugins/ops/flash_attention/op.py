"""The FlashAttention2 op: the identity that its torch op, its ONNX node, its TensorRT plugin and its kernels share.

Attention(q, k, v) = softmax(softmax_scale * q k^T + mask) v with float32 statistics (Dao, arXiv:2307.08691).
``q``: ``[batch, num_heads, seq, head_dim]``; ``k``, ``v``: ``[batch, num_kv_heads, seq, head_dim]``, query head ``h``
reading kv head ``h // (num_heads / num_kv_heads)``; result: ``[batch, seq, num_heads, head_dim]``. Two modes:

- ``causal = 0``: inputs ``q, k, v, cu_seqlens``. Batch 1, ``seq`` packs several sequences of which number ``i``
  occupies ``cu_seqlens[i] <= t < cu_seqlens[i + 1]`` (int32); a token sees its own sequence, both ways.
- ``causal = 1``: inputs ``q, k, v, past_length, past_visible, past_key, past_value``, then ``past_scale`` where the
  cache is quantised, then, if it keeps recent tokens besides, ``recent_length, recent_key, recent_value``. The head
  sizes of keys (and q) and of values may differ. The past lies in the cache, in ``kv_format``, ``[batch, num_kv_heads,
  capacity, row]`` (`pascalvl.plugins.kv_format` tells what a row is); sequence ``b`` has the first ``past_length[b]``
  (int32) slots of it, and the first ``recent_length[b]`` of ``recent_key`` and ``recent_value``, which are halves
  ``[batch, num_kv_heads, recent, dim]``, as ``past_scale`` is ``[2, batch, num_kv_heads, capacity]``: halves travel as
  int32 words, so that the last of these dimensions, which is even, is half as long. ``past_visible`` (int32 ``[batch,
  capacity]``, or ``[batch, 1]`` for all slots alike) says which new tokens see a slot: number ``i`` does where ``i <
  past_visible``. New token ``i`` sees all recent tokens, and the new tokens up to itself. Several new tokens come with
  ``recent_length`` 0.
  Where keys are quantised, queries meet them quantised to int8, one scale a row (its largest magnitude / 127), and if
  they are rotated, after the same rotation.
"""

from __future__ import annotations

OP_NAME = "FlashAttention2"
OP_VERSION = "1"
"""What TensorRT's parser asks for of a node that has no ``plugin_version``."""
OP_DOMAIN = "pascalvl"

ATTR_CAUSAL = "causal"
ATTR_SOFTMAX_SCALE = "softmax_scale"
ATTR_KV_FORMAT = "kv_format"
"""Name of a `pascalvl.plugins.kv_format.KVFormat`; only where causal."""
ATTR_RECENT = "recent"
"""Capacity of the recent tokens' cache; none: there is no such cache."""
