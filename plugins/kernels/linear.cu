// Linear layers with weights of 8 or 4 bits: y = x W^T + bias, x quantised to int8 by token and group of inputs before.
//
// A group's products are summed in integers by DP4A, exactly; the sum times the two scales is added up in FP32. The
// integers begin at the bits of 1.5 * 2^23 as a float, so that they are one: one subtraction where a conversion takes
// four issue slots on SM61. A group has up to 128 elements, a product up to 127 * 128: 2^21, which 2^22 bounds.
//
// Codes of 4 bits become bytes 16 times as large, by a mask (and a shift), and their scale is divided by 16.
#include "plugins/kernels/device.cuh"

namespace pascalvl {

constexpr int kLinearThreads = 128;
constexpr int kIntegersStart = 0x4b400000;  // the bits of 1.5 * 2^23
constexpr float kFloatsStart = 12582912.0f;

__device__ __forceinline__ float exact_float(int sum) { return __int_as_float(sum) - kFloatsStart; }

// Four words of weights as they lie in memory to words of four int8 codes each: 4 of W8, 8 of W4.
template <int kBits>
struct WeightQuad {
  static constexpr int kWords = 32 / kBits;  // of codes
  static __device__ __forceinline__ void unpack(uint4 raw, int* codes) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kBits == 8) {
        codes[i] = int(words[i]);
      } else {
        codes[2 * i % kWords] = int(words[i] << 4 & 0xf0f0f0f0u);
        codes[(2 * i + 1) % kWords] = int(words[i] & 0xf0f0f0f0u);
      }
    }
  }
  static constexpr float kScale = kBits == 8 ? 1.0f : 0.0625f;
};

__device__ __forceinline__ uint4 load_quad(const unsigned char* from) {
  return __ldg(reinterpret_cast<const uint4*>(from));
}

// x to codes and scales. A warp takes 128 elements of a row, four a lane: one group, or several.
// Grid: (padded / 128 / warps of a block, rounded up; rows).
extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_quantise(const LinearParams p) {
  const int lane = threadIdx.x % kWarp, row = blockIdx.y;
  const int d = (blockIdx.x * (kLinearThreads / kWarp) + threadIdx.x / kWarp) * 4 * kWarp + 4 * lane;
  if (d - 4 * lane >= p.padded) return;
  const float* from = p.x + (long long)row * p.in_features + d;
  float4 quad = make_float4(0, 0, 0, 0);
  if (p.in_features % 4 == 0) {
    if (d < p.in_features) quad = *reinterpret_cast<const float4*>(from);
  } else {
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = d + i < p.in_features ? from[i] : 0;
    quad = make_float4(x[0], x[1], x[2], x[3]);
  }
  float most = max_abs(quad);
  for (int mask = 1; mask < p.group / 4; mask *= 2) most = max2(most, __shfl_xor_sync(kAllLanes, most, mask));
  const unsigned codes = quantise(quad, most > 0 ? 127 / most : 0, -127, 127);
  if (d >= p.padded) return;
  *reinterpret_cast<unsigned*>(p.codes + (long long)row * p.padded + d) = codes;
  if (d % p.group == 0) p.x_scale[(long long)(d / p.group) * p.row_pitch + row] = most / 127;
}

// Four columns of a row of outputs, from `column` on, as far as there are so many: their bytes lie together where rows
// have whole quads.
__device__ __forceinline__ float4 load_columns(const LinearParams& p, const float* row, int column) {
  if (p.out_features % 4 == 0 && column < p.out_features) return *reinterpret_cast<const float4*>(row + column);
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = column + i < p.out_features ? row[column + i] : 0;
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ float4 load_bias(const LinearParams& p, int column) {
  return p.bias ? load_columns(p, p.bias, column) : make_float4(0, 0, 0, 0);
}

__device__ __forceinline__ void store_quad(const LinearParams& p, float* rows, int row, int column, float4 quad) {
  float* to = rows + (long long)row * p.out_features + column;
  if (p.out_features % 4 == 0) {
    if (column < p.out_features) *reinterpret_cast<float4*>(to) = quad;
    return;
  }
  const float x[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < p.out_features) to[i] = x[i];
  }
}

// Many rows ----------------------------------------------------------------------------------------------------------

constexpr int kTileColumns = 128;
constexpr int kTileWords = 16;  // words of codes in shared memory at a time, 64 codes
constexpr int kGroupWords = 8;  // words after which a group may end
constexpr int kColumnPitch = kTileColumns + 4;

template <int kTileRows>
struct LinearShared {
  int x[2][kTileWords][kTileRows + 4];
  int weight[2][kTileWords][kColumnPitch];
};

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
// further on. Slices of 64 codes of both lie in shared memory, transposed, two in turn; the next one is on its way in
// registers. For each word a thread does 64 DP4A for 4 shared loads of 16 bytes, as in prefill. Bound by DP4A issue.
template <int kBits, int kTileRows>
__device__ __forceinline__ void linear_tile(const LinearParams& p, LinearShared<kTileRows>& shared) {
  using Quad = WeightQuad<kBits>;
  constexpr int kWeightQuads = 4 * kTileWords * kBits / 8 / 16;  // of a column's slice
  constexpr int kQuads = kTileWords / 4;                         // of a row's
  constexpr int kXQuads = kQuads * kTileRows > kLinearThreads ? kQuads * kTileRows / kLinearThreads : 1;  // of a thread
  constexpr int kRows = kTileRows / 8;
  const int first_column = blockIdx.x * kTileColumns, first_row = blockIdx.y * kTileRows;
  const int groups = p.padded / p.group, share = ceil_div(groups, p.splits);
  const int first_group = blockIdx.z * share, last_group = min2(first_group + share, groups);
  const int begin = first_group * p.group, end = last_group * p.group;

  // This thread brings some quads of rows' slices, and the slice of a column.
  const int load_row = threadIdx.x % kTileRows, first_quad = threadIdx.x / kTileRows;
  const bool brings = first_quad < kQuads;
  constexpr int kQuadsApart = kLinearThreads / kTileRows;  // of one row, between a thread's
  const unsigned char* x_at = p.codes + (long long)min2(first_row + load_row, p.rows - 1) * p.padded;
  const unsigned char* weight_at =
      p.weight + (long long)min2(first_column + int(threadIdx.x), p.out_features - 1) * (p.padded * kBits / 8);
  uint4 next_x[kXQuads], next_weight[kWeightQuads];
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  auto fetch = [&](int at) {
#pragma unroll
    for (int i = 0; i < kXQuads; ++i) {
      const int code = at + 16 * (first_quad + i * kQuadsApart);
      next_x[i] = brings && code < end ? load_quad(x_at + code) : nothing;
    }
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int code = at + i * 128 / kBits;
      next_weight[i] = code < end ? load_quad(weight_at + code * kBits / 8) : nothing;
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
  for (int at = begin; at < end; at += 4 * kTileWords) {
    if (at + 4 * kTileWords < end) fetch(at + 4 * kTileWords);
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
          for (int j = 0; j < 8; ++j) sum[i][j] = __dp4a(x[i], weight[j], sum[i][j]);
        }
      }
      const int done = at + 4 * (step + kGroupWords);
      if (done % p.group == 0 && done <= end) {
        const int group = done / p.group - 1;
        const float* x_scales = p.x_scale + (long long)group * p.row_pitch + first_row + row;
        const unsigned char* scales =
            reinterpret_cast<const unsigned char*>(p.scale + (long long)group * p.scale_pitch + first_column);
        float x_scale[kRows], scale[8];
#pragma unroll
        for (int i = 0; i < kRows; ++i) x_scale[i] = x_scales[i];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at_column = min2(kTileColumns / 2 * half + 4 * column, p.scale_pitch - 4 - first_column);
          const uint2 halves = __ldg(reinterpret_cast<const uint2*>(scales + 2 * at_column));
          const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
          scale[4 * half] = Quad::kScale * low.x, scale[4 * half + 1] = Quad::kScale * low.y;
          scale[4 * half + 2] = Quad::kScale * high.x, scale[4 * half + 3] = Quad::kScale * high.y;
        }
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
    if (at + 4 * kTileWords < end) put(buffer ^ 1);
    __syncthreads();
    buffer ^= 1;
  }

  float* out = p.splits > 1 ? p.partial + (long long)blockIdx.z * p.rows * p.out_features : p.out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int to_column = first_column + kTileColumns / 2 * half + 4 * column;
    const float4 bias = p.splits == 1 ? load_bias(p, to_column) : make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float* x = total[i] + 4 * half;
      const float4 quad = make_float4(x[0] + bias.x, x[1] + bias.y, x[2] + bias.z, x[3] + bias.w);
      if (first_row + row + i < p.rows) store_quad(p, out, first_row + row + i, to_column, quad);
    }
  }
}

// Sums the splits of the inputs, a thread four columns. Grid: (out_features / 4 / threads, rounded up; rows).
extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_sum(const LinearParams p) {
  const int column = 4 * (blockIdx.x * kLinearThreads + threadIdx.x), row = blockIdx.y;
  if (column >= p.out_features) return;
  float4 sum = load_bias(p, column);
  for (int split = 0; split < p.splits; ++split) {
    const float4 x = load_columns(p, p.partial + ((long long)split * p.rows + row) * p.out_features, column);
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  store_quad(p, p.out, row, column, sum);
}

// Few rows -----------------------------------------------------------------------------------------------------------

constexpr int kWarpColumns = 4;  // of a warp
constexpr int kLinearWarps = kLinearThreads / kWarp;

// A warp computes 4 columns of up to 8 rows, each lane 16 bytes of every column at a time; or several warps of a block
// do, each a share of the inputs. Each byte of the weights is read once, in whole lines. Bound by DRAM.
// Grid: columns / kWarpColumns / (kLinearWarps / p.splits), rounded up.
template <int kBits, int kRows>
__device__ __forceinline__ void linear_rows(const LinearParams& p) {
  using Quad = WeightQuad<kBits>;
  constexpr int kCodes = 4 * Quad::kWords;                 // of a lane's 16 bytes
  constexpr int kAhead = kBits == 4 && kRows < 8 ? 2 : 1;  // steps whose weights are on their way
  __shared__ float shared[kLinearWarps][kRows][kWarpColumns];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int first = (blockIdx.x * (kLinearWarps / p.splits) + warp / p.splits) * kWarpColumns;
  const int bytes = p.padded * kBits / 8;
  float total[kRows][kWarpColumns];
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) total[m][n] = 0;
  }
  const unsigned char* columns[kWarpColumns];
#pragma unroll
  for (int n = 0; n < kWarpColumns; ++n) columns[n] = p.weight + (long long)min2(first + n, p.out_features - 1) * bytes;
  const unsigned short* scales = p.scale + min2(first, p.scale_pitch - kWarpColumns);
  const int step = p.splits * kWarp;
  int unit = warp % p.splits * kWarp + lane;
  uint4 ahead[kAhead][kWarpColumns];
  auto fetch = [&](uint4* quads, int at) {
    if (at >= bytes / 16) return;
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) quads[n] = load_quad(columns[n] + 16 * at);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) fetch(ahead[i], unit + i * step);
  for (; unit < bytes / 16; unit += step) {
    uint4 raw[kWarpColumns];
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) {
      raw[n] = ahead[0][n];
#pragma unroll
      for (int i = 1; i < kAhead; ++i) ahead[i - 1][n] = ahead[i][n];
    }
    fetch(ahead[kAhead - 1], unit + kAhead * step);
    const int code = unit * kCodes, group = code / p.group;
    const uint2 halves = __ldg(reinterpret_cast<const uint2*>(scales + (long long)group * p.scale_pitch));
    const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
    const float scale[kWarpColumns] = {low.x, low.y, high.x, high.y};
    int weight[kWarpColumns][Quad::kWords];
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) Quad::unpack(raw[n], weight[n]);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      const int row = min2(m, p.rows - 1);
      int x[Quad::kWords];
      load_ints<Quad::kWords>(reinterpret_cast<const int*>(p.codes + (long long)row * p.padded + code), x);
      const float x_scale = Quad::kScale * p.x_scale[(long long)group * p.row_pitch + row];
#pragma unroll
      for (int n = 0; n < kWarpColumns; ++n) {
        int sum = kIntegersStart;
#pragma unroll
        for (int i = 0; i < Quad::kWords; ++i) sum = __dp4a(x[i], weight[n][i], sum);
        total[m][n] += exact_float(sum) * (x_scale * scale[n]);
      }
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
  if (warp % p.splits || m >= kRows || m >= p.rows || first + n >= p.out_features) return;
  float sum = p.bias ? p.bias[first + n] : 0;
  for (int i = 0; i < p.splits; ++i) sum += shared[warp + i][m][n];
  p.out[(long long)m * p.out_features + first + n] = sum;
}

#define LINEAR_TILE(ROWS, BITS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(kLinearThreads, 2) linear_tile_##ROWS##_w##BITS(const LinearParams p) { \
    __shared__ __align__(16) LinearShared<ROWS> shared;                                                                \
    linear_tile<BITS, ROWS>(p, shared);                                                                                \
  }
#define LINEAR_ROWS(ROWS, BITS)                                                                                \
  extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_##ROWS##_w##BITS(const LinearParams p) { \
    linear_rows<BITS, ROWS>(p);                                                                                \
  }
#define LINEAR(BITS)    \
  LINEAR_TILE(64, BITS) \
  LINEAR_TILE(32, BITS) \
  LINEAR_TILE(16, BITS) \
  LINEAR_ROWS(1, BITS)  \
  LINEAR_ROWS(2, BITS)  \
  LINEAR_ROWS(4, BITS)  \
  LINEAR_ROWS(8, BITS)
LINEAR(8)
LINEAR(4)

}  // namespace pascalvl
