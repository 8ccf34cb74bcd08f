// What all kernels use: the language (CUDA, or the emulator's), half conversion, warp reductions, the Hadamard rotation
// and quantisation.
#pragma once

#ifdef PASCALVL_EMULATED
#include "plugins/emulator/cuda_emulator.h"
#endif

#include "plugins/kernels/params.h"

namespace pascalvl {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kHadamardDim = 128;

// Half is a storage type alone: its arithmetic runs at 1/64 rate on SM61. No header of the toolkit is needed for that.
#ifdef PASCALVL_EMULATED
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  _Float16 h;
  __builtin_memcpy(&h, &bits, sizeof h);
  return float(h);
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
  const _Float16 h = _Float16(x);
  unsigned short bits;
  __builtin_memcpy(&bits, &h, sizeof h);
  return bits;
}
#else
__device__ __forceinline__ float half_to_float(unsigned short bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
#endif

// 2^x for x up to 0; zero where the result is no normal number.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef PASCALVL_EMULATED
  return x < -126 ? 0 : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Asks for a line of 128 bytes, which comes to the L2 while this kernel and the next one go on.
__device__ __forceinline__ void bring_to_l2(const void* line) {
#ifdef PASCALVL_EMULATED
  (void)line;
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
#endif
}

__device__ __forceinline__ float2 halves_to_floats(unsigned pair) {
  return make_float2(half_to_float(pair & 0xffff), half_to_float(pair >> 16));
}

__device__ __forceinline__ float max2(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ constexpr int min2(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ constexpr int max2(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// A length or bound that the device holds, brought into its range: TensorRT times plugins on inputs that it makes up.
__device__ __forceinline__ int clamped(int x, int least, int most) { return min2(max2(x, least), most); }

// A byte of a word, less a bias, as a float. In the lowest bits of 2^23 a byte is its own value: that takes a byte
// permutation and a subtraction, where conversions from integers run at a quarter of their rate.
template <int kByte>
__device__ __forceinline__ float byte_minus(unsigned word, float bias) {
  return __int_as_float(int(__byte_perm(word, 0x4b000000u, 0x7440u | kByte))) - (8388608.0f + bias);
}

// Rotates a row of 128 held by a warp, elements 4 * lane to 4 * lane + 3 in each lane: two butterfly stages within a
// lane, five between lanes, then the factor that makes it orthonormal.
__device__ __forceinline__ float4 hadamard(float4 x) {
  x = make_float4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
  x = make_float4(x.x + x.z, x.y + x.w, x.x - x.z, x.y - x.w);
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const float sign = threadIdx.x & mask ? -1.0f : 1.0f;
    x.x = sign * x.x + __shfl_xor_sync(kAllLanes, x.x, mask);
    x.y = sign * x.y + __shfl_xor_sync(kAllLanes, x.y, mask);
    x.z = sign * x.z + __shfl_xor_sync(kAllLanes, x.z, mask);
    x.w = sign * x.w + __shfl_xor_sync(kAllLanes, x.w, mask);
  }
  const float norm = 0.08838834764831845f;  // 128^-0.5
  return make_float4(norm * x.x, norm * x.y, norm * x.z, norm * x.w);
}

__device__ __forceinline__ float max_abs(float4 x) {
  return max2(max2(fabsf(x.x), fabsf(x.y)), max2(fabsf(x.z), fabsf(x.w)));
}

__device__ __forceinline__ float max_of(float4 x) { return max2(max2(x.x, x.y), max2(x.z, x.w)); }

template <typename Value>
__device__ __forceinline__ Value warp_max(Value x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = max2(x, __shfl_xor_sync(kAllLanes, x, mask));
  return x;
}

template <typename Value>
__device__ __forceinline__ Value warp_sum(Value x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Four codes in a word: x * inverse_scale, rounded to the nearest even, from `least` to `most`.
__device__ __forceinline__ unsigned quantise(float4 x, float inverse_scale, int least, int most) {
  const float values[4] = {x.x, x.y, x.z, x.w};
  unsigned word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int code = __float2int_rn(values[i] * inverse_scale);
    word |= unsigned(min2(max2(code, least), most) & 0xff) << (8 * i);
  }
  return word;
}

// A query's four codes of this lane, and the row's scale: a warp holds the row.
__device__ __forceinline__ unsigned quantise_query(float4 q, float& scale) {
  const float most = warp_max(max_abs(q));
  scale = most / 127;
  return quantise(q, most > 0 ? 127 / most : 0, -127, 127);
}

}  // namespace pascalvl
