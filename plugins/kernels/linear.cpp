// The C ABI of linear layers: checks arguments, chooses kernels and their grids.
#include <algorithm>
#include <cmath>

#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

constexpr int kLinesAhead = 6;        // of weights that a thread of linear_quantise or of a norm asks for
constexpr int kMostAhead = 48 << 10;  // bytes of weights that may wait in the L2 for each multiprocessor
constexpr int kFloatsGroup = 32;      // inputs by which halves and floats are split: as long as a group of 128 codes
static_assert(kGeluTanh == int(PASCALVL_GELU_TANH) && kSiluGated == int(PASCALVL_SILU_GATED) &&
                  kGeluErf == int(PASCALVL_GELU_ERF),
              "numbered as in the ABI");

int up_to(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

bool in_codes(const pascalvl_linear_args& a) { return a.bits < 16; }

void check_norm(const pascalvl_linear_args& a) {
  require(a.norm >= PASCALVL_NO_NORM && a.norm <= PASCALVL_LAYER_NORM,
          "The norm is %d; expected 0 (none), 1 (RMS) or 2 (layer norm).", a.norm);
  if (a.norm != PASCALVL_LAYER_NORM) {
    require(!a.norm_bias, "Norm %d has no norm_bias; expected a null pointer.", a.norm);
  }
  if (a.norm == PASCALVL_NO_NORM) {
    require(!a.norm_weight, "Norm 0 has no norm_weight; expected a null pointer.");
    return;
  }
  require_pointer(a.norm_weight, "norm_weight");
  if (a.norm == PASCALVL_LAYER_NORM) require_pointer(a.norm_bias, "norm_bias");
  require_size(a.norm_size, "norm_size");
  require(a.in_features % a.norm_size == 0, "norm_size is %d; expected a divisor of in_features, which is %d.",
          a.norm_size, a.in_features);
  require(!in_codes(a) || a.norm_size == a.in_features || a.norm_size % a.group == 0,
          "norm_size is %d; expected in_features, which is %d, or a multiple of the groups of %d.", a.norm_size,
          a.in_features, a.group);
  require(std::isfinite(a.epsilon) && a.epsilon >= 0, "epsilon is %g; expected a finite number of at least 0.",
          double(a.epsilon));
}

void check(const pascalvl_linear_args& a) {
  require_pointer(a.x, "x");
  require_pointer(a.weight, "weight");
  require_pointer(a.out, "out");
  if (a.bias) require_pointer(a.bias, "bias");
  if (a.residual) require_pointer(a.residual, "residual");
  require_size(a.rows, "rows", PASCALVL_MAX_GRID);
  require_size(a.in_features, "in_features");
  require_size(a.out_features, "out_features");
  require(a.activation >= kNoActivation && a.activation <= kGeluErf,
          "The activation is %d; expected 0 (none), 1 (GELU by tanh), 2 (SiLU, gated) or 3 (GELU).", a.activation);
  require(a.activation != kSiluGated || a.out_features % (2 * kGatedBlock) == 0,
          "A gated layer has %d outputs; expected a multiple of 128.", a.out_features);
  require(a.bits == 32 || a.bits == 16 || a.bits == 8 || a.bits == 4,
          "The weights have %d bits; expected 32, 16, 8 or 4.", a.bits);
  if (in_codes(a)) {
    require_pointer(a.scale, "scale");
    if (a.zero) require_pointer(a.zero, "zero");
    require(a.group == 32 || a.group == 64 || a.group == 128, "Groups have %d inputs; expected 32, 64 or 128.",
            a.group);
  } else {
    require(!a.scale && !a.zero, "Weights of %d bits have no %s; expected a null pointer.", a.bits,
            a.scale ? "scale" : "zero");
  }
  check_norm(a);
}

// Inputs that lie together in a split: those that share a scale.
int group_of(const pascalvl_linear_args& a) { return in_codes(a) ? a.group : kFloatsGroup; }

// Elements of a weight's row.
int padded_inputs(const pascalvl_linear_args& a) { return up_to(a.in_features, in_codes(a) ? a.group : 128 / a.bits); }

// Rows that a block of a GEMM computes.
int gemm_rows(const pascalvl_linear_args& a) { return a.rows <= 16 ? 16 : a.rows <= 32 ? 32 : 64; }

Kernel gemm_kernel(const pascalvl_linear_args& a) {
  const int rows = gemm_rows(a);
#define PASCALVL_CHOICE(ROWS, BITS) \
  if (rows == ROWS && a.bits == BITS) return Kernel::PASCALVL_LINEAR_GEMM_NAME(ROWS, BITS);
  PASCALVL_LINEAR_GEMM(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of a GEMM");
}

Kernel gemv_kernel(const pascalvl_linear_args& a) {
  const int rows = a.rows > 4 ? 8 : a.rows == 3 ? 4 : a.rows, zero = a.zero ? 1 : 0;
#define PASCALVL_CHOICE(ROWS, BITS, ZERO)                       \
  if (rows == ROWS && a.bits == BITS && zero == ZERO) {         \
    return Kernel::PASCALVL_LINEAR_GEMV_NAME(ROWS, BITS, ZERO); \
  }
  PASCALVL_LINEAR_GEMV(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of a GEMV");
}

// How a linear layer is cut: blocks (or warps, of few rows) that share the inputs of the same outputs. By the rounds
// that this takes the card, and the length of one, but none with less than two groups (or a step of a warp).
int linear_splits(const pascalvl_linear_args& a) {
  const int groups = up_to(a.in_features, group_of(a)) / group_of(a);
  int at_once = multiprocessors(), best = 1;
  double least = 1e300;
  if (a.rows <= kGemvRows) {
    at_once *= resident_blocks(gemv_kernel(a)) * kLinearWarps;
    const int warps = (a.out_features + kWarpColumns - 1) / kWarpColumns;
    const int bytes = padded_inputs(a) * a.bits / 8, of_step = 512;
    const int most = a.activation == kSiluGated ? 2 : 4;  // where gated, half of a block's warps compute values
    for (int splits = 1; splits <= most && (splits == 1 || bytes / of_step >= splits); splits *= 2) {
      const int rounds = (warps * splits + at_once - 1) / at_once;
      const int steps = up_to(bytes, of_step * splits) / of_step / splits;
      const double time = rounds * (steps + 2.0);  // a warp begins and ends in about the time of two
      if (time < least) least = time, best = splits;
    }
    return best;
  }
  const int tiles = up_to(a.rows, gemm_rows(a)) / gemm_rows(a) * (up_to(a.out_features, kTileColumns) / kTileColumns);
  for (int splits = 1; splits <= 8 && (splits == 1 || groups / splits >= 2); ++splits) {
    const int rounds = (tiles * splits + at_once - 1) / at_once;
    const double time = double(rounds) * ((groups + splits - 1) / splits) + 0.5 * (splits > 1) * splits;
    if (time < 0.97 * least) least = time, best = splits;
  }
  return best;
}

// The kernel of a norm: with the fewest threads that have room for what is normed together, or with most.
struct NormKernel {
  Kernel kernel;
  int threads;
};

NormKernel norm_kernel(const pascalvl_linear_args& a) {
  NormKernel found{};
#define PASCALVL_CHOICE(THREADS)                                      \
  if (!found.threads || a.norm_size > 4 * kNormQuads * found.threads) \
    found = {Kernel::PASCALVL_LINEAR_NORM_NAME(THREADS), THREADS};
  PASCALVL_LINEAR_NORM(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  return found;
}

// Lines of weights to bring to the L2 while few rows are normed or quantised. Not more than come meanwhile: of a small
// layer a part, and of a large one what DRAM delivers in 2 to 5 us, which is a third to a half of an SM61's L2.
int lines_ahead(const pascalvl_linear_args& a) {
  if (a.rows > kGemvRows || (!in_codes(a) && a.norm == PASCALVL_NO_NORM)) return 0;
  const int64_t bytes = int64_t(a.out_features) * padded_inputs(a) * a.bits / 8;
  return int(std::min<int64_t>(bytes / 8, int64_t(kMostAhead) * multiprocessors()) / kLine);
}

// Parts of the workspace, in bytes.
struct LinearSizes {
  size_t normed, codes, x_scale, x_sum, partial;
  size_t all() const { return normed + codes + x_scale + x_sum + partial; }
};

LinearParams to_params(const pascalvl_linear_args& a, LinearSizes& sizes) {
  LinearParams p{};
  p.x = a.x;
  p.weight = static_cast<const unsigned char*>(a.weight);
  p.scale = a.scale;
  p.zero = a.zero;
  p.bias = a.bias;
  p.residual = a.residual;
  p.out = a.out;
  p.rows = a.rows;
  p.in_features = a.in_features;
  p.padded = padded_inputs(a);
  p.out_features = a.out_features;
  p.group = group_of(a);
  p.row_pitch = up_to(a.rows, gemm_rows(a));
  p.scale_pitch = up_to(a.out_features, 8);
  p.splits = linear_splits(a);
  p.activation = a.activation;
  p.lines_ahead = lines_ahead(a);
  if (!in_codes(a)) {
    if (a.norm != PASCALVL_NO_NORM) sizes.normed = (size_t(a.rows) * a.in_features * sizeof(float) + 15) / 16 * 16;
  } else {
    sizes.codes = size_t(std::max(a.rows, kGemvRows)) * p.padded;  // kernels of few rows read some that there are not
    sizes.x_scale = size_t(p.padded / p.group) * p.row_pitch * sizeof(float);
    sizes.x_sum = a.zero ? sizes.x_scale : 0;
  }
  sizes.partial = a.rows > kGemvRows && p.splits > 1 ? size_t(p.splits) * a.rows * a.out_features * sizeof(float) : 0;
  return p;
}

void linear(const pascalvl_linear_args& a, LinearParams p, const LinearSizes& sizes, unsigned char* workspace,
            void* stream) {
  auto part = [&](size_t bytes) { return workspace += bytes, workspace - bytes; };
  float* const normed = sizes.normed ? reinterpret_cast<float*>(part(sizes.normed)) : nullptr;
  p.codes = part(sizes.codes);
  p.x_scale = reinterpret_cast<float*>(part(sizes.x_scale));
  p.x_sum = reinterpret_cast<float*>(part(sizes.x_sum));
  p.partial = reinterpret_cast<float*>(part(sizes.partial));
  const unsigned rows = a.rows;
  auto with_weights = [&](int blocks, int threads) {
    const int of_blocks = kLinesAhead * threads * a.rows;
    return Dim{unsigned(blocks + up_to(p.lines_ahead, of_blocks) / of_blocks), rows, 1};
  };
  if (a.norm != PASCALVL_NO_NORM) {
    const NormKernel norm = norm_kernel(a);
    const int blocks = a.in_features / a.norm_size;
    const NormParams params{p, a.norm_weight, a.norm_bias, normed, a.norm_size, blocks, a.epsilon};
    launch(norm.kernel, with_weights(blocks, norm.threads), params, stream);
    if (normed) p.x = normed;
  } else if (in_codes(a)) {
    launch(Kernel::linear_quantise, with_weights(up_to(p.padded, 512) / 512, kLinearThreads), p, stream);
  }
  if (a.rows <= kGemvRows) {
    const int columns = kWarpColumns * (kLinearWarps / p.splits);
    const unsigned blocks = up_to(a.out_features, columns) / columns;
    return launch(gemv_kernel(a), {blocks, 1, 1}, p, stream);
  }
  const unsigned columns = up_to(a.out_features, kTileColumns) / kTileColumns;
  launch(gemm_kernel(a), {columns, unsigned(p.row_pitch / gemm_rows(a)), unsigned(p.splits)}, p, stream);
  if (p.splits > 1) {
    const int width = a.activation == kSiluGated ? a.out_features / 2 : a.out_features, of_block = 4 * kLinearThreads;
    launch(Kernel::linear_sum, {unsigned(up_to(width, of_block) / of_block), rows, 1}, p, stream);
  }
}

}  // namespace
}  // namespace pascalvl

using namespace pascalvl;

extern "C" int pascalvl_linear_workspace(const pascalvl_linear_args* args, size_t* bytes) {
  return guarded([&] {
    require(args && bytes, "The arguments are a null pointer.");
    check(*args);
    LinearSizes sizes{};
    to_params(*args, sizes);
    *bytes = sizes.all();
  });
}

extern "C" int pascalvl_linear(const pascalvl_linear_args* args, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    require(args, "The arguments are a null pointer.");
    check(*args);
    LinearSizes sizes{};
    const LinearParams p = to_params(*args, sizes);
    require(bytes >= sizes.all(), "The workspace has %zu bytes; expected at least %zu.", bytes, sizes.all());
    if (sizes.all()) require_pointer(workspace, "The workspace");
    linear(*args, p, sizes, static_cast<unsigned char*>(workspace), stream);
  });
}
