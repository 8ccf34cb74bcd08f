// Linear layers: y = activation(norm(x) W^T + bias) + residual. Weights have 8 or 4 bits, and x is quantised to int8 by
// token and group of inputs before; or they are halves or floats, and x stays as it is. A norm is computed by the
// kernel that quantises, or by the same one, which leaves floats then.
//
// Codes: a group's products are summed in integers by DP4A, exactly; the sum times the two scales is added up in FP32.
// The integers begin at the bits of 1.5 * 2^23 as a float, so that they are one: one subtraction where a conversion
// takes four issue slots on SM61. A group has up to 128 elements, a product up to 127 * 128: 2^21, which 2^22 bounds.
// Codes of 4 bits become bytes 16 times as large, by a mask (and a shift), and their scale is divided by 16.
//
// Zeros: a group's sum of (code - zero) * x is that of code * x less zero times the sum of x, which lies beside the
// scale of x. Both are integers of at most 2^21, so that one FFMA a group and output subtracts them exactly.
//
// Halves are widened on their way to shared memory or registers, then multiplied in FP32 by FFMA, as floats are.
//
// Every kernel that has an output's whole sum ends in `epilogue`.
#include "plugins/kernels/device.cuh"
#include "plugins/kernels/kernels.h"

namespace pascalvl {

constexpr int kIntegersStart = 0x4b400000;  // the bits of 1.5 * 2^23
constexpr float kFloatsStart = 12582912.0f;

__device__ __forceinline__ float exact_float(int sum) { return __int_as_float(sum) - kFloatsStart; }

// Of a sum that is no float yet: exact, see above.
__device__ __forceinline__ int minus_product(int sum, float zero, float x_sum) {
  return __float_as_int(__int_as_float(sum) - zero * x_sum);
}

// Four words of weights as they lie in memory to words that are multiplied: 4 or 8 of four int8 codes each, of W8 and
// W4; 8 or 4 of one float each, of halves and floats.
template <int kBits>
struct WeightQuad {
  static constexpr bool kFloats = kBits >= 16;
  static constexpr int kElements = 128 / kBits;
  static constexpr int kOfWord = kFloats ? 1 : 4;  // elements
  static constexpr int kWords = kElements / kOfWord;
  static constexpr float kUnit = kBits == 4 ? 16 : 1;  // of codes in bytes
  static __device__ __forceinline__ void unpack(uint4 raw, int* to) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBits == 8 || kBits == 32) {
        to[i] = int(words[i]);
      } else if constexpr (kBits == 4) {
        to[2 * i] = int(words[i] << 4 & 0xf0f0f0f0u);
        to[2 * i + 1] = int(words[i] & 0xf0f0f0f0u);
      } else {
        const float2 pair = halves_to_floats(words[i]);
        to[2 * i] = __float_as_int(pair.x), to[2 * i + 1] = __float_as_int(pair.y);
      }
    }
  }
};

__device__ __forceinline__ uint4 load_quad(const unsigned char* from) {
  return __ldg(reinterpret_cast<const uint4*>(from));
}

// Of weights that one warp alone reads, once: the first to leave the caches, so that the inputs stay, which every warp
// reads. That is worth 3 to 8% of one row's time, more where there are more.
__device__ __forceinline__ uint4 load_quad_once(const unsigned char* from) {
  return __ldcs(reinterpret_cast<const uint4*>(from));
}

// Elements of a row of `width`, from `at` on, and zeros beyond its end. Quads lie on 16 bytes where rows have whole
// ones.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* row, int at, int width, float* to) {
  if (kCount == 4 && width % 4 == 0 && at < width) {
    const float4 quad = *reinterpret_cast<const float4*>(row + at);
    to[0] = quad.x, to[1 % kCount] = quad.y, to[2 % kCount] = quad.z, to[3 % kCount] = quad.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = at + i < width ? row[at + i] : 0;
}

// Of rows that have whole quads alone.
__device__ __forceinline__ void load_quad_within(const float* row, int at, int width, float* to) {
  const float4 quad = at < width ? *reinterpret_cast<const float4*>(row + at) : make_float4(0, 0, 0, 0);
  to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
}

template <int kCount>
__device__ __forceinline__ void store_floats(float* row, int at, int width, const float* from) {
  if (kCount == 4 && width % 4 == 0) {
    if (at < width) {
      *reinterpret_cast<float4*>(row + at) = make_float4(from[0], from[1 % kCount], from[2 % kCount], from[3 % kCount]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (at + i < width) row[at + i] = from[i];
  }
}

// Four inputs of a row.
__device__ __forceinline__ float4 load_inputs(const LinearParams& p, int row, int at) {
  float x[4];
  load_floats<4>(p.x + (long long)row * p.in_features, at, p.in_features, x);
  return make_float4(x[0], x[1], x[2], x[3]);
}

// Asks for the first lines of the weights, by the blocks of kThreads that a grid has beyond its first `blocks`.
template <int kThreads>
__device__ __forceinline__ void bring_weights(const LinearParams& p, int blocks) {
  const int threads = (gridDim.x - blocks) * gridDim.y * kThreads;
  int line = ((blockIdx.x - blocks) * gridDim.y + blockIdx.y) * kThreads + threadIdx.x;
  for (; line < p.lines_ahead; line += threads) bring_to_l2(p.weight + kLine * line);
}

// Quads of inputs of each lane, kApart elements from one to the next, the first at d, to codes and scales, and sums of
// codes where there are zeros: a warp's quads are 128 of a row, one group or several. Those from `end` on go nowhere.
template <int kCount, int kApart>
__device__ __forceinline__ void round_inputs(const LinearParams& p, int row, int d, int end, const float4* quads) {
  float most[kCount];
  int sum[kCount];
  unsigned codes[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) most[i] = max_abs(quads[i]);
  for (int mask = 1; mask < p.group / 4; mask *= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) most[i] = max2(most[i], __shfl_xor_sync(kAllLanes, most[i], mask));
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    codes[i] = quantise(quads[i], most[i] > 0 ? 127 / most[i] : 0, -127, 127);
    sum[i] = __dp4a(int(codes[i]), 0x01010101, 0);
  }
  if (p.zero) {
    for (int mask = 1; mask < p.group / 4; mask *= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], mask);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i, d += kApart) {
    if (d >= end) continue;
    *reinterpret_cast<unsigned*>(p.codes + (long long)row * p.padded + d) = codes[i];
    if (d % p.group) continue;
    const long long at = (long long)(d / p.group) * p.row_pitch + row;
    p.x_scale[at] = most[i] / 127;
    if (p.zero) p.x_sum[at] = float(sum[i]);
  }
}

// x to codes, four elements a lane. So little keeps DRAM idle: before few rows, further blocks ask for the first
// weights meanwhile. Grid: (padded / 128 / warps of a block, rounded up, and blocks for weights; rows).
extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_quantise(const LinearParams p) {
  const int lane = threadIdx.x % kWarp, row = blockIdx.y;
  const int blocks = ceil_div(p.padded, 4 * kLinearThreads);
  if (int(blockIdx.x) >= blocks) return bring_weights<kLinearThreads>(p, blocks);
  const int d = (blockIdx.x * (kLinearThreads / kWarp) + threadIdx.x / kWarp) * 4 * kWarp + 4 * lane;
  if (d - 4 * lane >= p.padded) return;
  const float4 quad = load_inputs(p, row, d);
  round_inputs<1, 0>(p, row, d, p.padded, &quad);
}

// Norms --------------------------------------------------------------------------------------------------------------

// The sum of a number of each thread. Every thread adds up what the warps have: that is one barrier and as many loads
// as a warp's shuffles are stages.
template <int kWarps>
__device__ __forceinline__ float block_sum(float x, float* shared) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < kWarps; i += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(shared + i);
    sum = make_float4(sum.x + quad.x, sum.y + quad.y, sum.z + quad.z, sum.w + quad.w);
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

// What is normed together ends here; the last group of a row of codes goes on in zeros.
__device__ __forceinline__ int norm_end(const NormParams& norm) {
  return norm.normed ? norm.size : ceil_div(norm.size, norm.layer.group) * norm.layer.group;
}

// From inputs and the norm's weights, the first quad at `at` of a block's inputs, to what the norm leaves.
template <int kCount, int kApart>
__device__ __forceinline__ void finish_norm(const NormParams& norm, int at, float mean, float factor,
                                            const float (*x)[4], const float (*weight)[4]) {
  const int row = blockIdx.y, begin = blockIdx.x * norm.size;
  float4 quads[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float y[4], bias[4] = {};
    const int first = at + i * kApart;
    if (norm.bias) load_floats<4>(norm.bias, first, norm.size, bias);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      y[j] = first + j < norm.size ? (x[i][j] - mean) * factor * weight[i][j] + bias[j] : 0;
    }
    quads[i] = make_float4(y[0], y[1], y[2], y[3]);
    if (!norm.normed) continue;
    store_floats<4>(norm.normed + (long long)row * norm.layer.in_features + begin, first, norm.size, y);
  }
  if (!norm.normed) round_inputs<kCount, kApart>(norm.layer, row, begin + at, begin + norm_end(norm), quads);
}

// A block norms so many inputs of a row, and leaves them as linear_quantise does, or as floats. A row of decode waits
// for this: its threads have a quad or two, all of which are on their way at once and stay in registers, with the
// norm's weights, for which no sum waits; what a warp does with two is interleaved. Of inputs for which the largest
// block is too small, the rest is read again. A block meets once for RMS, whose mean is 0, and twice for a layer norm,
// whose variance is that of what the mean leaves. Bound by latency in decode, in prefill by DRAM. Grid: (blocks of a
// row, and those for weights; rows).
template <int kThreads>
__device__ __forceinline__ void linear_norm(const NormParams& norm) {
  constexpr int kApart = 4 * kThreads, kHeld = kNormQuads * kApart;
  __shared__ __align__(16) float shared[2][kThreads / kWarp];
  if (int(blockIdx.x) >= norm.blocks) return bring_weights<kThreads>(norm.layer, norm.blocks);
  const int size = norm.size, own = 4 * threadIdx.x, of_warp = own - 4 * int(threadIdx.x % kWarp);
  const float* x_at = norm.layer.x + (long long)blockIdx.y * norm.layer.in_features + blockIdx.x * size;
  float x[kNormQuads][4], weight[kNormQuads][4];
  if (size % 4 == 0) {  // asked once, so that the loads follow each other
#pragma unroll
    for (int i = 0; i < kNormQuads; ++i) load_quad_within(x_at, own + i * kApart, size, x[i]);
#pragma unroll
    for (int i = 0; i < kNormQuads; ++i) load_quad_within(norm.weight, own + i * kApart, size, weight[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kNormQuads; ++i) load_floats<4>(x_at, own + i * kApart, size, x[i]);
#pragma unroll
    for (int i = 0; i < kNormQuads; ++i) load_floats<4>(norm.weight, own + i * kApart, size, weight[i]);
  }
  const float of_one = 1.0f / size;
  // The mean over all inputs of what `less` leaves, or of its squares.
  auto mean_of = [&](float less, bool squares, float* shared) {
    float sum = 0;
    auto add = [&](int at, const float* quad) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float rest = at + j < size ? quad[j] - less : 0;
        sum += squares ? rest * rest : rest;
      }
    };
#pragma unroll
    for (int i = 0; i < kNormQuads; ++i) add(own + i * kApart, x[i]);
    for (int at = own + kHeld; at < size; at += kApart) {
      float quad[4];
      load_floats<4>(x_at, at, size, quad);
      add(at, quad);
    }
    return block_sum<kThreads / kWarp>(sum, shared) * of_one;
  };
  const float mean = norm.bias ? mean_of(0, false, shared[0]) : 0;
  const float factor = rsqrtf(mean_of(mean, true, shared[1]) + norm.epsilon);
  const int end = norm_end(norm);
  if (of_warp >= end) return;
  if (of_warp + kApart >= end) return finish_norm<1, kApart>(norm, own, mean, factor, x, weight);
  finish_norm<kNormQuads, kApart>(norm, own, mean, factor, x, weight);
  for (int at = own + kHeld; at - own + of_warp < end; at += kApart) {
    float quad[1][4], more[1][4];
    load_floats<4>(x_at, at, size, quad[0]);
    load_floats<4>(norm.weight, at, size, more[0]);
    finish_norm<1, kApart>(norm, at, mean, factor, quad, more);
  }
}

// Epilogue
// ---------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_gated(const LinearParams& p) { return p.activation == kSiluGated; }

// The column of the gate for an output.
__device__ __forceinline__ int gate_column(int to) { return to / kGatedBlock * 2 * kGatedBlock + to % kGatedBlock; }

__device__ __forceinline__ int out_width(const LinearParams& p) {
  return is_gated(p) ? p.out_features / 2 : p.out_features;
}

// x times the logistic function of y. The exponential is one of no positive number: it does not overflow.
__device__ __forceinline__ float times_logistic(float x, float y) {
  const float small = power_of_2(-1.4426950408889634f * fabsf(y));
  return x * __fdividef(y < 0 ? small : 1, 1 + small);
}

__device__ __forceinline__ float gelu_erf(float x) { return 0.5f * x * (1 + erff(0.70710678118654752f * x)); }

// x / 2 * (1 + tanh(u)) is x times the logistic function of 2 u.
__device__ __forceinline__ float gelu_tanh(float x) {
  return times_logistic(x, 1.5957691216057308f * x * (1 + 0.044715f * x * x));
}

// From sums to outputs: kCount columns, from `column` on, of kRows rows, from `row` on, as far as there are so many.
// Of a gated layer the sums are gates, and `value` has those of the columns kGatedBlock further on. The sums of a row
// lie kPitch behind those of the last one.
template <int kRows, int kCount, int kPitch>
__device__ __forceinline__ void epilogue(const LinearParams& p, int row, int column, float* sum, float* value) {
  const bool gated = is_gated(p);
  const int width = out_width(p), to = gated ? column / (2 * kGatedBlock) * kGatedBlock + column % kGatedBlock : column;
  if (p.bias) {
    float bias[kCount], value_bias[kCount];
    load_floats<kCount>(p.bias, column, p.out_features, bias);
    load_floats<kCount>(p.bias, column + kGatedBlock, gated ? p.out_features : 0, value_bias);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        sum[i * kPitch + j] += bias[j];
        if (gated) value[i * kPitch + j] += value_bias[j];
      }
    }
  }
  if (gated) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        float& x = sum[i * kPitch + j];
        x = times_logistic(x, x) * value[i * kPitch + j];
      }
    }
  } else if (p.activation == kGeluTanh) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[i * kPitch + j] = gelu_tanh(sum[i * kPitch + j]);
    }
  } else if (p.activation == kGeluErf) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[i * kPitch + j] = gelu_erf(sum[i * kPitch + j]);
    }
  }
  if (p.residual) {  // all of it is read before any is written, so that the loads do not wait for stores
    float residual[kRows][kCount];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float* from = p.residual + (long long)min2(row + i, p.rows - 1) * width;
      load_floats<kCount>(from, to, width, residual[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sum[i * kPitch + j] += residual[i][j];
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row + i < p.rows) store_floats<kCount>(p.out + (long long)(row + i) * width, to, width, sum + i * kPitch);
  }
}

// GEMM: many rows ----------------------------------------------------------------------------------------------------

constexpr int kTileWords = 16;  // words in shared memory at a time: 64 codes, or 16 floats
constexpr int kGroupWords = 8;  // words after which a group may end
constexpr int kColumnPitch = kTileColumns + 4;

template <int kTileRows>
struct LinearShared {
  int x[2][kTileWords][kTileRows + 4];
  int weight[2][kTileWords][kColumnPitch];
};

__device__ __forceinline__ uint4 bits_of(float4 x) {
  return {unsigned(__float_as_int(x.x)), unsigned(__float_as_int(x.y)), unsigned(__float_as_int(x.z)),
          unsigned(__float_as_int(x.w))};
}

// Reads 2, or whole quads.
template <int kCount>
__device__ __forceinline__ void load_ints(const int* from, int* x) {
  if (kCount == 2) {
    const int2 two = *reinterpret_cast<const int2*>(from);
    x[0] = two.x, x[1] = two.y;
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const int4 quad = *reinterpret_cast<const int4*>(from + i);
    x[i] = quad.x, x[(i + 1) % kCount] = quad.y, x[(i + 2) % kCount] = quad.z, x[(i + 3) % kCount] = quad.w;
  }
}

// A block computes 64 rows (16 or 32, of few) by 128 columns, a thread 8 (2, 4) by 8: columns 4 c and on, and 64
// further on, which are the values of those gates. Slices of 16 words of both lie in shared memory, transposed, two in
// turn; the next one is on its way in registers. For each word a thread does 64 DP4A (of halves: FFMA) for 4 shared
// loads of 16 bytes, as in prefill. Bound by their issue.
template <int kBits, int kTileRows>
__device__ __forceinline__ void linear_gemm(const LinearParams& p, LinearShared<kTileRows>& shared) {
  using Quad = WeightQuad<kBits>;
  constexpr int kSlice = Quad::kOfWord * kTileWords;      // elements
  constexpr int kWeightQuads = kSlice / Quad::kElements;  // of a column's slice
  constexpr int kQuads = kTileWords / 4;                  // of a row's
  constexpr int kXQuads = kQuads * kTileRows > kLinearThreads ? kQuads * kTileRows / kLinearThreads : 1;  // of a thread
  constexpr int kRows = kTileRows / 8;
  const int first_column = blockIdx.x * kTileColumns, first_row = blockIdx.y * kTileRows;
  const int groups = ceil_div(p.padded, p.group), share = ceil_div(groups, p.splits);
  const int first_group = blockIdx.z * share, last_group = min2(first_group + share, groups);
  const int begin = first_group * p.group, end = min2(last_group * p.group, p.padded);

  // This thread brings some quads of rows' slices, and the slice of a column.
  const int load_row = threadIdx.x % kTileRows, first_quad = threadIdx.x / kTileRows;
  const bool brings = first_quad < kQuads;
  constexpr int kQuadsApart = kLinearThreads / kTileRows;  // of one row, between a thread's
  const int x_row = min2(first_row + load_row, p.rows - 1);
  const unsigned char* x_at = p.codes + (long long)x_row * p.padded;
  const unsigned char* weight_at =
      p.weight + (long long)min2(first_column + int(threadIdx.x), p.out_features - 1) * (p.padded * kBits / 8);
  uint4 next_x[kXQuads], next_weight[kWeightQuads];
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  auto fetch = [&](int at) {
#pragma unroll
    for (int i = 0; i < kXQuads; ++i) {
      const int d = at + 4 * Quad::kOfWord * (first_quad + i * kQuadsApart);
      next_x[i] = nothing;
      if (!brings || d >= end) continue;
      next_x[i] = Quad::kFloats ? bits_of(load_inputs(p, x_row, d)) : load_quad(x_at + d);
    }
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int d = at + i * Quad::kElements;
      next_weight[i] = d < end ? load_quad(weight_at + d * kBits / 8) : nothing;
    }
  };
  auto put = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < kXQuads; ++i) {
      const unsigned words[4] = {next_x[i].x, next_x[i].y, next_x[i].z, next_x[i].w};
      if (!brings) continue;
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.x[buffer][4 * (first_quad + i * kQuadsApart) + j][load_row] = int(words[j]);
    }
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      int words[Quad::kWords];
      Quad::unpack(next_weight[i], words);
#pragma unroll
      for (int j = 0; j < Quad::kWords; ++j) shared.weight[buffer][Quad::kWords * i + j][threadIdx.x] = words[j];
    }
  };

  const int column = threadIdx.x % 16, row = threadIdx.x / 16 * kRows;
  float total[kRows][8];
  int sum[kRows][8];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) total[i][j] = 0, sum[i][j] = kIntegersStart;
  }
  fetch(begin);
  put(0);
  __syncthreads();
  int buffer = 0;
  for (int at = begin; at < end; at += kSlice) {
    if (at + kSlice < end) fetch(at + kSlice);
#pragma unroll
    for (int step = 0; step < kTileWords; step += kGroupWords) {
#pragma unroll
      for (int word = step; word < step + kGroupWords; ++word) {
        int x[kRows], weight[8];
        load_ints<kRows>(&shared.x[buffer][word][row], x);
        load_ints<4>(&shared.weight[buffer][word][4 * column], weight);
        load_ints<4>(&shared.weight[buffer][word][kTileColumns / 2 + 4 * column], weight + 4);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if constexpr (Quad::kFloats) {
              total[i][j] += __int_as_float(x[i]) * __int_as_float(weight[j]);
            } else {
              sum[i][j] = __dp4a(x[i], weight[j], sum[i][j]);
            }
          }
        }
      }
      if constexpr (Quad::kFloats) continue;
      const int done = at + 4 * (step + kGroupWords);
      if (done % p.group == 0 && done <= end) {
        const int group = done / p.group - 1;
        // What a group has of each of this thread's rows, and of its columns.
        auto of_rows = [&](const float* from, float* to) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) to[i] = from[(long long)group * p.row_pitch + first_row + row + i];
        };
        auto of_columns = [&](const unsigned short* from, float unit, float* to) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at_column = min2(first_column + kTileColumns / 2 * half + 4 * column, p.scale_pitch - 4);
            const uint2 halves =
                __ldg(reinterpret_cast<const uint2*>(from + (long long)group * p.scale_pitch + at_column));
            const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
            to[4 * half] = unit * low.x, to[4 * half + 1] = unit * low.y;
            to[4 * half + 2] = unit * high.x, to[4 * half + 3] = unit * high.y;
          }
        };
        if (p.zero) {
          float x_sum[kRows], zero[8];
          of_rows(p.x_sum, x_sum);
          of_columns(p.zero, Quad::kUnit, zero);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] = minus_product(sum[i][j], zero[j], x_sum[i]);
          }
        }
        float x_scale[kRows], scale[8];
        of_rows(p.x_scale, x_scale);
        of_columns(p.scale, 1 / Quad::kUnit, scale);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            total[i][j] += exact_float(sum[i][j]) * (x_scale[i] * scale[j]);
            sum[i][j] = kIntegersStart;
          }
        }
      }
    }
    if (at + kSlice < end) put(buffer ^ 1);
    __syncthreads();
    buffer ^= 1;
  }

  const int to_row = first_row + row, to_column = first_column + 4 * column;
  if (p.splits > 1) {
    float* partial = p.partial + (long long)blockIdx.z * p.rows * p.out_features;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (to_row + i >= p.rows) continue;
      float* to = partial + (long long)(to_row + i) * p.out_features;
      store_floats<4>(to, to_column, p.out_features, total[i]);
      store_floats<4>(to, to_column + kTileColumns / 2, p.out_features, total[i] + 4);
    }
    return;
  }
  epilogue<kRows, 4, 8>(p, to_row, to_column, total[0], total[0] + 4);
  if (!is_gated(p)) epilogue<kRows, 4, 8>(p, to_row, to_column + kTileColumns / 2, total[0] + 4, nullptr);
}

// Sums the splits of the inputs, a thread four outputs. Grid: (outputs / 4 / threads, rounded up; rows).
extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_sum(const LinearParams p) {
  const int to = 4 * (blockIdx.x * kLinearThreads + threadIdx.x), row = blockIdx.y;
  if (to >= out_width(p)) return;
  const int column = is_gated(p) ? gate_column(to) : to;
  auto sum_of = [&](int column, float* sum) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = 0;
    for (int split = 0; split < p.splits; ++split) {
      float x[4];
      load_floats<4>(p.partial + ((long long)split * p.rows + row) * p.out_features, column, p.out_features, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += x[i];
    }
  };
  float sum[4], value[4];
  sum_of(column, sum);
  if (is_gated(p)) sum_of(column + kGatedBlock, value);
  epilogue<1, 4, 4>(p, row, column, sum, value);
}

// GEMV: few rows -----------------------------------------------------------------------------------------------------

constexpr int kGateWarps = kLinearWarps / 2;

// A warp computes 4 columns of up to 8 rows, each lane 16 bytes of every column at a time; or several warps of a block
// do, each a share of the inputs. Where gated, the block's first two warps compute gates, and the others, up to two of
// which may share the inputs, the values. Each byte of the weights is read once, in whole lines. Bound by DRAM.
// Registers have the weights of two steps, and their scales, which come from DRAM too. Either both are on their way,
// and those of the step at hand make room when they are multiplied; or they move away first and the next ones come
// meanwhile, which is faster where a step takes long or the former would leave fewer warps than columns need. With
// zeros, for which they would take more registers, these are kernels of their own. Grid: columns / kWarpColumns /
// (kLinearWarps / p.splits), rounded up.
template <int kBits, bool kZero, int kRows>
__device__ __forceinline__ void linear_gemv(const LinearParams& p) {
  using Quad = WeightQuad<kBits>;
  constexpr bool kMoves = Quad::kFloats || (kBits == 4 && kRows == 2);
  constexpr int kAhead = kMoves ? 1 : 2;
  struct Step {
    uint4 weight[kWarpColumns];
    uint2 scale, zero;  // halves
  };
  __shared__ float shared[kLinearWarps][kRows][kWarpColumns];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool gated = is_gated(p);
  int first = (blockIdx.x * (kLinearWarps / p.splits) + warp / p.splits) * kWarpColumns;
  if (gated) {
    const int gate = (blockIdx.x * (kGateWarps / p.splits) + warp % kGateWarps / p.splits) * kWarpColumns;
    first = gate_column(gate) + warp / kGateWarps * kGatedBlock;
  }
  const int bytes = p.padded * kBits / 8, units = bytes / 16;
  const unsigned char* columns[kWarpColumns];
#pragma unroll
  for (int n = 0; n < kWarpColumns; ++n) columns[n] = p.weight + (long long)min2(first + n, p.out_features - 1) * bytes;
  const int first_scale = min2(first, p.scale_pitch - kWarpColumns);
  auto fetch = [&](Step& to, int at) {
    if (at >= units) return;
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) to.weight[n] = load_quad_once(columns[n] + 16 * at);
    if constexpr (Quad::kFloats) return;
    const long long of_group = (long long)(at * Quad::kElements / p.group) * p.scale_pitch + first_scale;
    to.scale = __ldg(reinterpret_cast<const uint2*>(p.scale + of_group));
    if (kZero) to.zero = __ldg(reinterpret_cast<const uint2*>(p.zero + of_group));
  };
  float total[kRows][kWarpColumns];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) total[m][n] = 0;
  }
  auto multiply = [&](const Step& from, int at) {
    const int d = at * Quad::kElements;
    int weight[kWarpColumns][Quad::kWords];
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) Quad::unpack(from.weight[n], weight[n]);
    if constexpr (Quad::kFloats) {
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
#pragma unroll
        for (int i = 0; i < Quad::kWords; i += 4) {
          const float4 quad = load_inputs(p, min2(m, p.rows - 1), d + i);
          const float x[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
          for (int n = 0; n < kWarpColumns; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) total[m][n] += x[j] * __int_as_float(weight[n][i + j]);
          }
        }
      }
    } else {
      // Rows that there are not have room in the workspace; what is found there goes nowhere.
      auto of_columns = [](uint2 halves, float* to) {
        const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
        to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
      };
      float scale[kWarpColumns], zero[kWarpColumns];
      of_columns(from.scale, scale);
      if (kZero) of_columns(from.zero, zero);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        int sum[kWarpColumns];
#pragma unroll
        for (int n = 0; n < kWarpColumns; ++n) sum[n] = kIntegersStart;
#pragma unroll
        for (int i = 0; i < Quad::kWords; i += 4) {
          const uint4 quad = load_quad(p.codes + (m * p.padded + d + 4 * i));
          const unsigned x[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
          for (int n = 0; n < kWarpColumns; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[n] = __dp4a(int(x[j]), weight[n][i + j], sum[n]);
          }
        }
        const int of_group = d / p.group * p.row_pitch + m;
        if (kZero) {  // one lane of those that share a group subtracts
          const float x_sum = d % p.group ? 0 : Quad::kUnit * __ldg(p.x_sum + of_group);
#pragma unroll
          for (int n = 0; n < kWarpColumns; ++n) sum[n] = minus_product(sum[n], zero[n], x_sum);
        }
        const float x_scale = 1 / Quad::kUnit * __ldg(p.x_scale + of_group);
#pragma unroll
        for (int n = 0; n < kWarpColumns; ++n) total[m][n] += exact_float(sum[n]) * (x_scale * scale[n]);
      }
    }
  };
  Step ahead[kAhead];
  const int step = p.splits * kWarp;
  int unit = warp % p.splits * kWarp + lane;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(ahead[i], unit + i * step);
  for (; unit < units; unit += kAhead * step) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int at = unit + i * step;
      if (at >= units) break;
      const Step now = ahead[i];
      if (kMoves) fetch(ahead[i], at + kAhead * step);
      multiply(now, at);
      if (!kMoves) fetch(ahead[i], at + kAhead * step);
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) {
      total[m][n] = warp_sum(total[m][n]);
      if (lane == 0) shared[warp][m][n] = total[m][n];
    }
  }
  __syncthreads();
  // A lane takes an output of the warps that share it.
  const int m = lane / kWarpColumns, n = lane % kWarpColumns;
  if (warp % p.splits || m >= kRows || m >= p.rows || (gated && warp >= kGateWarps)) return;
  float sum = 0, value = 0;
  for (int i = 0; i < p.splits; ++i) {
    sum += shared[warp + i][m][n];
    if (gated) value += shared[warp + kGateWarps + i][m][n];
  }
  epilogue<1, 1, 1>(p, m, first + n, &sum, &value);
}

#define LINEAR_NORM(THREADS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) PASCALVL_LINEAR_NORM_NAME(THREADS)(const NormParams norm) { \
    linear_norm<THREADS>(norm);                                                                                     \
  }
PASCALVL_LINEAR_NORM(LINEAR_NORM)

#define LINEAR_GEMM(ROWS, BITS)                                     \
  extern "C" __global__ void __launch_bounds__(kLinearThreads, 2)   \
      PASCALVL_LINEAR_GEMM_NAME(ROWS, BITS)(const LinearParams p) { \
    __shared__ __align__(16) LinearShared<ROWS> shared;             \
    linear_gemm<BITS, ROWS>(p, shared);                             \
  }
PASCALVL_LINEAR_GEMM(LINEAR_GEMM)

#define LINEAR_GEMV(ROWS, BITS, ZERO)                                     \
  extern "C" __global__ void __launch_bounds__(kLinearThreads)            \
      PASCALVL_LINEAR_GEMV_NAME(ROWS, BITS, ZERO)(const LinearParams p) { \
    linear_gemv<BITS, ZERO, ROWS>(p);                                     \
  }
PASCALVL_LINEAR_GEMV(LINEAR_GEMV)

}  // namespace pascalvl
