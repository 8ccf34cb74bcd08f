// FlashAttention-2 (Dao, arXiv:2307.08691), all in FP32: prefill over a cache, and packed sequences without one.
//
// A block of 128 threads owns 64 query rows and walks over tiles of 128 keys. For text the rows are 64 / group tokens
// times the query heads of one kv head, so that K and V are read once for all of them. A thread owns 8 rows: 8 x 8 of
// the scores and 8 x 8 of the output, in registers; 16 threads of a warp share its rows, so the softmax needs shuffles
// only. Per channel, and per key, a thread does 64 FFMA for 4 shared loads of 16 bytes: 4 a word, which is what SM61's
// shared memory can feed.
//
// Shared memory, 45 KB: 8 channels of Q and K (or 8 keys of V) at a time, twice, Q and K transposed; and the 64 x 128
// probabilities, swizzled. Q does not stay: keeping it would cost 32 KB, reading it again comes from L2. The next slice
// is in registers while this one is used. Two blocks an SM. What is the same for all threads is kept in shared memory
// or in the parameters, not in registers. Bound by FFMA issue. Tried on an H100 and slower: 64 keys a tile with three
// blocks an SM (by 10%), with slices of 16 (by 5%).
#include "plugins/kernels/device.cuh"

namespace pascalvl {

constexpr int kThreads = 128;
constexpr int kRows = 64;  // query rows of a block
constexpr int kRowsPerThread = 8;
constexpr int kColumnThreads = 16;
constexpr int kKeyQuads = 2;  // of a tile that a thread scores: keys 64 * h + 4 * column and on
constexpr int kKeys = 64 * kKeyQuads;
constexpr int kSlice = 8;           // channels of Q and K, or keys of V, in shared memory at a time
constexpr int kQPitch = kRows + 4;  // words between channels: no bank conflicts when a slice is stored
constexpr int kKPitch = kKeys + 4;
constexpr int kQuadsPerRow = kSlice / 4;  // of a slice of Q or K
constexpr int kRowsAtOnce = kThreads / kQuadsPerRow;
constexpr int kQLoads = kRows / kRowsAtOnce, kKLoads = kKeys / kRowsAtOnce;  // quads of a slice that a thread loads
static_assert(kThreads * kRowsPerThread == kRows * kColumnThreads, "the threads cover the rows");

// Where a tile's keys come from: new rows of one kv head, in FP32, or rows of the cache.
struct Source {
  const unsigned char* k;
  const unsigned char* v;
  const unsigned short* k_scale;  // null: none
  const unsigned short* v_scale;
  int k_format;
  int v_format;
  int k_row;  // bytes
  int v_row;
  int count;     // rows there are
  int position;  // of the first one
};

__device__ __forceinline__ float4 zero4() { return make_float4(0, 0, 0, 0); }

// Elements d to d + 3 of a row, zeros outside.
__device__ __forceinline__ float4 load_quad(const unsigned char* rows, const unsigned short* scales, int format,
                                            int row_bytes, int row, int count, int d, int dim) {
  if (row >= count || d >= dim) return zero4();
  const unsigned char* from = rows + (long long)row * row_bytes;
  if (format == kFloat32) return *reinterpret_cast<const float4*>(from + 4 * d);
  const float4 x = load_quad(format, from, d);
  if (!scales) return x;
  const float scale = half_to_float(scales[row]);
  return make_float4(x.x * scale, x.y * scale, x.z * scale, x.w * scale);
}

// A probability's place: [key][row], rows in quads that move with the key, so that neither side meets bank conflicts.
__device__ __forceinline__ int probability_at(int key, int row_quad) {
  return key * kRows + 4 * (row_quad ^ (key / 4 & 7));
}

// Adds a quad's products to four accumulators.
__device__ __forceinline__ void fma4(float* sum, float a, float4 b) {
  sum[0] += a * b.x;
  sum[1] += a * b.y;
  sum[2] += a * b.z;
  sum[3] += a * b.w;
}

// kValueDim: channels of the output. Those up to 64 lie four to a thread, up to 128 eight; of 72, eight are left over,
// and each thread takes four rows of one of them.
template <int kValueDim>
struct Prefill {
  static constexpr int kQuads = kValueDim > 72 ? 2 : 1;  // of output channels a thread has in each row
  static constexpr bool kRest = kValueDim == 72;
  static constexpr int kValuePitch = kValueDim > 72 ? 128 : kValueDim;
  static constexpr int kValueQuads = kSlice * kValuePitch / 4;  // in a slice of V
  static constexpr int kValueLoads = (kValueQuads + kThreads - 1) / kThreads;
  static constexpr int kScoreWords = kSlice * (kQPitch + kKPitch), kOutputWords = kSlice * kValuePitch;
  static constexpr int kSliceWords = kScoreWords > kOutputWords ? kScoreWords : kOutputWords;

  // Online softmax: maximum and sum of one of the thread's rows, number column % 8.
  float maximum, sum;
  float output[kRowsPerThread][4 * kQuads];
  float rest[4];

  // Query rows: row r of the block is token (first_row + r) / p.group, query head (first_row + r) % group of the kv
  // head. Those that this thread loads begin at q + q_offset; negative: there is none.
  int q_offset[kQLoads];
  int first_row, rows;

  __device__ __forceinline__ void begin(const AttentionParams& p, int first, int number, int head_stride) {
    first_row = first, rows = number;
#pragma unroll
    for (int i = 0; i < kQLoads; ++i) {
      const int r = first + threadIdx.x / kQuadsPerRow + i * kRowsAtOnce, d = threadIdx.x % kQuadsPerRow * 4;
      q_offset[i] = r < rows ? r % p.group * head_stride + r / p.group * p.key_dim + d : -1;
    }
    maximum = kLowest, sum = 0;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4 * kQuads; ++j) output[i][j] = 0;
    }
    rest[0] = rest[1] = rest[2] = rest[3] = 0;
  }

  // Adds the products of a thread's 8 rows (a, b) with four columns to accumulators `at` and on of each row.
  template <int kWidth>
  static __device__ __forceinline__ void multiply(float (*sums)[kWidth], int at, float4 a, float4 b, float4 columns) {
    fma4(&sums[0][at], a.x, columns);
    fma4(&sums[1][at], a.y, columns);
    fma4(&sums[2][at], a.z, columns);
    fma4(&sums[3][at], a.w, columns);
    fma4(&sums[4][at], b.x, columns);
    fma4(&sums[5][at], b.y, columns);
    fma4(&sums[6][at], b.z, columns);
    fma4(&sums[7][at], b.w, columns);
  }

  // One tile: `count` keys, number `first` and on, of a source. Where `masked`, `sees(row, position)` tells what a row
  // sees. Slices go through two buffers in turn, so that one barrier a slice is enough.
  template <typename Sees>
  __device__ __forceinline__ void tile(const AttentionParams& p, const float* q, const Source& source, int first,
                                       int count, bool masked, float (*slices)[kSliceWords], float* probability,
                                       Sees sees) {
    const int thread = threadIdx.x, column = thread % kColumnThreads, row0 = thread / kColumnThreads * kRowsPerThread;
    int turn = 0;

    // Scores.
    float score[kRowsPerThread][4 * kKeyQuads];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int j = 0; j < 4 * kKeyQuads; ++j) score[i][j] = 0;
    }
    const int load_row = thread / kQuadsPerRow, load_d = thread % kQuadsPerRow * 4;
    float4 next_q[kQLoads], next_k[kKLoads];
    auto fetch = [&](int d) {
#pragma unroll
      for (int i = 0; i < kQLoads; ++i) {
        const bool inside = q_offset[i] >= 0 && d + load_d < p.key_dim;
        next_q[i] = inside ? *reinterpret_cast<const float4*>(q + q_offset[i] + d) : zero4();
      }
#pragma unroll
      for (int i = 0; i < kKLoads; ++i) {
        next_k[i] = load_quad(source.k, source.k_scale, source.k_format, source.k_row,
                              first + load_row + i * kRowsAtOnce, source.count, d + load_d, p.key_dim);
      }
    };
    auto transpose = [](float* at, int pitch, float4 x) {
      at[0] = x.x, at[pitch] = x.y, at[2 * pitch] = x.z, at[3 * pitch] = x.w;
    };
    auto put = [&] {
#pragma unroll
      for (int i = 0; i < kQLoads; ++i) {
        transpose(&slices[turn][load_d * kQPitch + load_row + i * kRowsAtOnce], kQPitch, next_q[i]);
      }
#pragma unroll
      for (int i = 0; i < kKLoads; ++i) {
        transpose(&slices[turn][kSlice * kQPitch + load_d * kKPitch + load_row + i * kRowsAtOnce], kKPitch, next_k[i]);
      }
    };
    fetch(0);
    __syncthreads();  // all have done the tile before
    put();
    __syncthreads();
    for (int d = kSlice;; d += kSlice) {
      const bool more = d < p.key_dim;
      if (more) fetch(d);
      const float* q_slice = slices[turn];
      const float* k_slice = q_slice + kSlice * kQPitch;
#pragma unroll
      for (int c = 0; c < kSlice; ++c) {
        const float4 a = *reinterpret_cast<const float4*>(&q_slice[c * kQPitch + row0]);
        const float4 b = *reinterpret_cast<const float4*>(&q_slice[c * kQPitch + row0 + 4]);
#pragma unroll
        for (int h = 0; h < kKeyQuads; ++h) {
          multiply(score, 4 * h, a, b, *reinterpret_cast<const float4*>(&k_slice[c * kKPitch + 64 * h + 4 * column]));
        }
      }
      turn ^= 1;
      if (!more) break;
      put();
      __syncthreads();
    }

    // Softmax of the rows: new maximum, probabilities, what is there already scaled down to it.
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int teller = threadIdx.x / kColumnThreads * kColumnThreads % kWarp + i;  // the lane with this row's state
      const float before = __shfl_sync(kAllLanes, maximum, teller);
      float most = before;
#pragma unroll
      for (int j = 0; j < 4 * kKeyQuads; ++j) {
        score[i][j] *= p.scale_log2;
        const int key = first + 64 * (j / 4) + 4 * column + j % 4;
        if (masked && (key >= source.count || !sees(row0 + i, source.position + key))) score[i][j] = kLowest;
        most = max2(most, score[i][j]);
      }
#pragma unroll
      for (int mask = kColumnThreads / 2; mask > 0; mask /= 2)
        most = max2(most, __shfl_xor_sync(kAllLanes, most, mask));
      const float base = most == kLowest ? 0 : most;  // nothing seen yet: every power below is zero
      const float factor = exp2f(before - base);
      float total = 0;
#pragma unroll
      for (int j = 0; j < 4 * kKeyQuads; ++j) {
        score[i][j] = exp2f(score[i][j] - base);
        total += score[i][j];
      }
#pragma unroll
      for (int mask = kColumnThreads / 2; mask > 0; mask /= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
      if (column % kRowsPerThread == i) maximum = most, sum = sum * factor + total;
#pragma unroll
      for (int j = 0; j < 4 * kQuads; ++j) output[i][j] *= factor;
      if (kRest && i / 4 == column / 8) rest[i % 4] *= factor;
    }
#pragma unroll
    for (int j = 0; j < 4 * kKeyQuads; ++j) {
      const int key = 64 * (j / 4) + 4 * column + j % 4;
      *reinterpret_cast<float4*>(&probability[probability_at(key, row0 / 4)]) =
          make_float4(score[0][j], score[1][j], score[2][j], score[3][j]);
      *reinterpret_cast<float4*>(&probability[probability_at(key, row0 / 4 + 1)]) =
          make_float4(score[4][j], score[5][j], score[6][j], score[7][j]);
    }

    // Output.
    float4 next_v[kValueLoads];
    auto fetch_values = [&](int key) {
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) {
        const int quad = thread + i * kThreads, row = quad / (kValuePitch / 4), d = quad % (kValuePitch / 4) * 4;
        if (quad >= kValueQuads) continue;
        next_v[i] = load_quad(source.v, source.v_scale, source.v_format, source.v_row, first + key + row, source.count,
                              d, p.value_dim);
      }
    };
    auto put_values = [&] {
#pragma unroll
      for (int i = 0; i < kValueLoads; ++i) {
        const int quad = thread + i * kThreads;
        if (quad < kValueQuads) *reinterpret_cast<float4*>(&slices[turn][4 * quad]) = next_v[i];
      }
    };
    fetch_values(0);
    put_values();
    __syncthreads();  // the probabilities are there too
    for (int key = 0;; key += kSlice) {
      const bool more = key + kSlice < count;
      if (more) fetch_values(key + kSlice);
      const float* v_slice = slices[turn];
#pragma unroll
      for (int c = 0; c < kSlice; ++c) {
        const float4 a = *reinterpret_cast<const float4*>(&probability[probability_at(key + c, row0 / 4)]);
        const float4 b = *reinterpret_cast<const float4*>(&probability[probability_at(key + c, row0 / 4 + 1)]);
#pragma unroll
        for (int h = 0; h < kQuads; ++h) {
          multiply(output, 4 * h, a, b,
                   *reinterpret_cast<const float4*>(&v_slice[c * kValuePitch + 64 * h + 4 * column]));
        }
        if (kRest) fma4(rest, v_slice[c * kValuePitch + 64 + column % 8], column < 8 ? a : b);
      }
      if (!more) break;
      turn ^= 1;
      put_values();
      __syncthreads();
    }
  }

  // Writes the rows, [token, query head, value_dim], those of the kv head's first query head at `out`.
  __device__ __forceinline__ void store(const AttentionParams& p, float* out) {
    const int column = threadIdx.x % kColumnThreads, row0 = threadIdx.x / kColumnThreads * kRowsPerThread;
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const float inverse = 1 / __shfl_sync(kAllLanes, sum, threadIdx.x / kColumnThreads * kColumnThreads % kWarp + i);
      const int r = first_row + row0 + i;
      if (r >= rows) continue;
      float* row = out + ((long long)(r / p.group) * p.num_heads + r % p.group) * p.value_dim;
#pragma unroll
      for (int h = 0; h < kQuads; ++h) {
        const int d = 64 * h + 4 * column;
        if (d >= p.value_dim) continue;
        const float* o = &output[i][4 * h];
        *reinterpret_cast<float4*>(row + d) =
            make_float4(o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse);
      }
      if (kRest && i / 4 == column / 8) row[64 + column % 8] = rest[i % 4] * inverse;
    }
  }
};

// What a block keeps in shared memory. What the compiler finds there it does not keep in registers across barriers.
template <int kValueDim>
struct PrefillShared {
  float slices[2][Prefill<kValueDim>::kSliceWords];
  float probability[kKeys * kRows];
  Source sources[2];    // the cache and the new keys
  int position[kRows];  // of each query
};

// The new keys and values from row number `first` of k and v on.
__device__ __forceinline__ Source new_rows(const AttentionParams& p, long long first, int count, int position) {
  return {reinterpret_cast<const unsigned char*>(p.k + first * p.key_dim),
          reinterpret_cast<const unsigned char*>(p.v + first * p.value_dim),
          nullptr,
          nullptr,
          kFloat32,
          kFloat32,
          4 * p.key_dim,
          4 * p.value_dim,
          count,
          position};
}

// Grid: (tiles of 64 rows, kv heads, batch). The last tiles of rows see the most keys and are started first.
template <int kValueDim>
__device__ __forceinline__ void prefill_causal(const AttentionParams& p, PrefillShared<kValueDim>& shared) {
  const int head = blockIdx.y, sequence = blockIdx.z;
  const int past = p.past_length ? p.past_length[sequence] : 0;
  const long long kv = (long long)sequence * p.num_kv_heads + head;

  Prefill<kValueDim> prefill;
  prefill.begin(p, (gridDim.x - 1 - blockIdx.x) * kRows, p.seq * p.group, p.seq * p.key_dim);
  const long long query = ((long long)sequence * p.num_heads + head * p.group) * p.seq * p.key_dim;

  // Positions of the block's first and last query.
  const int low = past + prefill.first_row / p.group;
  const int high = past + (min2(prefill.first_row + kRows, prefill.rows) - 1) / p.group;
  auto sees = [&](int row, int position) {  // whether the query of a row sees a position
    const int own = shared.position[row];
    return position <= own && (p.window == 0 || position > own - p.window || position < p.sinks);
  };
  // Tiles that no row sees lie between the sinks and the first query's window.
  const int hidden_from = p.window ? ceil_div(p.sinks, kKeys) * kKeys : 0;
  const int hidden_to = p.window ? low - p.window + 1 : 0;
  auto all_see = [&](int first, int last) {
    return last <= low && (p.window == 0 || first > high - p.window || last < p.sinks);
  };

  const Cache& cache = p.cache;
  const long long slot = kv * cache.capacity;
  const int k_row = row_bytes(cache.key_format, p.key_dim), v_row = row_bytes(cache.value_format, p.value_dim);
  // In shared memory, where they cost no registers.
  if (threadIdx.x < kRows) shared.position[threadIdx.x] = past + (prefill.first_row + threadIdx.x) / p.group;
  if (threadIdx.x == 0) {
    shared.sources[0] = {cache.key + slot * k_row,
                         cache.value + slot * v_row,
                         is_quantised(cache.key_format) ? cache.key_scale + slot : nullptr,
                         is_quantised(cache.value_format) ? cache.value_scale + slot : nullptr,
                         cache.key_format,
                         cache.value_format,
                         k_row,
                         v_row,
                         past,
                         0};
    shared.sources[1] = new_rows(p, kv * p.seq, p.seq, past);
  }
  __syncthreads();
  const int past_tiles = ceil_div(past, kKeys), tiles = past_tiles + (high - past) / kKeys + 1;
  for (int t = 0; t < tiles; ++t) {
    const bool in_cache = t < past_tiles;
    const Source& source = shared.sources[!in_cache];
    const int first = (in_cache ? t : t - past_tiles) * kKeys;
    const int from = source.position + first, to = from + kKeys;
    if (from >= hidden_from && to <= hidden_to) continue;
    const bool masked = first + kKeys > source.count || !all_see(from, to - 1);
    const int count = min2(in_cache ? past - first : high - from + 1, kKeys);
    prefill.tile(p, (in_cache ? p.q_past : p.q) + query, source, first, count, masked, shared.slices,
                 shared.probability, sees);
  }
  prefill.store(p, p.out + ((long long)sequence * p.seq * p.num_heads + head * p.group) * p.value_dim);
}

// Bidirectional within each of the sequences that cu_seqlens cuts the tokens into.
// Grid: (seq / 64 + num_sequences, at least as many as the sequences have tiles; heads).
template <int kValueDim>
__device__ __forceinline__ void prefill_packed(const AttentionParams& p, PrefillShared<kValueDim>& shared) {
  const int head = blockIdx.y;
  int sequence = 0, tile = blockIdx.x, begin = 0, length = 0;
  for (; sequence < p.num_sequences; ++sequence) {
    begin = p.cu_seqlens[sequence];
    length = p.cu_seqlens[sequence + 1] - begin;
    const int tiles = ceil_div(length, kRows);
    if (tile < tiles) break;
    tile -= tiles;
  }
  if (sequence == p.num_sequences) return;

  Prefill<kValueDim> prefill;
  prefill.begin(p, tile * kRows, length, 0);
  const long long first_token = (long long)head * p.seq + begin;
  if (threadIdx.x == 0) shared.sources[0] = new_rows(p, first_token, length, 0);
  __syncthreads();
  for (int first = 0; first < length; first += kKeys) {
    prefill.tile(p, p.q + first_token * p.key_dim, shared.sources[0], first, min2(length - first, kKeys),
                 first + kKeys > length, shared.slices, shared.probability, [](int, int) { return true; });
  }
  prefill.store(p, p.out + ((long long)begin * p.num_heads + head) * p.value_dim);
}

#define PREFILL(KIND, DIM)                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) prefill_##KIND##_##DIM(const AttentionParams p) { \
    __shared__ __align__(16) PrefillShared<DIM> shared;                                                       \
    prefill_##KIND(p, shared);                                                                                \
  }
PREFILL(causal, 64)
PREFILL(causal, 128)
PREFILL(packed, 64)
PREFILL(packed, 72)
PREFILL(packed, 128)

}  // namespace pascalvl
