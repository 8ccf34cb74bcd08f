// FlashAttention-2 (Dao, arXiv:2307.08691): prefill over a cache, and packed sequences without one.
//
// A block of 128 threads owns 64 query rows and walks over tiles of 128 keys (where values have up to 72 channels: 128
// rows, 64 keys). For text the rows are 64 / group tokens times the query heads of one kv head, so that K and V are
// read once for all of them. A thread owns 8 rows: 8 x 8 of the scores and 8 x 8 of the output, in registers; the 16
// (8) threads that share rows are of one warp, so the softmax needs shuffles only. Per word of K and Q, and per key, a
// thread does 64 FFMA for 4 shared loads of 16 bytes: 4 a word, which is what SM61's shared memory can feed. Where
// there are no more than 32 rows, a thread owns 4: half the FFMA, for 3 shared loads.
//
// Q K^T is in FP32 where keys are floats; where they are int8 or int4, queries are int8 too, four channels make a word,
// and a DP4A takes the place of four FFMA. P V is in FP32 always.
//
// Shared memory, 46 KB: slices of 8 words of Q and K (or 8 keys of V), two in turn, Q and K transposed; and the
// probabilities, swizzled. Q does not stay: keeping it would cost 32 KB, reading it again comes from L2. The next slice
// is on its way, in registers and in its own format, while this one is used. Two blocks an SM. Bound by FFMA issue.
#pragma once

#include "plugins/kernels/softmax.cuh"

namespace pascalvl {

constexpr int kKeysPerThread = 8;  // of a tile, in each row
constexpr int kSlice = 8;          // words of Q and K, or keys of V, in shared memory at a time
constexpr int kQuadsPerRow = kSlice / 4;
constexpr int kRowsAtOnce = kPrefillThreads / kQuadsPerRow;  // of a slice of Q or K, loaded by the block

// Where a tile's keys come from: rows of one kv head, from some row on.
struct Source {
  const unsigned char* k;
  const unsigned char* v;
  const unsigned* scale;  // of codes
  int k_row;              // bytes
  int v_row;
};

// What lies in global memory and does not change: the compiler cannot tell of pointers that come from shared memory.
template <typename T>
__device__ __forceinline__ T load_global(const unsigned char* from) {
  return __ldg(reinterpret_cast<const T*>(from));
}

// Four words of a key: four channels in FP32, or sixteen as int8 codes. `Raw` is how they come from memory.
template <int kFormat>
struct KeyQuad {
  using Word = float;
  using Quad = float4;
  using Raw = float4;
  static __device__ __forceinline__ Quad convert(Raw raw) { return raw; }
};
template <>
struct KeyQuad<kFloat16> {
  using Word = float;
  using Quad = float4;
  using Raw = uint2;
  static __device__ __forceinline__ Quad convert(Raw raw) {
    const float2 low = halves_to_floats(raw.x), high = halves_to_floats(raw.y);
    return make_float4(low.x, low.y, high.x, high.y);
  }
};
template <>
struct KeyQuad<kInt8> {
  using Word = int;
  using Quad = int4;
  using Raw = int4;
  static __device__ __forceinline__ Quad convert(Raw raw) { return raw; }
};
template <>
struct KeyQuad<kInt4> {
  using Word = int;
  using Quad = int4;
  using Raw = uint2;
  static __device__ __forceinline__ Quad convert(Raw raw) {
    return make_int4(codes(raw.x), codes(raw.x >> 4), codes(raw.y), codes(raw.y >> 4));
  }
  static __device__ __forceinline__ int codes(unsigned biased) {  // four nibbles, plus 8, to int8: no borrow crosses
    return int((((biased & 0x0f0f0f0fu) | 0x80808080u) - 0x08080808u) ^ 0x80808080u);
  }
};

// Channels of a value from d on, kQuads times four; codes without their scale. Nothing is done with what was loaded
// before `convert`: that would wait for it.
template <int kFormat>
struct ValueQuads {
  static constexpr int kQuads = 1;
  using Raw = float4;
  static __device__ __forceinline__ Raw load(const unsigned char* row, int d) {
    return load_global<float4>(row + 4 * d);
  }
  static __device__ __forceinline__ float4 convert(Raw raw, int) { return raw; }
};
template <>
struct ValueQuads<kFloat16> {
  static constexpr int kQuads = 1;
  using Raw = uint2;
  static __device__ __forceinline__ Raw load(const unsigned char* row, int d) {
    return load_global<uint2>(row + 2 * d);
  }
  static __device__ __forceinline__ float4 convert(Raw raw, int) { return KeyQuad<kFloat16>::convert(raw); }
};
__device__ __forceinline__ float4 bytes_minus(unsigned word, float bias) {
  return make_float4(byte_minus<0>(word, bias), byte_minus<1>(word, bias), byte_minus<2>(word, bias),
                     byte_minus<3>(word, bias));
}
template <>
struct ValueQuads<kInt8> {
  static constexpr int kQuads = 1;
  using Raw = unsigned;
  static __device__ __forceinline__ Raw load(const unsigned char* row, int d) { return load_global<unsigned>(row + d); }
  static __device__ __forceinline__ float4 convert(Raw raw, int) { return bytes_minus(raw ^ 0x80808080u, 128); }
};
template <>
struct ValueQuads<kInt4> {
  static constexpr int kQuads = 2;
  using Raw = unsigned;
  static __device__ __forceinline__ Raw load(const unsigned char* row, int d) {
    return load_global<unsigned>(row + d / 2);
  }
  static __device__ __forceinline__ float4 convert(Raw raw, int quad) {
    return bytes_minus(raw >> 4 * quad & 0x0f0f0f0fu, 8);
  }
};

// Adds the products of a word of Q with four of K, or of a probability with four channels of V.
__device__ __forceinline__ void multiply_add(float* sum, float a, float4 b) {
  sum[0] += a * b.x;
  sum[1] += a * b.y;
  sum[2] += a * b.z;
  sum[3] += a * b.w;
}
__device__ __forceinline__ void multiply_add(int* sum, int a, int4 b) {
  sum[0] = __dp4a(a, b.x, sum[0]);
  sum[1] = __dp4a(a, b.y, sum[1]);
  sum[2] = __dp4a(a, b.z, sum[2]);
  sum[3] = __dp4a(a, b.w, sum[3]);
}

// The same for a thread's rows, four in a quad: accumulators `at` and on of each.
template <int kQuads, typename Word, int kWidth, typename Quad>
__device__ __forceinline__ void multiply_rows(Word (*sums)[kWidth], int at, const Quad (&rows)[kQuads], Quad columns) {
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    multiply_add(&sums[4 * i][at], rows[i].x, columns);
    multiply_add(&sums[4 * i + 1][at], rows[i].y, columns);
    multiply_add(&sums[4 * i + 2][at], rows[i].z, columns);
    multiply_add(&sums[4 * i + 3][at], rows[i].w, columns);
  }
}

// Integers below 2^22 in size are exact in the lowest bits of this float; taking it away is faster than a conversion.
constexpr int kZeroBits = 0x4b400000;
__device__ __forceinline__ float to_float(int sum) { return __int_as_float(sum) - 12582912.0f; }
__device__ __forceinline__ float to_float(float sum) { return sum; }

// What the rest of this file needs to know of a head size, and the rows of a thread: 8, or 4 for few rows.
template <int kValueDim, int kThreadRows = 8>
struct Tile {
  static constexpr int kRowsPerThread = kThreadRows, kRowQuads = kRowsPerThread / 4;
  static constexpr int kColumnThreads = kValueDim > 72 ? 16 : 8;  // that share rows
  static constexpr int kRows = kPrefillThreads / kColumnThreads * kRowsPerThread;
  static constexpr int kKeys = kColumnThreads * kKeysPerThread;
  static_assert(kRows == (kThreadRows == 8 ? prefill_rows(kValueDim) : kShortRows) && kKeys == prefill_keys(kValueDim),
                "as the host counts them");
  static constexpr int kHalf = kKeys / 2;    // a thread scores keys 4 * column and on, and as many a half further on
  static constexpr int kQPitch = kRows + 4;  // words between those of a row: no bank conflicts when a slice is stored
  static constexpr int kKPitch = kKeys + 4;
  static constexpr int kQLoads = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;  // quads of a slice, of a thread
  static constexpr int kKLoads = kKeys / kRowsAtOnce;
  static constexpr int kValueHalf = 4 * kColumnThreads;  // a thread has 4 channels in each half of the output ...
  static constexpr int kRest = kValueDim == 72 ? 1 : 0;  // ... and of 72 one more
  static constexpr int kOutputs = 8 + kRest;
  static constexpr int kValuePitch = 2 * kValueHalf + 8 * kRest;
  static constexpr int kValueQuads = kSlice * kValuePitch / 4;  // in a slice of V
  static constexpr int kScoreWords = kSlice * (kQPitch + kKPitch), kOutputWords = kSlice * kValuePitch;
  static constexpr int kSliceWords = kScoreWords > kOutputWords ? kScoreWords : kOutputWords;
  static_assert((kRows % kRowsAtOnce == 0 || kRows < kRowsAtOnce) && kKeys % kRowsAtOnce == 0,
                "the threads cover a slice");
};

// What a block keeps in shared memory. What the compiler finds there it does not keep in registers across barriers.
template <typename T>
struct PrefillShared {
  float slices[2][T::kSliceWords];
  float probability[T::kKeys * T::kRows];  // [key][row], see probability_at
  Source sources[2];                       // the pool and the new keys
  int token[T::kRows];                     // of each query, its number among the new ones
  float q_scale[T::kRows];                 // of quantised queries, times scale_log2
  float k_scale[T::kKeys];                 // of a tile's codes
  float v_scale[T::kKeys];
};

template <typename T>
struct Prefill {
  static constexpr int kRowsPerThread = T::kRowsPerThread, kRowQuads = T::kRowQuads;
  using Shared = PrefillShared<T>;

  SoftmaxState state[kRowsPerThread];  // of the thread's rows, the sum over this thread's keys alone
  float output[kRowsPerThread][T::kOutputs];

  // Query rows: row r of the block is token (first_row + r) / p.group, query head (first_row + r) % group of the kv
  // head. q_row: where those that this thread loads lie among the kv head's.
  int q_row[T::kQLoads];
  int first_row, rows;
  int column, row0;  // this thread's place

  __device__ __forceinline__ void begin(const AttentionParams& p, int first, int number, int head_stride) {
    first_row = first, rows = number;
    column = threadIdx.x % T::kColumnThreads, row0 = threadIdx.x / T::kColumnThreads * kRowsPerThread;
#pragma unroll
    for (int i = 0; i < T::kQLoads; ++i) {
      const int r = min2(first + int(threadIdx.x) / kQuadsPerRow + i * kRowsAtOnce, rows - 1);
      q_row[i] = r % p.group * head_stride + r / p.group;
    }
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      state[i] = SoftmaxState::init();
#pragma unroll
      for (int j = 0; j < T::kOutputs; ++j) output[i][j] = 0;
    }
  }

  // Takes `slices` slices through two buffers in turn, so that one barrier a slice is enough: `fetch(s)` loads slice s
  // into registers (the caller has done so with slice 0), put(buffer) stores them, use(s, buffer) uses it.
  template <typename Fetch, typename Put, typename Use>
  static __device__ __forceinline__ void stream(int slices, Shared& shared, Fetch fetch, Put put, Use use) {
    float* buffer = shared.slices[0];
    int other = T::kSliceWords;
    __syncthreads();  // all have done what was there before
    put(buffer);
    __syncthreads();
    for (int s = 0;; ++s) {
      const bool more = s + 1 < slices;
      if (more) fetch(s + 1);
      use(s, buffer);
      if (!more) return;
      buffer += other, other = -other;
      put(buffer);
      __syncthreads();
    }
  }

  // Q K^T of a tile, scaled; `first` is the row of its first key, `count` how many it has.
  template <int kFormat>
  __device__ __forceinline__ void scores(const AttentionParams& p, const unsigned char* q, const Source& source,
                                         int first, int count, Shared& shared, float (*score)[kKeysPerThread]) {
    using Keys = KeyQuad<kFormat>;
    using Word = typename Keys::Word;
    using Quad = typename Keys::Quad;
    using Raw = typename Keys::Raw;
    constexpr bool kCodes = is_quantised(kFormat);
    constexpr int kRawWord = sizeof(Raw) / 4;  // bytes of a word in memory
    const int load_row = threadIdx.x / kQuadsPerRow, load_word = threadIdx.x % kQuadsPerRow * 4;
    const int words = kCodes ? p.head_dim / 4 : p.head_dim;

    const unsigned char *q_at[T::kQLoads], *k_at[T::kKLoads];
#pragma unroll
    for (int i = 0; i < T::kQLoads; ++i) {
      q_at[i] = q + (long long)q_row[i] * (kCodes ? kCodeRow : 4 * p.head_dim) + 4 * load_word;
    }
#pragma unroll
    for (int i = 0; i < T::kKLoads; ++i) {
      const int row = first + min2(load_row + i * kRowsAtOnce, count - 1);
      k_at[i] = source.k + (long long)row * source.k_row + (kCodes ? 0 : kRawWord * load_word);
    }
    Quad next_q[T::kQLoads];
    Raw next_k[T::kKLoads];
    auto fetch = [&](int s) {
#pragma unroll
      for (int i = 0; i < T::kQLoads; ++i) next_q[i] = load_global<Quad>(q_at[i] + 4 * kSlice * s);
#pragma unroll
      for (int i = 0; i < T::kKLoads; ++i) {
        // Beyond the row, where the slices' words are more than it has, queries are zero.
        const int word = kCodes ? min2(kSlice * s + load_word, words - 4) : kSlice * s;
        next_k[i] = load_global<Raw>(k_at[i] + kRawWord * word);
      }
    };
    auto transpose = [](Word* at, int pitch, Quad x) {
      at[0] = x.x, at[pitch] = x.y, at[2 * pitch] = x.z, at[3 * pitch] = x.w;
    };
    auto put = [&](float* buffer) {
      Word* at = reinterpret_cast<Word*>(buffer);
#pragma unroll
      for (int i = 0; i < T::kQLoads; ++i) {
        if (T::kRows < kRowsAtOnce && load_row >= T::kRows) break;
        transpose(at + load_word * T::kQPitch + load_row + i * kRowsAtOnce, T::kQPitch, next_q[i]);
      }
      at += kSlice * T::kQPitch;
#pragma unroll
      for (int i = 0; i < T::kKLoads; ++i) {
        transpose(at + load_word * T::kKPitch + load_row + i * kRowsAtOnce, T::kKPitch, Keys::convert(next_k[i]));
      }
    };
    Word sums[kRowsPerThread][kKeysPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) sums[i][j] = kCodes ? Word(kZeroBits) : Word(0);
    }
    auto use = [&](int, const float* buffer) {
      const Word* q_slice = reinterpret_cast<const Word*>(buffer) + row0;
      const Word* k_slice = reinterpret_cast<const Word*>(buffer) + kSlice * T::kQPitch + 4 * column;
#pragma unroll
      for (int c = 0; c < kSlice; ++c) {
        Quad rows[kRowQuads];
#pragma unroll
        for (int i = 0; i < kRowQuads; ++i) rows[i] = *reinterpret_cast<const Quad*>(q_slice + c * T::kQPitch + 4 * i);
        multiply_rows(sums, 0, rows, *reinterpret_cast<const Quad*>(k_slice + c * T::kKPitch));
        multiply_rows(sums, 4, rows, *reinterpret_cast<const Quad*>(k_slice + c * T::kKPitch + T::kHalf));
      }
    };
    fetch(0);
    if (kCodes && threadIdx.x < T::kKeys) {
      const int key = first + min2(threadIdx.x, count - 1);
      const float2 scales = halves_to_floats(__ldg(source.scale + key));
      shared.k_scale[threadIdx.x] = scales.x;
      shared.v_scale[threadIdx.x] = scales.y;
    }
    stream(ceil_div(words, kSlice), shared, fetch, put, use);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const float scale = kCodes ? shared.q_scale[row0 + i] : p.scale_log2;
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) {
        score[i][j] = to_float(sums[i][j]) * scale;
        if (kCodes) score[i][j] *= shared.k_scale[key_of(j)];
      }
    }
  }

  // Of a tile, the key that the thread's score number j is of.
  __device__ __forceinline__ int key_of(int j) const { return j / 4 * T::kHalf + 4 * column + j % 4; }

  // A probability's place: rows in quads that move with the key, so that neither side meets bank conflicts.
  static __device__ __forceinline__ int probability_at(int key, int row_quad) {
    return key * T::kRows + 4 * (row_quad ^ (key / 4 & 7));
  }

  // Scores to probabilities, into shared memory (where values are codes, times their scale), and what is there already
  // scaled down to the rows' new maximum. Who reads them is in the same warp.
  template <bool kScaled>
  __device__ __forceinline__ void softmax(float (*score)[kKeysPerThread], Shared& shared) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      float most = state[i].maximum;
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) most = max2(most, score[i][j]);
#pragma unroll
      for (int mask = T::kColumnThreads / 2; mask > 0; mask /= 2) {
        most = max2(most, __shfl_xor_sync(kAllLanes, most, mask));
      }
      const float factor = state[i].raise(most);
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) score[i][j] = state[i].take(score[i][j]);
#pragma unroll
      for (int j = 0; j < T::kOutputs; ++j) output[i][j] *= factor;
    }
#pragma unroll
    for (int j = 0; j < kKeysPerThread; ++j) {
      const float scale = kScaled ? shared.v_scale[key_of(j)] : 1;
#pragma unroll
      for (int h = 0; h < kRowQuads; ++h) {
        *reinterpret_cast<float4*>(&shared.probability[probability_at(key_of(j), row0 / 4 + h)]) =
            make_float4(scale * score[4 * h][j], scale * score[4 * h + 1][j], scale * score[4 * h + 2][j],
                        scale * score[4 * h + 3][j]);
      }
    }
  }

  // One tile: `count` keys, whose rows follow each other in a source, from number start() on. Where
  // `masked`, as a tile that is not full must be, `sees(key)(row)` tells whether a row sees one of them.
  template <int kKeyFormat, int kValueFormat, typename Start, typename Sees>
  __device__ __forceinline__ void tile(const AttentionParams& p, const unsigned char* q, const Source& source,
                                       Start start, int count, bool masked, Shared& shared, Sees sees) {
    float score[kRowsPerThread][kKeysPerThread];
    scores<kKeyFormat>(p, q, source, start(), count, shared, score);

    using Values = ValueQuads<kValueFormat>;
    constexpr int kLoads = T::kValueQuads / Values::kQuads;  // of the block, in a slice
    constexpr int kOwnLoads = (kLoads + kPrefillThreads - 1) / kPrefillThreads;
    constexpr int kLoadsOfRow = T::kValuePitch / 4 / Values::kQuads, kChannels = 4 * Values::kQuads;
    typename Values::Raw next_v[kOwnLoads];
    const int first = start();  // again: it was not kept in a register
    auto fetch = [&](int s) {
#pragma unroll
      for (int i = 0; i < kOwnLoads; ++i) {
        const int load = threadIdx.x + i * kPrefillThreads;
        if (kLoads % kPrefillThreads && load >= kLoads) continue;
        const int key = first + min2(kSlice * s + load / kLoadsOfRow, count - 1);
        const int channel = min2(load % kLoadsOfRow * kChannels, p.value_dim - kChannels);
        next_v[i] = Values::load(source.v + (long long)key * source.v_row, channel);
      }
    };
    auto put = [&](float* buffer) {
#pragma unroll
      for (int i = 0; i < kOwnLoads; ++i) {
        const int load = threadIdx.x + i * kPrefillThreads;
        if (kLoads % kPrefillThreads && load >= kLoads) continue;
#pragma unroll
        for (int h = 0; h < Values::kQuads; ++h) {
          *reinterpret_cast<float4*>(buffer + load * kChannels + 4 * h) = Values::convert(next_v[i], h);
        }
      }
    };
    auto use = [&](int s, const float* buffer) {
      const float* values = buffer + 4 * column;
#pragma unroll
      for (int h = 0; h < kSlice / 4; ++h) {
        const float* quads[kRowQuads];
#pragma unroll
        for (int i = 0; i < kRowQuads; ++i) {
          quads[i] = shared.probability + probability_at(kSlice * s + 4 * h, row0 / 4 + i);
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float4 rows[kRowQuads];
#pragma unroll
          for (int i = 0; i < kRowQuads; ++i) rows[i] = *reinterpret_cast<const float4*>(quads[i] + c * T::kRows);
          const float* at = values + (4 * h + c) * T::kValuePitch;
          multiply_rows(output, 0, rows, *reinterpret_cast<const float4*>(at));
          multiply_rows(output, 4, rows, *reinterpret_cast<const float4*>(at + T::kValueHalf));
          if (T::kRest) {
            const float v = buffer[(4 * h + c) * T::kValuePitch + 2 * T::kValueHalf + column];
#pragma unroll
            for (int i = 0; i < kRowQuads; ++i) {
              output[4 * i][T::kOutputs - 1] += rows[i].x * v;
              output[4 * i + 1][T::kOutputs - 1] += rows[i].y * v;
              output[4 * i + 2][T::kOutputs - 1] += rows[i].z * v;
              output[4 * i + 3][T::kOutputs - 1] += rows[i].w * v;
            }
          }
        }
      }
    };
    fetch(0);
    if (masked) {
#pragma unroll
      for (int j = 0; j < kKeysPerThread; ++j) {
        const int key = key_of(j);
        const bool there = key < count;
        const auto row_sees = sees(min2(key, count - 1));
#pragma unroll
        for (int i = 0; i < kRowsPerThread; ++i) {
          if (!there || !row_sees(row0 + i)) score[i][j] = kMasked;
        }
      }
    }
    softmax<is_quantised(kValueFormat)>(score, shared);
    stream(ceil_div(count, kSlice), shared, fetch, put, use);
  }

  // Sums the row over the threads that share it; tells whether there is such a row.
  __device__ __forceinline__ bool finish_row(int i) {
#pragma unroll
    for (int mask = T::kColumnThreads / 2; mask > 0; mask /= 2) {
      state[i].sum += __shfl_xor_sync(kAllLanes, state[i].sum, mask);
    }
    return first_row + row0 + i < rows;
  }

  // Writes the thread's channels of a row, times a factor.
  __device__ __forceinline__ void store_row(const AttentionParams& p, int i, float factor, float* row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int d = h * T::kValueHalf + 4 * column;
      if (d >= p.value_dim) continue;
      const float* o = &output[i][4 * h];
      *reinterpret_cast<float4*>(row + d) = make_float4(o[0] * factor, o[1] * factor, o[2] * factor, o[3] * factor);
    }
    if (T::kRest) row[2 * T::kValueHalf + column] = output[i][T::kOutputs - 1] * factor;
  }

  // Writes the rows, [token, query head, value_dim], that of the first token and kv head's first query head at `out`.
  __device__ __forceinline__ void store(const AttentionParams& p, float* out) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int r = first_row + row0 + i;
      if (!finish_row(i)) continue;
      store_row(p, i, state[i].normalise(), out + ((long long)(r / p.group) * p.num_heads + r % p.group) * p.value_dim);
    }
  }

  // Writes the rows' states, [query head, token, split, partial_pitch], that of the first token and kv head's first
  // query head at `to`.
  __device__ __forceinline__ void store_partial(const AttentionParams& p, float* to) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int r = first_row + row0 + i;
      if (!finish_row(i)) continue;
      float* row = to + ((long long)(r % p.group) * p.tokens + r / p.group) * p.splits * partial_pitch(p.value_dim);
      store_row(p, i, 1, row);
      if (column == 0) *reinterpret_cast<SoftmaxState*>(row + p.value_dim) = state[i];
    }
  }
};

}  // namespace pascalvl
