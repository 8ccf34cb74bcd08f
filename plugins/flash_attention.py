"""The FlashAttention2 op: the identity that its torch op, its ONNX node, its TensorRT plugin and its kernels share.

Attention(q, k, v) = softmax(softmax_scale * q k^T + mask) v with float32 statistics (Dao, arXiv:2307.08691).
``q``: ``[batch, num_heads, seq, head_dim]``; ``k``, ``v``: ``[batch, num_kv_heads, seq, head_dim]``, query head ``h``
reading kv head ``h // (num_heads / num_kv_heads)``; result: ``[batch, seq, num_heads, head_dim]``. Two modes:

- ``causal = 0``: inputs ``q, k, v, cu_seqlens``. Batch 1, ``seq`` packs several sequences of which number ``i``
  occupies ``cu_seqlens[i] <= t < cu_seqlens[i + 1]`` (int32); a token sees its own sequence, both ways.
- ``causal = 1``: inputs ``q, k, v, past_length, past_key, past_value``. The past lies in the cache, in ``kv_format``,
  ``[batch, num_kv_heads, capacity, row]``; sequence ``b`` has ``past_length[b]`` (int32) of it. New token ``i`` sees
  all of the past and the new tokens up to itself.
"""

from __future__ import annotations

OP_NAME = "FlashAttention2"
OP_VERSION = "1"
OP_DOMAIN = "pascalvl"

ATTR_CAUSAL = "causal"
ATTR_SOFTMAX_SCALE = "softmax_scale"
ATTR_KV_FORMAT = "kv_format"
"""Name of a `KVFormat`; only where causal."""
