// A kernel that uses what the emulator offers, with bugs that can be planted in it, and its check.
#include <algorithm>

#include "plugins/emulator/cuda_emulator.h"

constexpr int kThreads = 96;

// Each warp's sum over the block's values in reverse order, written by every lane; in halves, through dp4a and back.
__global__ void reversed_warp_sums(const float* in, __half* out, int n) {
  __shared__ float tile[kThreads];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifndef PLANT_UNWRITTEN
  tile[threadIdx.x] = i < n ? in[i] : 0;
#else
  if (threadIdx.x > 0) tile[threadIdx.x] = i < n ? in[i] : 0;
#endif
#ifndef PLANT_MISSING_BARRIER
  __syncthreads();
#endif
#ifdef PLANT_OUT_OF_BOUNDS
  float* end = tile + blockDim.x;
  if (threadIdx.x == 0) end[blockIdx.x] = 1;
#endif
#ifdef PLANT_DIVERGENCE
  if (threadIdx.x < 40) __syncthreads();
#endif
  float sum = tile[kThreads - 1 - threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
#ifdef PLANT_OVERFLOW
  int large = 0x7fffff00 + int(gridDim.x);
  large += 0x100;
  if (large == 0) return;
#endif
  const int whole = __dp4a(int(sum), 0x00000001, 0);  // the low byte, signed
  if (i < n) out[i] = __float2half_rn(sum + float(whole) - float(int8_t(int(sum))));
}

int main() {
  const int n = 1000;
  std::vector<float> in(n);
  std::vector<__half> out(n);
  for (int i = 0; i < n; ++i) in[i] = float(i * 7 % 13);
  const int blocks = (n + kThreads - 1) / kThreads;
  emulator::run([&] { reversed_warp_sums(in.data(), out.data(), n); }, dim3(blocks), dim3(kThreads));
  for (int i = 0; i < n; ++i) {
    const int block = i / kThreads * kThreads, warp = i % kThreads / 32 * 32;
    float expected = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const int source = block + kThreads - 1 - (warp + lane);
      if (source < n) expected += in[source];
    }
    if (__half2float(out[i]) != expected) {
      std::printf("output %d is %g, expected %g\n", i, double(__half2float(out[i])), double(expected));
      return 1;
    }
  }
  return 0;
}
