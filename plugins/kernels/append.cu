// kv_append: new keys and values of all layers into their caches, in one launch; and queries to int8 for prefill.
//
// A warp takes one row (one token's key or value of one head): four elements a lane, so rotation, largest magnitude and
// packing need shuffles alone. Bound by DRAM: rows are read once and written once. Rows shorter than 128 leave lanes
// idle.
#include "plugins/kernels/device.cuh"

namespace pascalvl {

__device__ __forceinline__ void store_row(float4 x, int dim, int format, unsigned char* row, unsigned short* scale) {
  const int lane = threadIdx.x % kWarp, d = 4 * lane;
  const bool inside = d < dim;
  if (format == kFloat32) {
    if (inside) *reinterpret_cast<float4*>(row + 4 * d) = x;
    return;
  }
  if (format == kFloat16) {
    const uint2 word = make_uint2(float_to_half(x.x) | unsigned(float_to_half(x.y)) << 16,
                                  float_to_half(x.z) | unsigned(float_to_half(x.w)) << 16);
    if (inside) *reinterpret_cast<uint2*>(row + 2 * d) = word;
    return;
  }
  // What is beyond the row is zero, which is never the largest alone.
  const float most = warp_max(max_of(x)), least = -warp_max(max_of(make_float4(-x.x, -x.y, -x.z, -x.w)));
  const float largest = most >= -least ? most : least;
  const bool is_int8 = format == kInt8;
  const unsigned short bits = float_to_half(is_int8 ? fabsf(largest) / 127 : largest / -8);
  // The codes are those of the scale as stored. A row whose scale is zero in half is all zeros, the scale without sign.
  const float stored = half_to_float(bits);
  const unsigned codes = quantise(x, stored != 0 ? 1 / stored : 0, is_int8 ? -127 : -8, is_int8 ? 127 : 7);
  if (lane == 0) *scale = stored != 0 ? bits : 0;
  if (format == kInt8) {
    if (inside) *reinterpret_cast<unsigned*>(row + d) = codes;
    return;
  }
  const unsigned biased = (codes ^ 0x08080808u) & 0x0f0f0f0fu;  // the low nibble of a code, plus 8 modulo 16
  const unsigned other = __shfl_xor_sync(kAllLanes, biased, 1);
  if (inside && lane % 2 == 0) *reinterpret_cast<unsigned*>(row + d / 2) = biased | other << 4;
}

__device__ __forceinline__ float4 load_row(const float* row, int dim) {
  const int d = 4 * (threadIdx.x % kWarp);
  return d < dim ? *reinterpret_cast<const float4*>(row + d) : make_float4(0, 0, 0, 0);
}

// Grid: (rows of a layer / kAppendWarps, 2 for keys and values, layers).
extern "C" __global__ void __launch_bounds__(kAppendThreads) kv_append(const AppendParams p) {
  const int index = blockIdx.x * kAppendWarps + threadIdx.x / kWarp;  // over [batch, num_kv_heads, seq]
  const int rows = p.batch * p.num_kv_heads * p.seq;
  if (index >= rows) return;
  const int token = index % p.seq, head = index / p.seq, sequence = head / p.num_kv_heads;
  // Without a sign a sum may wrap, and what is negative is too large.
  const unsigned slot = p.slots ? p.slots[sequence * p.seq + token] : unsigned(p.past_length[sequence]) + token;
  if (slot >= unsigned(p.cache.capacity)) return;
  const bool is_value = blockIdx.y;
  const int dim = is_value ? p.value_dim : p.key_dim;
  const int format = is_value ? p.cache.value_format : p.cache.key_format;
  const long long layer = blockIdx.z, source = layer * rows + index, row = (long long)head * p.cache.capacity + slot;
  float4 x = load_row((is_value ? p.value : p.key) + source * dim, dim);
  if (p.rotated && !is_value) x = hadamard(x);
  unsigned char* rows_of_layer = is_value ? p.cache.value + layer * p.value_stride : p.cache.key + layer * p.key_stride;
  unsigned char* scales = reinterpret_cast<unsigned char*>(is_value ? p.cache.value_scale : p.cache.key_scale) +
                          layer * (is_value ? p.value_scale_stride : p.key_scale_stride);
  store_row(x, dim, format, rows_of_layer + row * row_bytes(format, dim),
            reinterpret_cast<unsigned short*>(scales) + row);
}

// Grid: rows / kAppendWarps.
extern "C" __global__ void __launch_bounds__(kAppendThreads) quantise_queries(const QuantiseParams p) {
  const long long row = (long long)blockIdx.x * kAppendWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int lane = threadIdx.x % kWarp;
  const float4 q = load_row(p.q + row * p.key_dim, p.key_dim);
  float scale;
  const unsigned codes = quantise_query(p.rotated ? hadamard(q) : q, scale);
  reinterpret_cast<unsigned*>(p.codes)[row * kWarp + lane] = codes;
  if (lane == 0) p.scale[row] = scale;
}

}  // namespace pascalvl
