// What a GPU allows: arithmetic in registers alone, a matrix product by prefill's own machinery, with nothing of
// attention around it, and a plain read.
#include "plugins/kernels/prefill.cuh"

namespace pascalvl {

// C = A B^T: a [m, k], b [n, k], c [m, n]; k a multiple of 8. Grid: (n / 128, m / 64).
extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)
    sgemm(const float* a, const float* b, float* c, int n, int k) {
  using T = Tile<128>;
  __shared__ __align__(16) PrefillShared<T> shared;
  AttentionParams p{};
  p.head_dim = k;
  p.group = 1;
  p.scale_log2 = 1;
  const Source source{reinterpret_cast<const unsigned char*>(b), nullptr, nullptr, 4 * k, 0};
  const int first = blockIdx.x * T::kKeys;
  Prefill<T> tile;
  tile.begin(p, blockIdx.y * T::kRows, gridDim.y * T::kRows, 0);
  float product[T::kRowsPerThread][kKeysPerThread];
  tile.scores<kFloat32>(p, reinterpret_cast<const unsigned char*>(a), source, first, T::kKeys, shared, product);
#pragma unroll
  for (int i = 0; i < T::kRowsPerThread; ++i) {
    float* row = c + (long long)(tile.first_row + tile.row0 + i) * n + first + 4 * tile.column;
    const float* x = product[i];
    *reinterpret_cast<float4*>(row) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(row + T::kHalf) = make_float4(x[4], x[5], x[6], x[7]);
  }
}

// 64 independent values a thread, `rounds` times 8 steps each; the rounds cannot be folded into one another.
template <typename Word, typename Step>
__device__ __forceinline__ void rate(Word* out, int rounds, Step step) {
  Word values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = Word(threadIdx.x + i);
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < 8 * 64; ++i) values[i % 64] = step(values[i % 64]);
  }
  Word total = 0;
#pragma unroll
  for (int i = 0; i < 64; ++i) total += values[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}

extern "C" __global__ void __launch_bounds__(kPrefillThreads, 4) ffma_rate(float* out, int rounds) {
  const float x = threadIdx.x;
  rate(out, rounds, [x](float value) { return value * x + x; });
}

extern "C" __global__ void __launch_bounds__(kPrefillThreads, 4) dp4a_rate(int* out, int rounds) {
  const int x = threadIdx.x;
  rate(out, rounds, [x](int value) { return __dp4a(value, x, value); });
}

// Reads so many times 16 bytes. Two loads a thread under way are as fast as four or eight; that all blocks go through
// memory together is up to 3% faster than a part for each. PyTorch's max takes 6 us longer.
extern "C" __global__ void __launch_bounds__(kPrefillThreads) plain_read(const uint4* from, int quads, unsigned* out) {
  const int step = gridDim.x * kPrefillThreads;
  unsigned total = 0;
  auto add = [&](uint4 quad) { total ^= quad.x ^ quad.y ^ quad.z ^ quad.w; };
  int at = blockIdx.x * kPrefillThreads + threadIdx.x;
  for (; at < quads - step; at += 2 * step) {
    const uint4 first = __ldg(from + at), second = __ldg(from + at + step);
    add(first), add(second);
  }
  if (at < quads) add(__ldg(from + at));
  if (total == 0x9e3779b9u) *out = total;  // or the compiler would leave the loads out
}

}  // namespace pascalvl
