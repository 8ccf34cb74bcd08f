// The likeliest token: the first of the largest logits of a row. A block takes a row; bound by one SM's share of DRAM,
// some 40 us for 150,000 logits on SM61, where a transfer to the host would wait for the device besides.
#include "plugins/kernels/device.cuh"

namespace pascalvl {

struct Choice {
  float logit;
  int token;
};

// NaN is larger than every number, so that the host sees that there was one.
__device__ __forceinline__ bool is_better(const Choice& a, const Choice& b) {
  const bool a_is_nan = a.logit != a.logit, b_is_nan = b.logit != b.logit;
  if (a_is_nan != b_is_nan) return a_is_nan;
  return a.logit == b.logit || a_is_nan ? a.token < b.token : a.logit > b.logit;
}

__device__ __forceinline__ Choice best_of_warp(Choice best) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Choice other = {__shfl_xor_sync(kAllLanes, best.logit, mask), __shfl_xor_sync(kAllLanes, best.token, mask)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(kGreedyThreads) greedy_choice(const GreedyParams p) {
  constexpr int kWarps = kGreedyThreads / kWarp;
  __shared__ Choice bests[kWarps];
  const float* logits = p.logits + (long long)blockIdx.x * p.vocab_size;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Choice best = {logits[0], 0};
  for (int token = threadIdx.x; token < p.vocab_size; token += kGreedyThreads) {
    const Choice found = {logits[token], token};
    if (is_better(found, best)) best = found;
  }
  best = best_of_warp(best);
  if (lane == 0) bests[warp] = best;
  __syncthreads();
  if (warp > 0) return;
  best = best_of_warp(bests[min2(lane, kWarps - 1)]);
  if (lane == 0) p.token[blockIdx.x] = best.token, p.logit[blockIdx.x] = best.logit;
}

}  // namespace pascalvl
