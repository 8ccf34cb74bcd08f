// The C ABI: checks arguments, chooses kernels and their grids.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "plugins/kernels/launch.h"
#include "plugins/kernels/params.h"
#include "plugins/kernels/pascalvl.h"

namespace pascalvl {
namespace {

constexpr int kLinesAhead = 6;        // of weights that a thread of linear_quantise asks for
constexpr int kMostAhead = 48 << 10;  // bytes of weights that may wait in the L2 for each multiprocessor
constexpr int kHalvesGroup = 32;      // inputs by which weights in halves are split: as long as a group of 128 codes
static_assert(kGeluTanh == int(PASCALVL_GELU_TANH) && kSiluGated == int(PASCALVL_SILU_GATED), "numbered as in the ABI");
constexpr int kMaxDim = 128;
constexpr int64_t kMaxStride = int64_t(1) << 47;  // bytes: times a number of layers still 64 bits
constexpr int kBlocksPerMultiprocessor = 2;       // of decode blocks, by their registers

thread_local std::string last_error;

struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Values>
std::string text(const char* format, Values... values) {
  char buffer[320];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

template <typename... Values>
void require(bool condition, const char* format, Values... values) {
  if (!condition) throw BadArgument(text(format, values...));
}

// Runs what may throw, and turns that into a status and a message.
template <typename Work>
int guarded(Work work) {
  try {
    work();
    return PASCALVL_OK;
  } catch (const CudaError& error) {
    last_error = error.what();
    return PASCALVL_CUDA_ERROR;
  } catch (const std::exception& error) {
    last_error = error.what();
    return PASCALVL_BAD_ARGUMENT;
  }
}

void require_pointer(const void* pointer, const char* name) {
  require(pointer, "%s is a null pointer.", name);
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, "%s is not aligned to 16 bytes.", name);
}

// The sizes that are multiplied below are within these bounds; products that may leave 32 bits are made in 64.
void require_size(int value, const char* name, int most = PASCALVL_MAX_SIZE) {
  require(value > 0, "%s is %d; it must be at least 1.", name, value);
  require(value <= most, "%s is %d; it must be at most %d.", name, value, most);
}

// Of q, or of a layer's new keys: the kernels number them.
void require_rows(int batch, int heads, int seq) {
  const int64_t rows = int64_t(batch) * heads * seq;
  require(rows <= PASCALVL_MAX_ROWS, "batch %d, %d heads and seq %d make %lld rows; expected at most %d.", batch, heads,
          seq, static_cast<long long>(rows), int(PASCALVL_MAX_ROWS));
}

// From a layer's rows (or scales) to the next one's.
void require_stride(int64_t bytes, int multiple) {
  require(bytes % multiple == 0 && bytes >= -kMaxStride && bytes <= kMaxStride,
          "A layer's stride is %lld bytes; expected a multiple of %d, and 2^47 at most.", static_cast<long long>(bytes),
          multiple);
}

void require_dim(int dim, const char* name) {
  require(dim == 64 || dim == 96 || dim == 112 || dim == 128, "%s is %d; expected 64, 96, 112 or 128.", name, dim);
}

const char* format_name(int format) {
  static const char* const names[] = {"float32", "float16", "int8", "int4"};
  return format >= kFloat32 && format <= kInt4 ? names[format] : "unknown";
}

void check_cache(const pascalvl_cache& cache, int key_dim) {
  require(cache.key_format >= kFloat32 && cache.key_format <= kInt4 && cache.value_format >= kFloat32 &&
              cache.value_format <= kInt4,
          "The cache's formats are %d and %d; expected 0 (float32), 1 (float16), 2 (int8) or 3 (int4).",
          cache.key_format, cache.value_format);
  require(
      is_quantised(cache.key_format) ? is_quantised(cache.value_format) : cache.key_format == cache.value_format,
      "A cache of %s keys and %s values is not supported; expected both float32, both float16, or each int8 or int4.",
      format_name(cache.key_format), format_name(cache.value_format));
  require_size(cache.capacity, "The cache's capacity");
  require_pointer(cache.key, "The cache of keys");
  require_pointer(cache.value, "The cache of values");
  if (is_quantised(cache.key_format)) {
    require(cache.key_scale && cache.value_scale, "A quantised cache needs arrays of scales; one is a null pointer.");
  }
  require(!cache.rotated || is_quantised(cache.key_format), "Only quantised keys are rotated; found %s.",
          format_name(cache.key_format));
  require(!cache.rotated || key_dim == kMaxDim, "Rotated keys have 128 channels; found key_dim %d.", key_dim);
}

Cache to_cache(const pascalvl_cache& c) {
  return {static_cast<unsigned char*>(c.key),
          static_cast<unsigned char*>(c.value),
          static_cast<unsigned short*>(c.key_scale),
          static_cast<unsigned short*>(c.value_scale),
          c.key_format,
          c.value_format,
          c.capacity};
}

bool is_decode(const pascalvl_attention_args& a) { return a.causal && a.seq == 1 && a.past_length && !a.past_visible; }

bool has_recent(const pascalvl_attention_args& a) { return a.causal && a.seq == 1 && a.recent_length; }

bool quantises_queries(const pascalvl_attention_args& a) {  // in a launch of its own
  return a.causal && a.past_length && is_quantised(a.cache.key_format) && !is_decode(a);
}

// Tiles of a kv head's rows.
int64_t causal_tiles(const pascalvl_attention_args& a) {
  const int64_t rows = int64_t(a.seq) * (a.num_heads / a.num_kv_heads);
  return (rows - 1) / prefill_rows(a.value_dim) + 1;
}

void check_recent(const pascalvl_attention_args& a) {
  require(a.past_length && is_quantised(a.cache.key_format), "Recent tokens lie beside a quantised cache; found %s.",
          a.past_length ? format_name(a.cache.key_format) : "none");
  require(!a.past_visible, "Recent tokens cannot be had together with past_visible; expected one of them to be null.");
  const pascalvl_cache& recent = a.recent;
  require(recent.key_format == kFloat16 && recent.value_format == kFloat16 && !recent.rotated,
          "Recent keys and values are %s%s and %s; expected float16.", recent.rotated ? "rotated " : "",
          format_name(recent.key_format), format_name(recent.value_format));
  require_size(recent.capacity, "The recent rows' capacity");
  require_pointer(recent.key, "The cache of recent keys");
  require_pointer(recent.value, "The cache of recent values");
}

void check(const pascalvl_attention_args& a) {
  require_pointer(a.q, "q");
  require_pointer(a.k, "k");
  require_pointer(a.v, "v");
  require_pointer(a.out, "out");
  require_size(a.batch, "batch", PASCALVL_MAX_GRID);
  require_size(a.num_heads, "num_heads", PASCALVL_MAX_GRID);
  require_size(a.num_kv_heads, "num_kv_heads", PASCALVL_MAX_GRID);
  require_size(a.seq, "seq");
  require_rows(a.batch, a.num_heads, a.seq);
  require(a.num_heads % a.num_kv_heads == 0, "num_heads %d is not a multiple of num_kv_heads %d.", a.num_heads,
          a.num_kv_heads);
  require(std::fabs(a.softmax_scale) <= PASCALVL_MAX_SOFTMAX_SCALE,
          "softmax_scale is %g; expected a number between -%g and %g.", double(a.softmax_scale),
          double(PASCALVL_MAX_SOFTMAX_SCALE), double(PASCALVL_MAX_SOFTMAX_SCALE));
  if (!a.causal) {
    require(a.key_dim == a.value_dim && (a.key_dim == 64 || a.key_dim == 72 || a.key_dim == 128),
            "Packed attention has head sizes 64, 72 and 128; found key_dim %d and value_dim %d.", a.key_dim,
            a.value_dim);
    require(a.batch == 1, "Packed attention has batch 1; found %d.", a.batch);
    require(a.num_heads == a.num_kv_heads, "Packed attention has as many kv heads as heads; found %d and %d.",
            a.num_kv_heads, a.num_heads);
    require_size(a.num_sequences, "num_sequences");
    require(a.cu_seqlens, "cu_seqlens is a null pointer.");
    return;
  }
  require_dim(a.key_dim, "key_dim");
  require_dim(a.value_dim, "value_dim");
  if (a.past_length) check_cache(a.cache, a.key_dim);
  if (has_recent(a)) check_recent(a);
  if (is_decode(a)) {
    const int group = a.num_heads / a.num_kv_heads;
    require(group == 1 || group == 2 || group == 4 || group == 8,
            "Decode has 1, 2, 4 or 8 query heads a kv head; found %d.", group);
  } else {
    require(causal_tiles(a) <= PASCALVL_MAX_GRID,
            "seq %d with %d query heads a kv head makes %lld tiles of %d rows; expected at most %d.", a.seq,
            a.num_heads / a.num_kv_heads, static_cast<long long>(causal_tiles(a)), prefill_rows(a.value_dim),
            int(PASCALVL_MAX_GRID));
  }
}

// Of a cache's rows: as many splits as the card runs at once, none shorter than it pays.
int decode_splits(const pascalvl_attention_args& a, int capacity) {
  const int64_t blocks = int64_t(a.batch) * a.num_kv_heads, wanted = multiprocessors() * kBlocksPerMultiprocessor;
  const int most = (capacity - 1) / kLeastKeys + 1;
  return std::max(1, std::min({most, int(wanted / blocks), kMaxSplits}));
}

int recent_splits(const pascalvl_attention_args& a) { return has_recent(a) ? decode_splits(a, a.recent.capacity) : 0; }

size_t workspace_bytes(const pascalvl_attention_args& a) {
  const size_t rows = size_t(a.batch) * a.num_heads;
  if (is_decode(a)) {
    const size_t splits = decode_splits(a, a.cache.capacity) + recent_splits(a);
    return rows * splits * partial_pitch(a.value_dim) * sizeof(float);
  }
  return quantises_queries(a) ? rows * a.seq * (kCodeRow + sizeof(float)) : 0;
}

AttentionParams to_params(const pascalvl_attention_args& a) {
  AttentionParams p{};
  p.q = a.q;
  p.k = a.k;
  p.v = a.v;
  p.out = a.out;
  if (a.causal && a.past_length) p.cache = to_cache(a.cache);
  p.past_length = a.causal ? a.past_length : nullptr;
  p.past_visible = a.past_visible;
  p.cu_seqlens = a.cu_seqlens;
  p.num_sequences = a.num_sequences;
  p.num_heads = a.num_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.group = a.num_heads / a.num_kv_heads;
  p.seq = a.seq;
  p.key_dim = a.key_dim;
  p.value_dim = a.value_dim;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  return p;
}

template <typename Params>
void launch(Kernel kernel, Dim grid, const Params& params, void* stream) {
  if (kKernelParamBytes[int(kernel)] != sizeof params) throw std::logic_error("A kernel was given another's params.");
  launch(kernel, grid, static_cast<const void*>(&params), stream);
}

[[noreturn]] void no_kernel(const char* name) {
  throw std::logic_error(text("There is no kernel %s for these arguments.", name));
}

Kernel decode_kernel(int group, int key_format, int value_format) {
#define PASCALVL_CHOICE(GROUP, KEY, VALUE)                            \
  if (group == GROUP && key_format == KEY && value_format == VALUE) { \
    return Kernel::PASCALVL_DECODE_NAME(GROUP, KEY, VALUE);           \
  }
  PASCALVL_DECODE(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of decode");
}

Kernel prefill_causal_kernel(int dim, int key_format, int value_format) {
#define PASCALVL_CHOICE(DIM, KEY, VALUE)                          \
  if (dim == DIM && key_format == KEY && value_format == VALUE) { \
    return Kernel::PASCALVL_PREFILL_CAUSAL_NAME(DIM, KEY, VALUE); \
  }
  PASCALVL_PREFILL_CAUSAL(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of causal prefill");
}

Kernel prefill_packed_kernel(int dim) {
#define PASCALVL_CHOICE(DIM) \
  if (dim == DIM) return Kernel::PASCALVL_PREFILL_PACKED_NAME(DIM);
  PASCALVL_PREFILL_PACKED(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of packed prefill");
}

void decode(const pascalvl_attention_args& a, void* workspace, void* stream) {
  DecodeParams p{};
  p.attention = to_params(a);
  p.partial = static_cast<float*>(workspace);
  p.splits = decode_splits(a, a.cache.capacity);
  p.all_splits = p.splits + recent_splits(a);
  p.rotated = a.cache.rotated;
  const auto launch_splits = [&] {
    const Cache& cache = p.attention.cache;
    launch(decode_kernel(p.attention.group, cache.key_format, cache.value_format),
           {unsigned(p.splits), unsigned(a.num_kv_heads), unsigned(a.batch)}, p, stream);
  };
  launch_splits();
  if (has_recent(a)) {
    p.attention.cache = to_cache(a.recent);
    p.attention.past_length = a.recent_length;
    p.first_split = p.splits;
    p.splits = recent_splits(a);
    p.rotated = false;
    launch_splits();
  }
  launch(Kernel::decode_merge, {unsigned(a.num_heads), unsigned(a.batch), 1}, p, stream);
}

void prefill(const pascalvl_attention_args& a, void* workspace, void* stream) {
  AttentionParams p = to_params(a);
  if (!a.causal) {
    const unsigned tiles = a.seq / prefill_rows(a.value_dim) + a.num_sequences;
    return launch(prefill_packed_kernel(a.value_dim), {tiles, unsigned(a.num_heads), 1}, p, stream);
  }
  if (quantises_queries(a)) {
    const int64_t rows = int64_t(a.batch) * a.num_heads * a.seq;
    auto* codes = static_cast<unsigned char*>(workspace);
    auto* scale = reinterpret_cast<float*>(codes + rows * kCodeRow);
    const QuantiseParams quantisation{a.q, codes, scale, rows, a.key_dim, bool(a.cache.rotated)};
    launch(Kernel::quantise_queries, {unsigned((rows + kAppendWarps - 1) / kAppendWarps), 1, 1}, quantisation, stream);
    p.q_codes = codes;
    p.q_scale = scale;
  }
  launch(prefill_causal_kernel(a.value_dim <= 64 ? 64 : 128, p.cache.key_format, p.cache.value_format),
         {unsigned(a.num_kv_heads), unsigned(causal_tiles(a)), unsigned(a.batch)}, p, stream);
}

int up_to(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

void check(const pascalvl_linear_args& a) {
  require_pointer(a.x, "x");
  require_pointer(a.weight, "weight");
  require_pointer(a.out, "out");
  if (a.bias) require_pointer(a.bias, "bias");
  if (a.residual) require_pointer(a.residual, "residual");
  require_size(a.rows, "rows", PASCALVL_MAX_GRID);
  require_size(a.in_features, "in_features");
  require_size(a.out_features, "out_features");
  require(a.activation >= kNoActivation && a.activation <= kSiluGated,
          "The activation is %d; expected 0 (none), 1 (GELU by tanh) or 2 (SiLU, gated).", a.activation);
  require(a.activation != kSiluGated || a.out_features % (2 * kGatedBlock) == 0,
          "A gated layer has %d outputs; expected a multiple of 128.", a.out_features);
  require(a.bits == 16 || a.bits == 8 || a.bits == 4, "The weights have %d bits; expected 16, 8 or 4.", a.bits);
  if (a.bits == 16) {
    require(!a.scale && !a.zero, "Weights of 16 bits have no %s; expected a null pointer.", a.scale ? "scale" : "zero");
    return;
  }
  require_pointer(a.scale, "scale");
  if (a.zero) require_pointer(a.zero, "zero");
  require(a.group == 32 || a.group == 64 || a.group == 128, "Groups have %d inputs; expected 32, 64 or 128.", a.group);
}

// Inputs that lie together in a split: those that share a scale.
int group_of(const pascalvl_linear_args& a) { return a.bits == 16 ? kHalvesGroup : a.group; }

// Elements of a weight's row.
int padded_inputs(const pascalvl_linear_args& a) { return up_to(a.in_features, a.bits == 16 ? 8 : a.group); }

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

// Lines of weights to bring to the L2 while few rows are quantised. Not more than come meanwhile: of a small layer a
// part, and of a large one what DRAM delivers in 2 to 5 us, which is a third to a half of an SM61's L2.
int lines_ahead(const pascalvl_linear_args& a) {
  if (a.rows > kGemvRows || a.bits == 16) return 0;
  const int64_t bytes = int64_t(a.out_features) * padded_inputs(a) * a.bits / 8;
  return int(std::min<int64_t>(bytes / 8, int64_t(kMostAhead) * multiprocessors()) / kLine);
}

// Parts of the workspace, in bytes.
struct LinearSizes {
  size_t codes, x_scale, x_sum, partial;
  size_t all() const { return codes + x_scale + x_sum + partial; }
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
  if (a.bits < 16) {
    sizes.codes = size_t(std::max(a.rows, kGemvRows)) * p.padded;  // kernels of few rows read some that there are not
    sizes.x_scale = size_t(p.padded / p.group) * p.row_pitch * sizeof(float);
    sizes.x_sum = a.zero ? sizes.x_scale : 0;
  }
  sizes.partial = a.rows > kGemvRows && p.splits > 1 ? size_t(p.splits) * a.rows * a.out_features * sizeof(float) : 0;
  return p;
}

void linear(const pascalvl_linear_args& a, LinearParams p, const LinearSizes& sizes, unsigned char* workspace,
            void* stream) {
  p.codes = workspace;
  p.x_scale = reinterpret_cast<float*>(workspace + sizes.codes);
  p.x_sum = reinterpret_cast<float*>(workspace + sizes.codes + sizes.x_scale);
  p.partial = reinterpret_cast<float*>(workspace + sizes.codes + sizes.x_scale + sizes.x_sum);
  const unsigned rows = a.rows;
  if (a.bits < 16) {
    const int of_blocks = kLinesAhead * kLinearThreads * a.rows;
    const unsigned blocks = up_to(p.padded, 512) / 512 + up_to(p.lines_ahead, of_blocks) / of_blocks;
    launch(Kernel::linear_quantise, {blocks, rows, 1}, p, stream);
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

extern "C" int pascalvl_attention_workspace(const pascalvl_attention_args* args, size_t* bytes) {
  return guarded([&] {
    require(args && bytes, "The arguments are a null pointer.");
    check(*args);
    *bytes = workspace_bytes(*args);
  });
}

extern "C" int pascalvl_attention(const pascalvl_attention_args* args, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    require(args, "The arguments are a null pointer.");
    check(*args);
    const size_t needed = workspace_bytes(*args);
    require(bytes >= needed, "The workspace has %zu bytes; expected at least %zu.", bytes, needed);
    if (needed) require_pointer(workspace, "The workspace");
    is_decode(*args) ? decode(*args, workspace, stream) : prefill(*args, workspace, stream);
  });
}

extern "C" int pascalvl_kv_append(const pascalvl_append_args* args, void* stream) {
  return guarded([&] {
    require(args, "The arguments are a null pointer.");
    const pascalvl_append_args& a = *args;
    require_pointer(a.key, "key");
    require_pointer(a.value, "value");
    require_size(a.layers, "layers", PASCALVL_MAX_GRID);
    require_size(a.batch, "batch", PASCALVL_MAX_GRID);
    require_size(a.num_kv_heads, "num_kv_heads", PASCALVL_MAX_GRID);
    require_size(a.seq, "seq");
    require_rows(a.batch, a.num_kv_heads, a.seq);
    require_dim(a.key_dim, "key_dim");
    require_dim(a.value_dim, "value_dim");
    require(a.past_length || a.slots, "past_length and slots are null pointers; expected one of them.");
    check_cache(a.cache, a.key_dim);
    if (a.layers > 1) {
      require_stride(a.key_stride, 16);
      require_stride(a.value_stride, 16);
      if (is_quantised(a.cache.key_format)) {
        require_stride(a.key_scale_stride, 2);
        require_stride(a.value_scale_stride, 2);
      }
    }
    const AppendParams p{
        a.key,          a.value,        to_cache(a.cache),  a.past_length,        a.slots,
        a.key_stride,   a.value_stride, a.key_scale_stride, a.value_scale_stride, a.batch,
        a.num_kv_heads, a.seq,          a.key_dim,          a.value_dim,          bool(a.cache.rotated)};
    const int64_t rows = int64_t(a.batch) * a.num_kv_heads * a.seq;
    launch(Kernel::kv_append, {unsigned((rows + kAppendWarps - 1) / kAppendWarps), 2, unsigned(a.layers)}, p, stream);
  });
}

extern "C" int pascalvl_greedy(const float* logits, int32_t rows, int32_t vocab_size, int32_t* token, float* logit,
                               void* stream) {
  return guarded([&] {
    require(logits && token && logit, "logits, token or logit is a null pointer.");
    require_size(rows, "rows");
    require_size(vocab_size, "vocab_size");
    launch(Kernel::greedy_choice, {unsigned(rows), 1, 1}, GreedyParams{logits, token, logit, vocab_size}, stream);
  });
}

extern "C" size_t pascalvl_row_bytes(int32_t format, int32_t dim) {
  return format >= kFloat32 && format <= kInt4 && dim > 0 && dim <= kMaxDim ? row_bytes(format, dim) : 0;
}

extern "C" int pascalvl_load(void) { return guarded(load_kernels); }

extern "C" const char* pascalvl_last_error(void) { return last_error.c_str(); }
