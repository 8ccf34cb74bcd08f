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
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = d + i < p.in_features ? p.x[(long long)row * p.in_features + d + i] : 0;
  const float4 quad = make_float4(x[0], x[1], x[2], x[3]);
  float most = max_abs(quad);
  for (int mask = 1; mask < p.group / 4; mask *= 2) most = max2(most, __shfl_xor_sync(kAllLanes, most, mask));
  const unsigned codes = quantise(quad, most > 0 ? 127 / most : 0, -127, 127);
  if (d >= p.padded) return;
  *reinterpret_cast<unsigned*>(p.codes + (long long)row * p.padded + d) = codes;
  if (d % p.group == 0) p.x_scale[(long long)(d / p.group) * p.row_pitch + row] = most / 127;
}

// Many rows ----------------------------------------------------------------------------------------------------------

constexpr int kTileRows = 64;
constexpr int kTileColumns = 128;
constexpr int kTileWords = 16;  // words of codes in shared memory at a time, 64 codes
constexpr int kGroupWords = 8;  // words after which a group may end
constexpr int kRowPitch = kTileRows + 4, kColumnPitch = kTileColumns + 4;

struct LinearShared {
  int x[2][kTileWords][kRowPitch];
  int weight[2][kTileWords][kColumnPitch];
};

__device__ __forceinline__ void load_ints(const int* from, int* x) {
  const int4 low = *reinterpret_cast<const int4*>(from);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
}

// A block computes 64 rows by 128 columns, a thread 8 by 8 (columns 4 c and on, and 64 further on). Slices of 64 codes
// of both lie in shared memory, transposed, two in turn; the next one is on its way in registers. For each word a
// thread does 64 DP4A for 4 shared loads of 16 bytes, as in prefill. Bound by DP4A issue.
template <int kBits>
__device__ __forceinline__ void linear_tile(const LinearParams& p, LinearShared& shared) {
  using Quad = WeightQuad<kBits>;
  constexpr int kWeightQuads = 4 * kTileWords * kBits / 8 / 16;  // of a column's slice
  const int first_column = blockIdx.x * kTileColumns, first_row = blockIdx.y * kTileRows;
  const int groups = p.padded / p.group, share = ceil_div(groups, p.splits);
  const int first_group = blockIdx.z * share, last_group = min2(first_group + share, groups);
  const int begin = first_group * p.group, end = last_group * p.group;

  // This thread brings half a slice of a row, and the slice of a column.
  const int load_row = threadIdx.x % kTileRows, load_half = threadIdx.x / kTileRows;
  const unsigned char* x_at = p.codes + (long long)min2(first_row + load_row, p.rows - 1) * p.padded + 32 * load_half;
  const unsigned char* weight_at =
      p.weight + (long long)min2(first_column + int(threadIdx.x), p.out_features - 1) * (p.padded * kBits / 8);
  uint4 next_x[2], next_weight[kWeightQuads];
  const uint4 nothing = make_uint4(0, 0, 0, 0);
  auto fetch = [&](int at) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next_x[i] = at + 32 * load_half + 16 * i < end ? load_quad(x_at + at + 16 * i) : nothing;
    }
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      const int code = at + i * 128 / kBits;
      next_weight[i] = code < end ? load_quad(weight_at + code * kBits / 8) : nothing;
    }
  };
  auto put = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned words[4] = {next_x[i].x, next_x[i].y, next_x[i].z, next_x[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) shared.x[buffer][kGroupWords * load_half + 4 * i + j][load_row] = int(words[j]);
    }
#pragma unroll
    for (int i = 0; i < kWeightQuads; ++i) {
      int words[Quad::kWords];
      Quad::unpack(next_weight[i], words);
#pragma unroll
      for (int j = 0; j < Quad::kWords; ++j) shared.weight[buffer][Quad::kWords * i + j][threadIdx.x] = words[j];
    }
  };

  const int column = threadIdx.x % 16, row = threadIdx.x / 16 * 8;
  float total[8][8];
  int sum[8][8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
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
        int x[8], weight[8];
        load_ints(&shared.x[buffer][word][row], x);
        load_ints(&shared.x[buffer][word][row + 4], x + 4);
        load_ints(&shared.weight[buffer][word][4 * column], weight);
        load_ints(&shared.weight[buffer][word][kTileColumns / 2 + 4 * column], weight + 4);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
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
        float x_scale[8], scale[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 four = *reinterpret_cast<const float4*>(x_scales + 4 * half);
          x_scale[4 * half] = four.x, x_scale[4 * half + 1] = four.y;
          x_scale[4 * half + 2] = four.z, x_scale[4 * half + 3] = four.w;
          const int at_column = min2(kTileColumns / 2 * half + 4 * column, p.scale_pitch - 4 - first_column);
          const uint2 halves = __ldg(reinterpret_cast<const uint2*>(scales + 2 * at_column));
          const float2 low = halves_to_floats(halves.x), high = halves_to_floats(halves.y);
          scale[4 * half] = Quad::kScale * low.x, scale[4 * half + 1] = Quad::kScale * low.y;
          scale[4 * half + 2] = Quad::kScale * high.x, scale[4 * half + 3] = Quad::kScale * high.y;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
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
  for (int i = 0; i < 8; ++i) {
    const int to_row = first_row + row + i;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int to_column = first_column + j / 4 * (kTileColumns / 2) + 4 * column + j % 4;
      if (to_row >= p.rows || to_column >= p.out_features) continue;
      const float bias = p.bias && p.splits == 1 ? p.bias[to_column] : 0;
      out[(long long)to_row * p.out_features + to_column] = total[i][j] + bias;
    }
  }
}

// Sums the splits of the inputs. Grid: (out_features / threads, rounded up; rows).
extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_sum(const LinearParams p) {
  const int column = blockIdx.x * kLinearThreads + threadIdx.x;
  if (column >= p.out_features) return;
  const long long at = (long long)blockIdx.y * p.out_features + column, stride = (long long)p.rows * p.out_features;
  float sum = p.bias ? p.bias[column] : 0;
  for (int split = 0; split < p.splits; ++split) sum += p.partial[split * stride + at];
  p.out[at] = sum;
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
  constexpr int kCodes = 4 * Quad::kWords;  // of a lane's 16 bytes
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
  for (int unit = warp % p.splits * kWarp + lane; unit < bytes / 16; unit += p.splits * kWarp) {
    uint4 raw[kWarpColumns];
#pragma unroll
    for (int n = 0; n < kWarpColumns; ++n) raw[n] = load_quad(columns[n] + 16 * unit);
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
#pragma unroll
      for (int i = 0; i < Quad::kWords; i += 4) {
        load_ints(reinterpret_cast<const int*>(p.codes + (long long)row * p.padded + code + 4 * i), x + i);
      }
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

#define LINEAR(BITS)                                                                                          \
  extern "C" __global__ void __launch_bounds__(kLinearThreads, 2) linear_tile_w##BITS(const LinearParams p) { \
    __shared__ __align__(16) LinearShared shared;                                                             \
    linear_tile<BITS>(p, shared);                                                                             \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_1_w##BITS(const LinearParams p) {       \
    linear_rows<BITS, 1>(p);                                                                                  \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_2_w##BITS(const LinearParams p) {       \
    linear_rows<BITS, 2>(p);                                                                                  \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_4_w##BITS(const LinearParams p) {       \
    linear_rows<BITS, 4>(p);                                                                                  \
  }                                                                                                           \
  extern "C" __global__ void __launch_bounds__(kLinearThreads) linear_8_w##BITS(const LinearParams p) {       \
    linear_rows<BITS, 8>(p);                                                                                  \
  }
LINEAR(8)
LINEAR(4)

}  // namespace pascalvl
