// Where the tokens and the past of a sequence lie. What is read from memory is brought into its range.
#pragma once

#include "plugins/kernels/device.cuh"

namespace pascalvl {

// A sequence's tokens among a call's. Bounds that go back or too far make empty sequences: no two share a token.
struct Tokens {
  int begin;
  int length;
};

// A warp asks together.
__device__ __forceinline__ Tokens tokens_of(const int* cu_seqlens, int sequence, int tokens) {
  const int next = cu_seqlens[sequence + 1];
  int begin = 0;
  for (int first = 0; first <= sequence; first += kWarp) {
    const int number = first + threadIdx.x % kWarp;
    begin = max2(begin, warp_max(number <= sequence ? clamped(cu_seqlens[number], 0, tokens) : 0));
  }
  return {begin, clamped(next, begin, tokens) - begin};
}

// The sequence that a token is of; padding: `batch`. A warp asks together.
__device__ __forceinline__ int sequence_of(const int* cu_seqlens, int batch, int token) {
  int sequence = 0;
  for (int first = 0; first < batch; first += kWarp) {
    const int number = first + threadIdx.x % kWarp;
    sequence += __popc(__ballot_sync(kAllLanes, number < batch && cu_seqlens[number + 1] <= token));
  }
  return sequence;
}

__device__ __forceinline__ int past_of(const AttentionParams& p, int sequence) {
  return p.past_length ? clamped(p.past_length[sequence], 0, p.sequence_pages * kPageSlots) : 0;
}

// The first of a head's rows in a page of the pool.
__device__ __forceinline__ int page_row(int page, int num_kv_heads, int head) {
  return (page * num_kv_heads + head) * kPageSlots;
}

// The row of a sequence's slot; those after it, to the end of its page, follow.
__device__ __forceinline__ int slot_row(const AttentionParams& p, int sequence, int head, int slot) {
  const int page = __ldg(p.page_table + sequence * p.sequence_pages + slot / kPageSlots);
  return page_row(clamped(page, 0, p.num_pages - 1), p.num_kv_heads, head) + slot % kPageSlots;
}

// Slots of a decode split: of so many splits at most, none with fewer keys than it pays; of a long past twice as many,
// which takes one sequence of 4,096 keys a tenth longer on an H200, and eight together a fifth less. It depends on the
// sequence's own past alone (and the card), so that sums have the same order whatever other sequences a call has.
__device__ __forceinline__ int decode_share(int past, int splits) {
  const int least = past > kLongPast ? 2 : 1;
  return max2(ceil_div(ceil_div(past, splits), kLeastKeys), least) * kLeastKeys;
}

}  // namespace pascalvl
