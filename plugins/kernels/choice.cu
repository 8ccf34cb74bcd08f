// The choice of each row's next token: the likeliest, or, after penalties, bias and mask, one drawn from what top-k,
// top-p and min-p leave. Whole numbers stand for probabilities, so that sums do not depend on their order; `engines/
// choice.py` is the definition.
//
// A block takes a row, and reads its logits once (the likeliest), twice (where all that may be drawn is among the few
// candidates that fit into shared memory), or up to seven times. Bound by one SM's share of the L2: for 150,000 logits
// some 10 us a reading on SM61, where a transfer to the host would wait for the device besides.
#include "plugins/kernels/device.cuh"

namespace pascalvl {

constexpr float kWeight = 1099511627776.0f;  // 2^40: of the likeliest token
constexpr int kChoiceWarps = kChoiceThreads / kWarp;
constexpr int kBins = 2048;        // of 11 bits of a key
constexpr int kCandidates = 1024;  // that shared memory has room for
constexpr int kMostTopK = 256;     // for which they are tried
constexpr int kWithoutTopK = 128;  // as if it were this, where there is none
constexpr int kUnroll = 8;         // logits of a thread that are on their way at a time
constexpr float kLog2OfE = 1.4426950408889634f;

using Sum = unsigned long long;

// The score of a token that may not be taken: negative infinity.
__device__ __forceinline__ float nothing() { return __int_as_float(int(0xff800000u)); }

struct Best {
  float score;
  int token;
};

__device__ __forceinline__ bool is_better(const Best& a, const Best& b) {
  return a.score == b.score ? a.token < b.token : a.score > b.score;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Best other = {__shfl_xor_sync(kAllLanes, best.score, mask), __shfl_xor_sync(kAllLanes, best.token, mask)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

__device__ __forceinline__ Best best_of_block(Best best, Best* bests) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  best = best_of_warp(best);
  if (lane == 0) bests[warp] = best;
  __syncthreads();
  best = best_of_warp(bests[min2(lane, kChoiceWarps - 1)]);
  __syncthreads();
  return best;
}

// The sum over the block's threads before this one.
template <typename T>
__device__ T sum_before(T own, T* warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  T sum = own;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T other = __shfl_sync(kAllLanes, sum, max2(lane - step, 0));
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) warps[warp] = sum;
  __syncthreads();
  T before = sum - own;
  for (int i = 0; i < warp; ++i) before += warps[i];
  __syncthreads();
  return before;
}

// A row's tokens, as the filters see them.
struct Row {
  const float* logits;
  TokenChoice c;
  float best, scale;  // scale: from differences of scores to powers of 2

  __device__ float score(int token) const { return score(token, logits[token]); }

  // Of a token's logit.
  __device__ float score(int token, float score) const {
    if (c.counts) {
      const unsigned count = c.counts[token], times = count & 0x7fffffffu;
      if (count) score = score < 0 ? score * c.repetition_penalty : score / c.repetition_penalty;
      if (times) score = score - c.presence_penalty - c.frequency_penalty * float(times);
    }
    if (c.bias) score += c.bias[token];
    if (c.mask && !(c.mask[token / 32] >> (token % 32) & 1)) score = nothing();
    return score;
  }

  // Larger scores have larger keys.
  static __device__ unsigned key(float score) {
    const unsigned bits = unsigned(__float_as_int(score));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }

  __device__ Sum weight(float score) const {
    const float x = (score - best) * scale;
    return x <= 0 ? Sum(power_of_2(x) * kWeight) : 0;  // nothing of no number
  }
};

// Calls `take(token, logit)` for this thread's share of a row's tokens.
template <typename Take>
__device__ __forceinline__ void for_own_tokens(const Row& row, int vocab_size, Take take) {
  for (int first = threadIdx.x; first < vocab_size; first += kChoiceThreads * kUnroll) {
    float logits[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int token = first + k * kChoiceThreads;
      logits[k] = token < vocab_size ? row.logits[token] : 0;
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      const int token = first + k * kChoiceThreads;
      if (token < vocab_size) take(token, logits[k]);
    }
  }
}

struct Shared {
  Best bests[kChoiceWarps];
  Sum warps[kChoiceWarps];
  unsigned bin;
  Sum rest;
  Sum bins[kBins];
  int count;
  int tokens[kCandidates];
  __align__(16) unsigned keys[kCandidates];
  Sum weights[kCandidates];
};

// The largest key of which it is true that it and all larger ones have `need` together, by what `amount_of` gives for
// a token's score.
template <typename Amount>
__device__ unsigned select_key(const Row& row, int vocab_size, Sum need, Shared& shared, Amount amount_of) {
  constexpr int kOwn = kBins / kChoiceThreads;
  unsigned key = 0;
  for (int shift = 32; shift > 0;) {
    const int bits = min2(shift, 11), next = shift - bits;
    for (int i = threadIdx.x; i < kBins; i += kChoiceThreads) shared.bins[i] = 0;
    __syncthreads();
    for_own_tokens(row, vocab_size, [&](int token, float logit) {
      const float score = row.score(token, logit);
      const unsigned own = Row::key(score);
      if (shift < 32 && own >> shift != key >> shift) return;
      const Sum amount = amount_of(score);
      if (amount) atomicAdd(&shared.bins[own >> next & ((1u << bits) - 1)], amount);
    });
    __syncthreads();
    // The largest bins come first.
    const int first = kBins - 1 - int(threadIdx.x) * kOwn;
    Sum own = 0;
    for (int i = 0; i < kOwn; ++i) own += shared.bins[first - i];
    Sum before = sum_before(own, shared.warps);
    if (before < need && need <= before + own) {
      int bin = first;
      while (need > before + shared.bins[bin]) before += shared.bins[bin--];
      shared.bin = bin;
      shared.rest = need - before;
    }
    __syncthreads();
    key |= shared.bin << next;
    need = shared.rest;
    shift = next;
    __syncthreads();
  }
  return key;
}

__device__ __forceinline__ Sum sum_of_block(Sum own, Shared& shared) {
  const Sum before = sum_before(own, shared.warps);
  if (threadIdx.x == kChoiceThreads - 1) shared.rest = before + own;
  __syncthreads();
  const Sum sum = shared.rest;
  __syncthreads();
  return sum;
}

__device__ __forceinline__ Sum nucleus(Sum total, float top_p) {
  const double need = ceil(double(total) * double(max2(top_p, 0.0f)));
  return need < 1 ? 1 : Sum(need);
}

// Gathers the candidates into shared memory: tokens of the largest keys, at least as many as top-k asks for: the k-th
// largest of what each thread found as its own largest bounds them, for k tokens are as large as that. Returns whether
// all that may be drawn is among them; and what top-p asks for of their weights.
__device__ bool gather_candidates(const ChoiceParams& p, const Row& row, unsigned own_largest, Sum least_weight,
                                  Shared& shared, Sum* need) {
  const bool has_top_k = row.c.top_k > 0;
  const int rank = has_top_k ? row.c.top_k : kWithoutTopK;
  if (rank > kMostTopK) return false;
  shared.keys[threadIdx.x] = own_largest;
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  int before = 0;  // threads with a larger one
  auto count_before = [&](unsigned other, int i) {
    before += other > own_largest || (other == own_largest && i < int(threadIdx.x));
  };
  for (int i = 0; i < kChoiceThreads; i += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(&shared.keys[i]);
    count_before(others.x, i), count_before(others.y, i + 1);
    count_before(others.z, i + 2), count_before(others.w, i + 3);
  }
  if (before == rank - 1) shared.bin = own_largest;
  __syncthreads();
  const unsigned bound = shared.bin;
  Sum own = 0;
  for_own_tokens(row, p.vocab_size, [&](int token, float logit) {
    const float score = row.score(token, logit);
    const unsigned key = Row::key(score);
    if (has_top_k && key < bound) return;
    const Sum weight = row.weight(score);
    own += weight;
    if (key < bound) return;
    const int i = atomicAdd(&shared.count, 1);
    if (i >= kCandidates) return;
    shared.tokens[i] = token;
    shared.keys[i] = key;
    shared.weights[i] = weight;
  });
  Sum total = sum_of_block(own, shared);
  const int count = shared.count;
  if (count > kCandidates) return false;
  own = 0;
  Sum smallest = ~Sum(0);
  for (int i = threadIdx.x; i < count; i += kChoiceThreads) {
    if (has_top_k) {
      int larger = 0;
      for (int j = 0; j < count; ++j) larger += shared.keys[j] > shared.keys[i];
      if (larger >= rank) shared.weights[i] = 0;
    }
    own += shared.weights[i];
    if (shared.keys[i] == bound) smallest = shared.weights[i];
  }
  const Sum of_candidates = sum_of_block(own, shared);
  if (has_top_k) total = of_candidates;
  *need = row.c.top_p < 1 ? nucleus(total, row.c.top_p) : ~Sum(0);
  // Where the lightest of them is too light for min-p, so is all that is not among them.
  const bool is_bounded = sum_of_block(smallest < least_weight, shared) > 0;
  return has_top_k || of_candidates >= *need || is_bounded;
}

// Of the candidates, those that have `need` together, and each at least `least_weight`.
__device__ void draw_of_candidates(const ChoiceParams& p, const Row& row, Sum need, Sum least_weight, Shared& shared) {
  const int count = shared.count;
  Sum kept[kCandidates / kChoiceThreads], own = 0;
#pragma unroll
  for (int k = 0; k < kCandidates / kChoiceThreads; ++k) {
    const int i = threadIdx.x + k * kChoiceThreads;
    kept[k] = 0;
    if (i >= count) continue;
    Sum before = 0;
    for (int j = 0; j < count; ++j) before += shared.keys[j] > shared.keys[i] ? shared.weights[j] : 0;
    if (before < need && shared.weights[i] >= least_weight) kept[k] = shared.weights[i];
    own += kept[k];
  }
  const Sum at = __umul64hi(sum_of_block(own, shared), row.c.random);  // behind this, all have read the weights
#pragma unroll
  for (int k = 0; k < kCandidates / kChoiceThreads; ++k) {
    const int i = threadIdx.x + k * kChoiceThreads;
    if (i < count) shared.weights[i] = kept[k];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kChoiceThreads) {
    Sum before = 0;
    for (int j = 0; j < count; ++j) before += shared.tokens[j] < shared.tokens[i] ? shared.weights[j] : 0;
    if (before <= at && at < before + shared.weights[i]) p.token[blockIdx.x] = shared.tokens[i];
  }
}

// Among all tokens whose key is at least `least`.
__device__ void draw_of_all(const ChoiceParams& p, const Row& row, unsigned least, Sum least_weight, Shared& shared) {
  auto weight_of = [&](float score, Sum from) {
    const Sum weight = Row::key(score) >= least ? row.weight(score) : 0;
    return weight >= from ? weight : 0;
  };
  if (row.c.top_p < 1) {
    Sum own = 0;
    for_own_tokens(row, p.vocab_size, [&](int token, float logit) { own += weight_of(row.score(token, logit), 1); });
    const Sum need = nucleus(sum_of_block(own, shared), row.c.top_p);
    const unsigned key = select_key(row, p.vocab_size, need, shared, [&](float score) { return weight_of(score, 1); });
    if (key > least) least = key;
  }
  // A warp's tokens follow each other.
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int each = ceil_div(p.vocab_size, kChoiceThreads) * kWarp;
  const int first = warp * each, last = min2(first + each, p.vocab_size);
  Sum own = 0;
  for (int token = first + lane; token < last; token += kWarp) own += weight_of(row.score(token), least_weight);
  const Sum at = __umul64hi(sum_of_block(own, shared), row.c.random);
  Sum before = sum_before(own, shared.warps);
  before = __shfl_sync(kAllLanes, before, 0);
  for (int start = first; start < last; start += kWarp) {
    const int token = start + lane;
    const Sum weight = token < last ? weight_of(row.score(token), least_weight) : 0;
    Sum sum = weight;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const Sum other = __shfl_sync(kAllLanes, sum, max2(lane - step, 0));
      if (lane >= step) sum += other;
    }
    if (before + sum - weight <= at && at < before + sum) p.token[blockIdx.x] = token;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(kChoiceThreads) choose_token(const ChoiceParams p) {
  __shared__ Shared shared;
  Row row = {p.logits + (long long)blockIdx.x * p.vocab_size, {}, 0, 0};
  if (p.choices) row.c = p.choices[blockIdx.x];
  Best best = {nothing(), p.vocab_size};
  float highest = nothing();
  bool has_nan = false;
  for_own_tokens(row, p.vocab_size, [&](int token, float logit) {
    const float score = row.score(token, logit);
    if (score > best.score) best = {score, token};  // of equal ones the first
    highest = max2(highest, logit);
    has_nan |= logit != logit;
  });
  const unsigned own_largest = Row::key(best.score);
  best = best_of_block(best, shared.bests);
  // The host is told where there is a NaN: it goes as the first of all infinities.
  const Best told = best_of_block(has_nan ? Best{-nothing(), 0} : Best{highest, 1}, shared.bests);
  if (threadIdx.x == 0) {
    p.logit[blockIdx.x] = told.token ? told.score : told.score - told.score;
    p.token[blockIdx.x] = best.score == nothing() ? -1 : best.token;
  }
  if (!(row.c.temperature > 0) || !(best.score > nothing())) return;
  __syncthreads();  // a token that is drawn is written behind the likeliest
  row.best = best.score;
  row.scale = kLog2OfE / row.c.temperature;
  const float share = ceilf(row.c.min_p * kWeight);
  const Sum least_weight = share >= 1 ? Sum(share < kWeight ? share : kWeight) : 1;
  Sum need = 0;
  if (gather_candidates(p, row, own_largest, least_weight, shared, &need))
    return draw_of_candidates(p, row, need, least_weight, shared);
  unsigned least = 0;
  if (row.c.top_k > 0 && row.c.top_k < p.vocab_size)
    least = select_key(row, p.vocab_size, row.c.top_k, shared, [](float) { return Sum(1); });
  draw_of_all(p, row, least, least_weight, shared);
}

}  // namespace pascalvl
