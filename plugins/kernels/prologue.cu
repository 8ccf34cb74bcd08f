// attention_prologue: the packed result of a layer's q/k/v projection to what attention takes.
//
// A warp takes one row (one token's query, key or value of one head), four elements a lane, so that norms, both
// rotations, the largest magnitude and packing need shuffles alone. Bound by latency for a token, by DRAM for many:
// rows are read once and written once. Rows shorter than 128 leave lanes idle.
#include "plugins/kernels/device.cuh"
#include "plugins/kernels/kernels.h"

namespace pascalvl {

__device__ __forceinline__ float4 load_row(const float* row, int dim) {
  const int d = 4 * (threadIdx.x % kWarp);
  return d < dim ? *reinterpret_cast<const float4*>(row + d) : make_float4(0, 0, 0, 0);
}

// To a row of a cache; `scale`: where its own goes, of codes.
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
  if (is_int8) {
    if (inside) *reinterpret_cast<unsigned*>(row + d) = codes;
    return;
  }
  const unsigned biased = (codes ^ 0x08080808u) & 0x0f0f0f0fu;  // the low nibble of a code, plus 8 modulo 16
  const unsigned other = __shfl_xor_sync(kAllLanes, biased, 1);
  if (inside && lane % 2 == 0) *reinterpret_cast<unsigned*>(row + d / 2) = biased | other << 4;
}

// Over the root of the mean square, times a weight.
__device__ __forceinline__ float4 rms_norm(float4 x, float4 weight, int dim, float epsilon) {
  const float squares = warp_sum(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w);
  const float factor = 1 / sqrtf(squares / dim + epsilon);
  return make_float4(x.x * factor * weight.x, x.y * factor * weight.y, x.z * factor * weight.z,
                     x.w * factor * weight.w);
}

// Element i and the one half a row further on make a pair.
__device__ __forceinline__ float4 rope(float4 x, float4 cos, float4 sin, int dim) {
  const int lane = threadIdx.x % kWarp, half = dim / 8;  // lanes
  const bool is_first = lane < half;
  const int other = is_first ? lane + half : lane - half;
  const float sign = is_first ? -1.0f : 1.0f;
  const float4 y = make_float4(__shfl_sync(kAllLanes, x.x, other), __shfl_sync(kAllLanes, x.y, other),
                               __shfl_sync(kAllLanes, x.z, other), __shfl_sync(kAllLanes, x.w, other));
  return make_float4(x.x * cos.x + sign * y.x * sin.x, x.y * cos.y + sign * y.y * sin.y,
                     x.z * cos.z + sign * y.z * sin.z, x.w * cos.w + sign * y.w * sin.w);
}

// Grid: rows / kRowWarps.
extern "C" __global__ void __launch_bounds__(kRowThreads) attention_prologue(const PrologueParams p) {
  const int rows = p.num_heads + 2 * p.num_kv_heads;  // of a token
  const long long row = (long long)blockIdx.x * kRowWarps + threadIdx.x / kWarp, token = row / rows;
  if (token >= p.tokens) return;
  const int number = int(row % rows), lane = threadIdx.x % kWarp;
  const bool is_query = number < p.num_heads, is_value = number >= p.num_heads + p.num_kv_heads;
  const int keys = p.num_heads + p.num_kv_heads, dim = is_value ? p.value_dim : p.head_dim;
  const long long width = (long long)keys * p.head_dim + (long long)p.num_kv_heads * p.value_dim;
  const long long at = is_value ? keys * p.head_dim + (number - keys) * p.value_dim : number * p.head_dim;
  float4 x = load_row(p.qkv + token * width + at, dim);
  if (!is_value) {
    const float* norm = is_query ? p.q_norm : p.k_norm;
    const float4 zero = make_float4(0, 0, 0, 0);
    const float4 weight = norm ? load_row(norm, dim) : zero;
    const float4 cos = p.rope_cos ? load_row(p.rope_cos + token * dim, dim) : zero;
    const float4 sin = p.rope_cos ? load_row(p.rope_sin + token * dim, dim) : zero;
    if (norm) x = rms_norm(x, weight, dim, p.epsilon);
    if (p.rope_cos) x = rope(x, cos, sin, dim);
    if (p.rotated) x = hadamard(x);
  }
  if (is_query) {
    const long long to = (long long)number * p.tokens + token;
    if (!is_quantised(p.key_format)) return store_row(x, dim, kFloat32, p.q + to * dim * sizeof(float), nullptr);
    float scale;
    const unsigned codes = quantise_query(x, scale);
    reinterpret_cast<unsigned*>(p.q)[to * (kCodeRow / 4) + lane] = codes;
    if (lane == 0) p.q_scale[to] = scale;
    return;
  }
  const int head = number - (is_value ? keys : p.num_heads);
  const long long to = (long long)head * p.tokens + token;
  const int format = is_value ? p.value_format : p.key_format;
  unsigned short* scale = nullptr;
  if (is_quantised(format)) scale = reinterpret_cast<unsigned short*>(p.to.scale + to) + is_value;
  store_row(x, dim, format, (is_value ? p.to.value : p.to.key) + to * row_bytes(format, dim), scale);
}

}  // namespace pascalvl
