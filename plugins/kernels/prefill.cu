// The prefill kernels: which rows a block takes, which tiles of keys it walks over. prefill.cuh does a tile.
#include "plugins/kernels/kernels.h"
#include "plugins/kernels/prefill.cuh"

namespace pascalvl {

// `count` rows from number `first` on.
template <int kKeyFormat, int kValueFormat>
__device__ __forceinline__ Source source_of(const AttentionParams& p, const Rows& rows, long long first, int count) {
  const int k_row = row_bytes(kKeyFormat, p.head_dim), v_row = row_bytes(kValueFormat, p.value_dim);
  return {rows.key + first * k_row,
          rows.value + first * v_row,
          is_quantised(kKeyFormat) ? rows.scale + first : nullptr,
          k_row,
          v_row,
          count};
}

// Grid: (kv heads times splits, tiles of rows, batch). The last tiles of rows see the most keys and are started first.
// Where rows are few, blocks share the past: each takes a split of it, the first one the new keys too, and leaves its
// state for the merge.
template <int kValueDim, int kKeyFormat, int kValueFormat>
__device__ __forceinline__ void prefill_causal(const AttentionParams& p, PrefillShared<kValueDim>& shared) {
  constexpr int kRows = Tile<kValueDim>::kRows, kKeys = Tile<kValueDim>::kKeys;
  const int head = blockIdx.x / p.splits, split = blockIdx.x % p.splits, sequence = blockIdx.z;
  const int past = p.past_length ? clamped(p.past_length[sequence], 0, p.capacity) : 0;
  // This block's keys lie in slots begin to end.
  const int share = ceil_div(ceil_div(past, p.splits), kKeys) * kKeys;
  const int begin = min2(split * share, past), end = min2(begin + share, past);
  const long long kv = (long long)sequence * p.num_kv_heads + head;

  Prefill<kValueDim> prefill;
  prefill.begin(p, (gridDim.y - 1 - blockIdx.y) * kRows, p.seq * p.group, p.seq);
  const long long first_q = kv * p.group * p.seq;  // row of the kv head's first query
  const unsigned char* q = p.q + first_q * (is_quantised(kKeyFormat) ? kCodeRow : 4 * p.head_dim);

  // The block's first and last token.
  const int low = prefill.first_row / p.group;
  const int high = (min2(prefill.first_row + kRows, prefill.rows) - 1) / p.group;

  if (threadIdx.x < kRows) {
    const int r = min2(prefill.first_row + int(threadIdx.x), prefill.rows - 1);
    shared.token[threadIdx.x] = r / p.group;
    if (is_quantised(kKeyFormat)) {
      shared.q_scale[threadIdx.x] = p.scale_log2 * p.q_scale[first_q + r % p.group * p.seq + r / p.group];
    }
  }
  if (threadIdx.x == 0) {
    shared.sources[0] = source_of<kKeyFormat, kValueFormat>(p, p.past, kv * p.capacity, past);
    shared.sources[1] = source_of<kKeyFormat, kValueFormat>(p, p.added, kv * p.seq, p.seq);
  }
  __syncthreads();

  // Of the cache's slots, how many of the first tokens see each.
  const int* visible = p.past_visible ? p.past_visible + (long long)sequence * p.capacity : nullptr;
  auto is_hidden = [&](int first) {  // from the whole block: every warp looks at the whole tile, so that all agree
    bool seen = false;
    for (int i = threadIdx.x % kWarp; i < kKeys; i += kWarp) seen |= __ldg(visible + min2(first + i, past - 1)) > low;
    return !__any_sync(kAllLanes, seen);
  };
  for (int first = begin; first < end; first += kKeys) {
    if (visible && is_hidden(first)) continue;
    prefill.template tile<kKeyFormat, kValueFormat>(p, q, shared.sources[0], first, min2(past - first, kKeys),
                                                    visible || first + kKeys > past, shared, [&](int key) {
                                                      const int tokens = visible ? __ldg(visible + key) : p.seq;
                                                      return [&shared, tokens](int row) {
                                                        return shared.token[row] < tokens;
                                                      };
                                                    });
  }
  for (int first = 0; first <= high && split == 0; first += kKeys) {
    prefill.template tile<kKeyFormat, kValueFormat>(
        p, q, shared.sources[1], first, min2(high - first + 1, kKeys), first + kKeys > low + 1, shared,
        [&](int key) { return [&shared, key](int row) { return key <= shared.token[row]; }; });
  }
  if (p.splits > 1) {
    return prefill.store_partial(p, p.partial + (first_q * p.splits + split) * partial_pitch(p.value_dim));
  }
  prefill.store(p, p.out + ((long long)sequence * p.seq * p.num_heads + head * p.group) * p.value_dim);
}

// Bidirectional within each of the sequences that cu_seqlens cuts the tokens into. Bounds that go back or too far make
// empty sequences, so that no two share a token, and none has one that there is not.
// Grid: (seq / rows of a tile + num_sequences, at least as many as the sequences have tiles; heads).
template <int kValueDim>
__device__ __forceinline__ void prefill_packed(const AttentionParams& p, PrefillShared<kValueDim>& shared) {
  constexpr int kRows = Tile<kValueDim>::kRows, kKeys = Tile<kValueDim>::kKeys;
  const int head = blockIdx.y;
  int sequence = 0, tile = blockIdx.x, begin = 0, length = 0;
  for (int end = clamped(p.cu_seqlens[0], 0, p.seq); sequence < p.num_sequences; ++sequence) {
    begin = end;
    end = clamped(p.cu_seqlens[sequence + 1], begin, p.seq);
    length = end - begin;
    const int tiles = ceil_div(length, kRows);
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (sequence == p.num_sequences) return;

  Prefill<kValueDim> prefill;
  prefill.begin(p, tile * kRows, length, 0);
  const long long first_token = (long long)head * p.seq + begin;
  const unsigned char* q = p.q + first_token * 4 * p.head_dim;
  if (threadIdx.x == 0) shared.sources[0] = source_of<kFloat32, kFloat32>(p, p.added, first_token, length);
  __syncthreads();
  for (int first = 0; first < length; first += kKeys) {
    prefill.template tile<kFloat32, kFloat32>(p, q, shared.sources[0], first, min2(length - first, kKeys),
                                              first + kKeys > length, shared,
                                              [](int) { return [](int) { return true; }; });
  }
  prefill.store(p, p.out + ((long long)begin * p.num_heads + head) * p.value_dim);
}

#define PREFILL_CAUSAL(DIM, KEY, VALUE)                                        \
  extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)             \
      PASCALVL_PREFILL_CAUSAL_NAME(DIM, KEY, VALUE)(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<DIM> shared;                        \
    prefill_causal<DIM, KEY, VALUE>(p, shared);                                \
  }
PASCALVL_PREFILL_CAUSAL(PREFILL_CAUSAL)

#define PREFILL_PACKED(DIM)                                        \
  extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2) \
      PASCALVL_PREFILL_PACKED_NAME(DIM)(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<DIM> shared;            \
    prefill_packed(p, shared);                                     \
  }
PASCALVL_PREFILL_PACKED(PREFILL_PACKED)

}  // namespace pascalvl
