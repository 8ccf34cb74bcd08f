// kv_append: new keys and values of all layers into their pools, in one launch. They are in the pools' formats: a copy.
//
// A warp takes one token's key and value of one head, 16 bytes a lane. Bound by latency for a token, by DRAM for many.
#include "plugins/kernels/kernels.h"
#include "plugins/kernels/sequences.cuh"

namespace pascalvl {

// Grid: (rows of a layer / kRowWarps, layers).
extern "C" __global__ void __launch_bounds__(kRowThreads) kv_append(const AppendParams p) {
  const int index = blockIdx.x * kRowWarps + threadIdx.x / kWarp;  // over [num_kv_heads, tokens]
  if (index >= p.num_kv_heads * p.tokens) return;
  const int token = index % p.tokens, head = index / p.tokens, lane = threadIdx.x % kWarp;
  const unsigned slot = p.slots[token];  // what is negative is too large
  if (slot / kPageSlots >= unsigned(p.num_pages)) return;
  const AppendLayer& layer = p.layers[blockIdx.y];
  const long long row = page_row(slot / kPageSlots, p.num_kv_heads, head) + slot % kPageSlots;
  auto copy = [&](const unsigned char* from, unsigned char* to, int bytes) {
    for (int at = 16 * lane; at < bytes; at += 16 * kWarp) {
      *reinterpret_cast<uint4*>(to + row * bytes + at) =
          *reinterpret_cast<const uint4*>(from + (long long)index * bytes + at);
    }
  };
  copy(layer.new_key, layer.to.key, layer.key_row);
  copy(layer.new_value, layer.to.value, layer.value_row);
  if (layer.new_scale && lane == 0) layer.to.scale[row] = layer.new_scale[index];
}

}  // namespace pascalvl
