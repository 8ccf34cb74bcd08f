// Decode: one new token a sequence, attention over its cache by split-KV, and the merge of the splits.
//
// A block takes one split of one kv head's past and serves all query heads of the group, so that each byte of the cache
// is read once. A warp takes tiles of 32 keys (16 in half, 8 in FP32); a row of K lies in row_bytes / 16 lanes, one of
// V in as many lanes as leave 32 accumulators in each. Quantised keys meet queries quantised to int8 (one scale a head)
// with DP4A; their scale multiplies the score, that of the values the probability. Scores are summed over lanes by
// halving: each exchange also halves how many a lane keeps, so that in the end each lane has its own few, does their
// softmax, and shows the probabilities to the warp through shared memory.
//
// Bound by DRAM, and in 4 bits as much by issue: values become floats at 2.5 instructions an element beside the 4 FFMA
// of a group. The next keys are under way from when this tile's scores are done, the next values from when its values
// are used. Two blocks an SM: tiles of 16 keys with three blocks were 5 to 10% slower on an H100.
//
// The past is cut into splits on the device, by past_length: no length passes through the host. The first split takes
// the new token too, as the cache will have it. Softmax statistics in FP32, merged at the end.
#include "plugins/kernels/kernels.h"
#include "plugins/kernels/sequences.cuh"
#include "plugins/kernels/softmax.cuh"

namespace pascalvl {

constexpr int kDim = 128;  // lanes are laid out for this; shorter rows leave some idle

PASCALVL_BOTH_SIDES constexpr int format_bits(int format) {
  return format == kFloat32 ? 32 : format == kFloat16 ? 16 : format == kInt8 ? 8 : 4;
}

// How rows of a format lie in a warp: `kLanes` lanes hold one row, each `kElements` elements of it.
template <int kFormat, int kLeastLanes>
struct RowLanes {
  static constexpr int kWhole = kDim * format_bits(kFormat) / 128;  // with 16 bytes a lane
  static constexpr int kLanes = kWhole > kLeastLanes ? kWhole : kLeastLanes;
  static constexpr int kElements = kDim / kLanes;
  static constexpr int kBytes = kElements * format_bits(kFormat) / 8;
  static constexpr int kWords = kBytes / 4;
  static constexpr int kAtOnce = kWarp / kLanes;  // rows a warp loads at once
  static_assert(kBytes >= 4 && kBytes <= 16 && kLanes <= kWarp, "4, 8 or 16 bytes a lane");
};

// Reads kWords words, aligned to their size.
template <int kWords>
__device__ __forceinline__ void load_words(const unsigned char* from, unsigned* words) {
  if (kWords == 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from);
    words[0] = x.x, words[1 % kWords] = x.y, words[2 % kWords] = x.z, words[3 % kWords] = x.w;
  } else if (kWords == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    words[0] = x.x, words[1 % kWords] = x.y;
  } else {
    words[0] = *reinterpret_cast<const unsigned*>(from);
  }
}

template <int kCount>
__device__ __forceinline__ void load_floats(const float* from, float* x) {
  unsigned words[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    load_words<min2(kCount, 4)>(reinterpret_cast<const unsigned char*>(from + i), words + i);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = __int_as_float(int(words[i]));
}

__device__ __forceinline__ void unpack_bytes(unsigned word, float bias, float* elements) {
  elements[0] = byte_minus<0>(word, bias);
  elements[1] = byte_minus<1>(word, bias);
  elements[2] = byte_minus<2>(word, bias);
  elements[3] = byte_minus<3>(word, bias);
}

// Elements of a lane's words, as floats; codes without their scale.
template <int kFormat, int kWords>
__device__ __forceinline__ void unpack(const unsigned* words, float* elements) {
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if (kFormat == kFloat32) {
      elements[w] = __int_as_float(int(words[w]));
    } else if (kFormat == kFloat16) {
      const float2 pair = halves_to_floats(words[w]);
      elements[2 * w] = pair.x;
      elements[2 * w + 1] = pair.y;
    } else if (kFormat == kInt8) {
      unpack_bytes(words[w] ^ 0x80808080u, 128, elements + 4 * w);
    } else {
      unpack_bytes(words[w] & 0x0f0f0f0fu, 8, elements + 8 * w);
      unpack_bytes(words[w] >> 4 & 0x0f0f0f0fu, 8, elements + 8 * w + 4);
    }
  }
}

// Loads a lane's part of rows t, t + kAtOnce and on of a tile, of which there are `count`; the last one for those
// beyond.
template <int kTile, int kAtOnce, int kWords>
__device__ __forceinline__ void load_rows(const unsigned char* rows, int pitch, int count, int t,
                                          unsigned (*words)[kWords]) {
  if (count >= kTile) {
    const unsigned char* at = rows + t * pitch;
#pragma unroll
    for (int i = 0; i < kTile / kAtOnce; ++i, at += kAtOnce * pitch) load_words<kWords>(at, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kTile / kAtOnce; ++i) {
      load_words<kWords>(rows + min2(t + i * kAtOnce, count - 1) * pitch, words[i]);
    }
  }
}

template <bool kFirst, typename First, typename Second>
struct Choose {
  using Type = First;
};
template <typename First, typename Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// Sums each of kCount values over lanes that differ in the bits from kMask down to above kStop, halving how many a lane
// keeps while it can: the lane with the bit set keeps the upper half. In the end it has kOwn of them, from `first` on.
template <int kCount, int kMask, int kStop>
struct SumOverLanes {
  static constexpr bool kHalves = kCount > 1;
  using Rest = SumOverLanes<kHalves ? kCount / 2 : 1, kMask / 2, kStop>;
  static constexpr int kOwn = Rest::kOwn;

  static __device__ __forceinline__ int first(int lane) {
    return (kHalves && lane & kMask ? kCount / 2 : 0) + Rest::first(lane);
  }
  template <typename Value>
  static __device__ __forceinline__ void run(Value* values) {
    if (kHalves) {
      const bool upper = threadIdx.x & kMask;
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i) {
        const Value sent = upper ? values[i] : values[i + kCount / 2];
        const Value kept = upper ? values[i + kCount / 2] : values[i];
        values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kMask);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], kMask);
    }
    Rest::run(values);
  }
};
template <int kCount, int kStop>
struct SumOverLanes<kCount, kStop, kStop> {
  static constexpr int kOwn = kCount;
  static __device__ __forceinline__ int first(int) { return 0; }
  template <typename Value>
  static __device__ __forceinline__ void run(Value*) {}
};

// What a block keeps in shared memory.
template <int kGroup>
struct DecodeShared {
  float output[kDecodeWarps][kGroup][kDim];  // read and written in quads, as the queries: they come first
  float q[kGroup][kDim];
  unsigned q_codes[kGroup][kDim / 4];
  float q_scale[kGroup];
  int q_bias[kGroup];                              // takes back the 8 that is added to codes of four bits
  float new_score[kGroup];                         // of the new token
  float probability[kDecodeWarps][kWarp][kGroup];  // [warp][key of its tile][head]
  float factor[kDecodeWarps][kGroup];
  SoftmaxState state[kDecodeWarps][kGroup];
};

// A lane's four elements of a row in floats, from `d` on, or their codes, of four bits plus 8.
template <int kFormat>
__device__ __forceinline__ float4 load_quad(const unsigned char* row, int d) {
  if (kFormat == kFloat32) return *reinterpret_cast<const float4*>(row + 4 * d);
  const uint2 halves = *reinterpret_cast<const uint2*>(row + 2 * d);
  const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
  return make_float4(low.x, low.y, high.x, high.y);
}
template <int kFormat>
__device__ __forceinline__ unsigned load_codes(const unsigned char* row, int d) {
  if (kFormat == kInt8) return *reinterpret_cast<const unsigned*>(row + d);
  return *reinterpret_cast<const unsigned*>(row + d / 8 * 4) >> d % 8 & 0x0f0f0f0fu;
}

// One element; codes without their scale.
template <int kFormat>
__device__ __forceinline__ float load_element(const unsigned char* row, int d) {
  if (kFormat == kFloat32) return reinterpret_cast<const float*>(row)[d];
  if (kFormat == kFloat16) return half_to_float(reinterpret_cast<const unsigned short*>(row)[d]);
  if (kFormat == kInt8) return float(reinterpret_cast<const signed char*>(row)[d]);
  return float(row[d / 8 * 4 + d % 4] >> d % 8 / 4 * 4 & 0xf) - 8;
}

// Puts the group's queries of a token into shared memory, and the scores of that token, whose key is `new_key`. A warp
// takes a head.
template <int kGroup, int kKeyFormat>
__device__ __forceinline__ void prepare_queries(const AttentionParams& p, int token, const unsigned char* new_key,
                                                const unsigned* new_scale, DecodeShared<kGroup>& shared) {
  const int lane = threadIdx.x % kWarp, d = 4 * lane;
  const bool inside = d < p.head_dim;
  for (int g = threadIdx.x / kWarp; g < kGroup; g += kDecodeWarps) {
    const long long row = (long long)(blockIdx.y * kGroup + g) * p.tokens + token;
    if constexpr (is_quantised(kKeyFormat)) {
      const unsigned q = reinterpret_cast<const unsigned*>(p.q)[row * (kCodeRow / 4) + lane];
      const unsigned k = inside ? load_codes<kKeyFormat>(new_key, d) : 0;
      const float scale = p.q_scale[row];
      const int bias = kKeyFormat == kInt4 ? warp_sum(__dp4a(int(q), int(0xf8f8f8f8u), 0)) : 0;
      const int dot = warp_sum(__dp4a(int(k), int(q), 0)) + bias;
      shared.q_codes[g][lane] = q;
      if (lane == 0) {
        shared.q_scale[g] = scale;
        shared.q_bias[g] = bias;
        shared.new_score[g] = float(dot) * (p.scale_log2 * scale * half_to_float(*new_scale & 0xffff));
      }
    } else {
      float4 q = make_float4(0, 0, 0, 0), k = q;
      if (inside) {
        q = load_quad<kFloat32>(p.q + row * p.head_dim * sizeof(float), d);
        k = load_quad<kKeyFormat>(new_key, d);
      }
      const float dot = warp_sum(q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w);
      *reinterpret_cast<float4*>(&shared.q[g][d]) = q;
      if (lane == 0) shared.new_score[g] = dot * p.scale_log2;
    }
  }
}

template <int kGroup, int kKeyFormat, int kValueFormat>
__device__ __forceinline__ void decode(const AttentionParams& p, DecodeShared<kGroup>& shared) {
  using Keys = RowLanes<kKeyFormat, kGroup>;          // the scores a lane ends with are of one head
  using Values = RowLanes<kValueFormat, 2 * kGroup>;  // at most 64 accumulators
  // Keys a warp takes at once: as many as registers hold, for bytes under way and against what a tile costs.
  constexpr int kMost = kKeyFormat == kFloat32 ? 8 : kKeyFormat == kFloat16 ? 16 : 32;
  constexpr int kTile = kGroup == 8 && kKeyFormat != kFloat32 ? kMost / 2 : kMost;
  constexpr int kKeyLoads = kTile / Keys::kAtOnce, kValueLoads = kTile / Values::kAtOnce;
  constexpr int kScores = kGroup * kKeyLoads;  // of a lane before the sum over lanes: [group][load]
  using SumScores = SumOverLanes<kScores, Keys::kLanes / 2, 0>;
  constexpr int kOwn = SumScores::kOwn;  // after it
  constexpr int kOutputs = kGroup * Values::kElements;
  using SumOutputs = SumOverLanes<kOutputs, kWarp / 2, Values::kLanes / 2>;
  constexpr bool kCodes = is_quantised(kKeyFormat);
  using Score = typename Choose<kCodes, int, float>::Type;
  constexpr int kLanesOfHead = Keys::kLanes / kGroup;  // lanes of a row that end with scores of the same head
  constexpr int kCopies = Keys::kLanes > kScores ? Keys::kLanes / kScores : 1;  // of them, with the very same scores
  static_assert(kOwn <= kKeyLoads, "a lane's scores are of one head");
  static_assert(SumOutputs::kOwn % 4 == 0, "outputs go in quads");

  const int head = blockIdx.y, sequence = blockIdx.z;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int past = past_of(p, sequence);  // on its way with the bounds
  const Tokens tokens = tokens_of(p.cu_seqlens, sequence, p.tokens);
  const bool is_step = p.tokens <= p.batch;  // of one token each; else sequences of more are prefill's
  if (tokens.length < 1 || (tokens.length > 1 && !is_step)) return;
  const int state_row = is_step ? tokens.begin : sequence;  // where the merge need not ask whose a token is
  float* partial = p.partial + (((long long)state_row * p.num_heads + head * kGroup) * p.splits + blockIdx.x) *
                                   partial_pitch(p.value_dim);
  const long long partial_stride = (long long)p.splits * partial_pitch(p.value_dim);  // between heads
  auto state_at = [&](int g) { return reinterpret_cast<SoftmaxState*>(partial + g * partial_stride + p.value_dim); };

  // This block's keys lie in slots begin to end.
  const int share = decode_share(past, p.splits);
  const int begin = blockIdx.x * share, end = min2(begin + share, past);
  const bool has_new = blockIdx.x == 0;
  if (begin >= end && !has_new) {
    if (threadIdx.x < kGroup) *state_at(threadIdx.x) = SoftmaxState::init();
    return;
  }

  // After the sum over lanes, this lane has scores number own .. own + kOwn - 1 of [group][load], of the key that its
  // row of lanes loads. The higher a bit of its number, the earlier the halves it has told apart: first the head.
  const int own = SumScores::first(lane);
  const int own_head = own / kKeyLoads, own_load = own % kKeyLoads;

  // Tiles are loaded ahead: keys once the last ones' scores are done, values once the last ones are used.
  const int key_lane = lane % Keys::kLanes, value_lane = lane % Values::kLanes;
  const int key_row = row_bytes(kKeyFormat, p.head_dim), value_row = row_bytes(kValueFormat, p.value_dim);
  // Lanes beyond a row read its end: their queries are zero, and their output is not written.
  const int key_byte = min2(key_lane * Keys::kBytes, key_row - Keys::kBytes);
  const int value_byte = min2(value_lane * Values::kBytes, value_row - Values::kBytes);
  unsigned key_words[kKeyLoads][Keys::kWords], value_words[kValueLoads][Values::kWords];
  unsigned scale_words[kOwn];
  auto own_key = [&](int i) { return (own_load + i) * Keys::kAtOnce + lane / Keys::kLanes; };  // of the tile's
  // A tile lies within a page: its rows follow each other, from number `row` of the pool on.
  auto load_keys = [&](int row, int count) {
    load_rows<kTile, Keys::kAtOnce>(p.pool.key + (long long)row * key_row + key_byte, key_row, count,
                                    lane / Keys::kLanes, key_words);
    if (!kCodes) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) scale_words[i] = p.pool.scale[row + min2(own_key(i), count - 1)];
  };
  auto load_values = [&](int row, int count) {
    load_rows<kTile, Values::kAtOnce>(p.pool.value + (long long)row * value_row + value_byte, value_row, count,
                                      lane / Values::kLanes, value_words);
  };
  int first = begin + warp * kTile;
  if (first < end) {
    const int row = slot_row(p, sequence, head, first);
    load_keys(row, end - first);
    load_values(row, end - first);
  }
  const long long added = (long long)head * p.tokens + tokens.begin;
  const unsigned* new_scale = kCodes ? p.added.scale + added : nullptr;
  prepare_queries<kGroup, kKeyFormat>(p, tokens.begin, p.added.key + added * key_row, new_scale, shared);
  __syncthreads();

  // This lane's part of the queries.
  const int key_d = key_lane * Keys::kElements;
  float q[kGroup][kCodes ? 1 : Keys::kElements];
  int q_codes[kGroup][kCodes ? Keys::kElements / 4 : 1];
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    if (kCodes) {
#pragma unroll
      for (int i = 0; i < Keys::kElements / 4; ++i) {
        q_codes[g][i % (kCodes ? Keys::kElements / 4 : 1)] = int(shared.q_codes[g][key_d / 4 + i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < Keys::kElements; ++i) q[g][i % (kCodes ? 1 : Keys::kElements)] = shared.q[g][key_d + i];
    }
  }

  const bool tells = lane < Keys::kLanes && lane % kLanesOfHead == 0;  // what its head has in common
  const float own_scale = p.scale_log2 * (kCodes ? shared.q_scale[own_head] : 1.0f);
  const Score own_bias = kKeyFormat == kInt4 ? Score(shared.q_bias[own_head]) : Score(0);

  SoftmaxState state = SoftmaxState::init();  // of own_head, the sum of this lane's keys alone
  float output[kOutputs];                     // [group][element]
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) output[i] = 0;

  for (; first < end; first += kDecodeWarps * kTile) {
    const int next = first + kDecodeWarps * kTile;
    const int next_row = next < end ? slot_row(p, sequence, head, next) : 0;
    Score dots[kScores];
#pragma unroll
    for (int i = 0; i < kKeyLoads; ++i) {
      if (kCodes) {
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          int dot = 0;
#pragma unroll
          for (int w = 0; w < Keys::kWords; ++w) {
            if (kKeyFormat == kInt8) {
              dot = __dp4a(int(key_words[i][w]), q_codes[g][w], dot);
            } else {
              dot = __dp4a(int(key_words[i][w] & 0x0f0f0f0fu), q_codes[g][2 * w], dot);
              dot = __dp4a(int(key_words[i][w] >> 4 & 0x0f0f0f0fu), q_codes[g][2 * w + 1], dot);
            }
          }
          dots[g * kKeyLoads + i] = Score(dot);
        }
      } else {
        float k[Keys::kElements];
        unpack<kKeyFormat, Keys::kWords>(key_words[i], k);
#pragma unroll
        for (int g = 0; g < kGroup; ++g) {
          float dot = 0;
#pragma unroll
          for (int j = 0; j < Keys::kElements; ++j) dot += q[g][j % (kCodes ? 1 : Keys::kElements)] * k[j];
          dots[g * kKeyLoads + i] = Score(dot);
        }
      }
    }
    float scales[kOwn];
    unsigned value_scale[kOwn];  // halves
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      scales[i] = kCodes ? own_scale * half_to_float(scale_words[i] & 0xffff) : own_scale;
      value_scale[i] = kCodes ? scale_words[i] >> 16 : 0;
    }
    if (next < end) load_keys(next_row, end - next);
    SumScores::run(dots);

    // Softmax of the scores that this lane has: the maximum over all lanes that have scores of the same head.
    float score[kOwn], most = state.maximum;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      score[i] = first + own_key(i) < end ? float(dots[i] + own_bias) * scales[i] : kMasked;
      most = max2(most, score[i]);
    }
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
      if (mask < kLanesOfHead || mask >= Keys::kLanes) most = max2(most, __shfl_xor_sync(kAllLanes, most, mask));
    }
    const bool rises = __any_sync(kAllLanes, most > state.maximum);
    const float factor = state.raise(most);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float probability = state.take(score[i]);
      if (kCodes) probability *= half_to_float(value_scale[i]);
      if (lane % kCopies == 0) shared.probability[warp][own_key(i)][own_head] = probability;
    }
    if (tells) shared.factor[warp][own_head] = factor;
    __syncwarp();
    if (rises) {
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const float head_factor = shared.factor[warp][g];
#pragma unroll
        for (int i = 0; i < Values::kElements; ++i) output[g * Values::kElements + i] *= head_factor;
      }
    }
#pragma unroll
    for (int i = 0; i < kValueLoads; ++i) {
      float v[Values::kElements];
      unpack<kValueFormat, Values::kWords>(value_words[i], v);
      float probabilities[kGroup];
      load_floats<kGroup>(shared.probability[warp][i * Values::kAtOnce + lane / Values::kLanes], probabilities);
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const float probability = probabilities[g];
#pragma unroll
        for (int j = 0; j < Values::kElements; ++j) output[g * Values::kElements + j] += probability * v[j];
      }
    }
    if (next < end) load_values(next_row, end - next);
    __syncwarp();
  }

  // The warp's state: sums over the lanes that have different keys of a head, output over rows of lanes.
#pragma unroll
  for (int mask = 1; mask < kWarp; mask *= 2) {
    if ((mask >= kCopies && mask < kLanesOfHead) || mask >= Keys::kLanes) {
      state.sum += __shfl_xor_sync(kAllLanes, state.sum, mask);
    }
  }
  if (tells) shared.state[warp][own_head] = state;
  SumOutputs::run(output);
  const int own_output = SumOutputs::first(lane);
#pragma unroll
  for (int i = 0; i < SumOutputs::kOwn; i += 4) {
    const int g = (own_output + i) / Values::kElements, element = (own_output + i) % Values::kElements;
    *reinterpret_cast<float4*>(&shared.output[warp][g][value_lane * Values::kElements + element]) =
        make_float4(output[i], output[i + 1], output[i + 2], output[i + 3]);
  }
  __syncthreads();

  // The block's state: the warps', and the new token's.
  const int d = threadIdx.x;
  float new_value = 0;
  if (has_new && d < p.value_dim) {
    new_value = load_element<kValueFormat>(p.added.value + added * value_row, d);
    if (kCodes) new_value *= half_to_float(*new_scale >> 16);
  }
#pragma unroll
  for (int g = 0; g < kGroup; ++g) {
    float most = has_new ? shared.new_score[g] : kLowest;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most = max2(most, shared.state[w][g].maximum);
    SoftmaxState all = SoftmaxState::init(most);
    float value = has_new ? all.take(shared.new_score[g]) * new_value : 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) value += all.merge(shared.state[w][g]) * shared.output[w][g][d];
    if (d < p.value_dim) partial[g * partial_stride + d] = value;
    if (d == 0) *state_at(g) = all;
  }
}

// Merges the splits of a query: the warps share them, a lane has 4 channels. Grid: (tokens, query heads).
extern "C" __global__ void __launch_bounds__(kMergeThreads) merge_splits(const MergeParams p) {
  constexpr int kWarps = kMergeThreads / kWarp, kAtOnce = 5;  // splits whose loads are under way
  __shared__ SoftmaxState states[kWarps];
  __shared__ float4 values[kWarps][kWarp];
  const int token = blockIdx.x, head = blockIdx.y;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, d = min2(4 * lane, p.value_dim - 4);
  const int pitch = partial_pitch(p.value_dim);
  const bool is_step = p.decoded && p.tokens <= p.batch;  // all of it decode's
  // Padding becomes zeros: in a step in the end, when nothing waits for the bounds any more; else prefill has done it.
  const int sequence = is_step ? 0 : sequence_of(p.cu_seqlens, p.batch, token);
  const int end = is_step ? p.cu_seqlens[p.batch] : 0;
  if (sequence == p.batch) return;
  const bool is_decoded = is_step || (p.decoded && tokens_of(p.cu_seqlens, sequence, p.tokens).length == 1);
  if (!is_decoded && !p.prefilled) return;  // it wrote them itself
  const int splits = is_decoded ? p.decode_splits : p.prefill_splits;
  const float* partial =
      is_decoded ? p.decoded + ((long long)(is_step ? token : sequence) * p.num_heads + head) * splits * pitch
                 : p.prefilled + ((long long)head * p.tokens + token) * splits * pitch;
  SoftmaxState state = SoftmaxState::init();
  float4 value = make_float4(0, 0, 0, 0);
  auto add = [&](const SoftmaxState& more_state, float4 more) {
    if (more_state.maximum == kLowest) return;  // no values are there, either
    const float factor = state.merge(more_state);
    value.x += factor * more.x, value.y += factor * more.y, value.z += factor * more.z, value.w += factor * more.w;
  };
  for (int first = warp; first < splits; first += kWarps * kAtOnce) {
    SoftmaxState more_state[kAtOnce];
    float4 more[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = first + i * kWarps;
      const float* at = partial + min2(split, splits - 1) * pitch;
      more_state[i] = *reinterpret_cast<const SoftmaxState*>(at + p.value_dim);
      more[i] = *reinterpret_cast<const float4*>(at + d);
      if (split >= splits) more_state[i].maximum = kLowest;
    }
    float most = state.maximum;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) most = max2(most, more_state[i].maximum);
    const float factor = state.raise(most);
    value.x *= factor, value.y *= factor, value.z *= factor, value.w *= factor;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) add(more_state[i], more[i]);
  }
  values[warp][lane] = value;
  if (lane == 0) states[warp] = state;
  __syncthreads();
  if (warp > 0 || 4 * lane >= p.value_dim) return;
  float most = kLowest;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) most = max2(most, states[i].maximum);
  state = SoftmaxState::init(most), value = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kWarps; ++i) add(states[i], values[i][lane]);
  const float inverse = state.normalise();
  const bool is_padding = is_step && token >= end;
  *reinterpret_cast<float4*>(p.out + ((long long)token * p.num_heads + head) * p.value_dim + d) =
      is_padding ? make_float4(0, 0, 0, 0)
                 : make_float4(value.x * inverse, value.y * inverse, value.z * inverse, value.w * inverse);
}

#define DECODE(GROUP, KEY, VALUE)                                        \
  extern "C" __global__ void __launch_bounds__(kDecodeThreads, 2)        \
      PASCALVL_DECODE_NAME(GROUP, KEY, VALUE)(const AttentionParams p) { \
    __shared__ __align__(16) DecodeShared<GROUP> shared;                 \
    decode<GROUP, KEY, VALUE>(p, shared);                                \
  }
PASCALVL_DECODE(DECODE)

}  // namespace pascalvl
