// The prefill kernels: which rows a block takes, which tiles of keys it walks over. prefill.cuh does a tile.
#include "plugins/kernels/kernels.h"
#include "plugins/kernels/prefill.cuh"
#include "plugins/kernels/sequences.cuh"

namespace pascalvl {

// From a row on.
template <int kKeyFormat, int kValueFormat>
__device__ __forceinline__ Source source_of(const AttentionParams& p, const Rows& rows, long long first) {
  const int k_row = row_bytes(kKeyFormat, p.head_dim), v_row = row_bytes(kValueFormat, p.value_dim);
  return {rows.key + first * k_row, rows.value + first * v_row, is_quantised(kKeyFormat) ? rows.scale + first : nullptr,
          k_row, v_row};
}

// What of a call a block does.
struct Place {
  int sequence;   // `batch`: it is padding
  Tokens tokens;  // of the sequence
  int tile;       // of their rows
};

// Finds tile number `tile` of all sequences' rows, kRows a tile and `group` for each token, padding's at last.
template <int kRows>
__device__ __forceinline__ Place find_tile(const AttentionParams& p, int tile, int group) {
  int begin = 0, end = clamped(p.cu_seqlens[0], 0, p.tokens);
  for (int sequence = 0;; ++sequence) {
    begin = end;
    end = sequence < p.batch ? clamped(p.cu_seqlens[sequence + 1], begin, p.tokens) : p.tokens;
    const bool is_decoded = p.decodes && sequence < p.batch && end - begin == 1;
    const int tiles = is_decoded ? 0 : ceil_div((end - begin) * group, kRows);
    if (tile < tiles || sequence == p.batch) return {sequence, {begin, end - begin}, tile};
    tile -= tiles;
  }
}

// Grid: (kv heads times splits, tiles of rows). The last tiles of rows see the most keys and are started first. Where
// rows are few, blocks share the past: each takes a split of it, the first one the new keys too, and leaves its state
// for the merge.
template <typename T, int kKeyFormat, int kValueFormat>
__device__ __forceinline__ void prefill_causal(const AttentionParams& p, PrefillShared<T>& shared) {
  constexpr int kRows = T::kRows, kKeys = T::kKeys;
  static_assert(kPageSlots % kKeys == 0, "no tile crosses a page");
  const int head = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
  const Place place = find_tile<kRows>(p, gridDim.y - 1 - blockIdx.y, p.group);
  const int sequence = place.sequence, first_token = place.tokens.begin;
  const int first_row = place.tile * kRows, rows = place.tokens.length * p.group;
  float* out = p.out + ((long long)first_token * p.num_heads + head * p.group) * p.value_dim;
  if (sequence == p.batch) {
    for (int r = first_row + threadIdx.x / kWarp; split == 0 && r < min2(first_row + kRows, rows);
         r += kPrefillThreads / kWarp) {
      float* row = out + ((long long)(r / p.group) * p.num_heads + r % p.group) * p.value_dim;
      for (int d = threadIdx.x % kWarp; d < p.value_dim; d += kWarp) row[d] = 0;
    }
    return;
  }
  Prefill<T> prefill;
  prefill.begin(p, first_row, rows, p.tokens);
  const int past = past_of(p, sequence);
  // This block's keys lie in slots begin to end.
  const int share = ceil_div(ceil_div(past, p.splits), kKeys) * kKeys;
  const int begin = min2(split * share, past), end = min2(begin + share, past);

  const long long first_q = (long long)head * p.group * p.tokens + first_token;  // row of the first query
  const unsigned char* q = p.q + first_q * (is_quantised(kKeyFormat) ? kCodeRow : 4 * p.head_dim);

  // The block's first and last token.
  const int low = first_row / p.group, high = (min2(first_row + kRows, rows) - 1) / p.group;

  if (threadIdx.x < kRows) {
    const int r = min2(first_row + int(threadIdx.x), rows - 1);
    shared.token[threadIdx.x] = r / p.group;
    if (is_quantised(kKeyFormat)) {
      const long long row = first_q + (long long)(r % p.group) * p.tokens + r / p.group;
      shared.q_scale[threadIdx.x] = p.scale_log2 * p.q_scale[row];
    }
  }
  if (threadIdx.x == 0) {
    shared.sources[0] = source_of<kKeyFormat, kValueFormat>(p, p.pool, 0);
    shared.sources[1] = source_of<kKeyFormat, kValueFormat>(p, p.added, (long long)head * p.tokens + first_token);
  }
  __syncthreads();

  // Of the cache's slots, how many of the first tokens see each.
  const int* visible = p.past_visible ? p.past_visible + (long long)sequence * p.sequence_pages * kPageSlots : nullptr;
  auto is_hidden = [&](int first) {  // from the whole block: every warp looks at the whole tile, so that all agree
    bool seen = false;
    for (int i = threadIdx.x % kWarp; i < kKeys; i += kWarp) seen |= __ldg(visible + min2(first + i, past - 1)) > low;
    return !__any_sync(kAllLanes, seen);
  };
  for (int first = begin; first < end; first += kKeys) {
    if (visible && is_hidden(first)) continue;
    prefill.template tile<kKeyFormat, kValueFormat>(
        p, q, shared.sources[0], [&] { return slot_row(p, sequence, head, first); }, min2(past - first, kKeys),
        visible || first + kKeys > past, shared,
        [&](int key) {
          const int tokens = visible ? __ldg(visible + first + key) : p.tokens;
          return [&shared, tokens](int row) { return shared.token[row] < tokens; };
        });
  }
  for (int first = 0; first <= high && split == 0; first += kKeys) {
    prefill.template tile<kKeyFormat, kValueFormat>(
        p, q, shared.sources[1], [first] { return first; }, min2(high - first + 1, kKeys), first + kKeys > low + 1,
        shared, [&](int key) { return [&shared, key = first + key](int row) { return key <= shared.token[row]; }; });
  }
  if (p.splits > 1) {
    return prefill.store_partial(p, p.partial + (first_q * p.splits + split) * partial_pitch(p.value_dim));
  }
  prefill.store(p, out);
}

// Bidirectional within each sequence. Grid: (tiles of rows, heads).
template <typename T>
__device__ __forceinline__ void prefill_packed(const AttentionParams& p, PrefillShared<T>& shared) {
  constexpr int kRows = T::kRows, kKeys = T::kKeys;
  const int head = blockIdx.y;
  const Place place = find_tile<kRows>(p, blockIdx.x, 1);
  if (place.sequence == p.batch) return;
  const int length = place.tokens.length;
  Prefill<T> prefill;
  prefill.begin(p, place.tile * kRows, length, 0);
  const long long first_token = (long long)head * p.tokens + place.tokens.begin;
  const unsigned char* q = p.q + first_token * 4 * p.head_dim;
  if (threadIdx.x == 0) shared.sources[0] = source_of<kFloat32, kFloat32>(p, p.added, first_token);
  __syncthreads();
  for (int first = 0; first < length; first += kKeys) {
    prefill.template tile<kFloat32, kFloat32>(
        p, q, shared.sources[0], [first] { return first; }, min2(length - first, kKeys), first + kKeys > length, shared,
        [](int) { return [](int) { return true; }; });
  }
  prefill.store(p, p.out + ((long long)place.tokens.begin * p.num_heads + head) * p.value_dim);
}

#define PREFILL_CAUSAL(DIM, KEY, VALUE)                                        \
  extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)             \
      PASCALVL_PREFILL_CAUSAL_NAME(DIM, KEY, VALUE)(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<Tile<DIM>> shared;                  \
    prefill_causal<Tile<DIM>, KEY, VALUE>(p, shared);                          \
  }
PASCALVL_PREFILL_CAUSAL(PREFILL_CAUSAL)

#define PREFILL_SHORT(DIM, KEY, VALUE)                                        \
  extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)            \
      PASCALVL_PREFILL_SHORT_NAME(DIM, KEY, VALUE)(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<Tile<DIM, 4>> shared;              \
    prefill_causal<Tile<DIM, 4>, KEY, VALUE>(p, shared);                      \
  }
PASCALVL_PREFILL_SHORT(PREFILL_SHORT)

#define PREFILL_PACKED(DIM)                                        \
  extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2) \
      PASCALVL_PREFILL_PACKED_NAME(DIM)(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<Tile<DIM>> shared;      \
    prefill_packed(p, shared);                                     \
  }
PASCALVL_PREFILL_PACKED(PREFILL_PACKED)

}  // namespace pascalvl
