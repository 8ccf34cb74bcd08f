// The online softmax: what prefill, decode and the merge of splits keep of the keys that they have seen.
#pragma once

#include "plugins/kernels/device.cuh"

namespace pascalvl {

constexpr float kLowest = -1e38f;  // below every score: the maximum where no key was seen
constexpr float kMasked = -3e38f;  // the score of a key that is not seen: its power is zero beside kLowest, too

// The state of an online softmax over scores in powers of two (Milakov and Gimelshein, arXiv:1805.02867). The sum of
// values that belongs to it lies elsewhere, in registers or memory: who holds it scales it by what `raise` returns, and
// adds values, or another state's sum of them, times what `take` and `merge` return. Trivial, for shared memory.
struct __align__(8) SoftmaxState {
  float maximum;
  float sum;  // of 2^(score - maximum), over the keys taken

  // No key taken yet, of keys whose largest score is known, or not.
  static __device__ __forceinline__ SoftmaxState init(float maximum = kLowest) { return {maximum, 0}; }

  // Makes the maximum `most`, which is not less than it was.
  __device__ __forceinline__ float raise(float most) {
    const float factor = power_of_2(maximum - most);
    maximum = most;
    sum *= factor;
    return factor;
  }

  // Takes a key, whose score is at most the maximum.
  __device__ __forceinline__ float take(float score) {
    const float weight = power_of_2(score - maximum);
    sum += weight;
    return weight;
  }

  // Takes all keys of another state, whose maximum is not larger.
  __device__ __forceinline__ float merge(const SoftmaxState& other) {
    const float weight = power_of_2(other.maximum - maximum);
    sum += weight * other.sum;
    return weight;
  }

  // What makes means of sums of values.
  __device__ __forceinline__ float normalise() const { return 1 / sum; }
};

}  // namespace pascalvl
