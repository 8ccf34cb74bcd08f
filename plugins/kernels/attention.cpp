// The C ABI of attention and of the cache: checks arguments, chooses kernels and their grids.
#include <algorithm>
#include <cmath>

#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

constexpr int64_t kMaxStride = int64_t(1) << 47;  // bytes: times a number of layers still 64 bits
constexpr int kBlocksPerMultiprocessor = 2;       // of decode and prefill, by their registers
constexpr int kLeastTiles = 2;                    // of keys, in a prefill split

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

// As many as leave no part of the card idle: 1 unless a short chunk meets a long past.
int prefill_splits(const pascalvl_attention_args& a) {
  if (!a.causal || !a.past_length) return 1;
  const int64_t blocks = causal_tiles(a) * a.num_kv_heads * a.batch;
  const int64_t wanted = multiprocessors() * kBlocksPerMultiprocessor;
  const int64_t most = (a.cache.capacity - 1) / (kLeastTiles * prefill_keys(a.value_dim)) + 1;
  return int(std::max<int64_t>(1, std::min({most, wanted / blocks, int64_t(kMaxSplits)})));
}

// Of the past, all together.
int splits_of(const pascalvl_attention_args& a) {
  return is_decode(a) ? decode_splits(a, a.cache.capacity) + recent_splits(a) : prefill_splits(a);
}

// Parts of the workspace, in bytes.
struct AttentionSizes {
  size_t partial, codes, scale;
  size_t all() const { return partial + codes + scale; }
};

AttentionSizes sizes_of(const pascalvl_attention_args& a) {
  const size_t rows = size_t(a.batch) * a.num_heads * a.seq, splits = splits_of(a);
  AttentionSizes sizes{};
  if (is_decode(a) || splits > 1) sizes.partial = rows * splits * partial_pitch(a.value_dim) * sizeof(float);
  if (quantises_queries(a)) sizes.codes = rows * kCodeRow, sizes.scale = rows * sizeof(float);
  return sizes;
}

AttentionParams to_params(const pascalvl_attention_args& a, void* workspace) {
  AttentionParams p{};
  p.partial = static_cast<float*>(workspace);
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
  p.splits = splits_of(a);
  return p;
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

void merge(const AttentionParams& a, int batch, void* stream) {
  const MergeParams p{a.partial, a.out, a.num_heads, a.seq, a.value_dim, a.splits};
  launch(Kernel::merge_splits, {unsigned(a.num_heads), unsigned(batch), unsigned(a.seq)}, p, stream);
}

void decode(const pascalvl_attention_args& a, void* workspace, void* stream) {
  DecodeParams p{};
  p.attention = to_params(a, workspace);
  p.splits = decode_splits(a, a.cache.capacity);
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
  merge(p.attention, a.batch, stream);
}

void prefill(const pascalvl_attention_args& a, void* workspace, void* stream) {
  AttentionParams p = to_params(a, workspace);
  if (!a.causal) {
    const unsigned tiles = a.seq / prefill_rows(a.value_dim) + a.num_sequences;
    return launch(prefill_packed_kernel(a.value_dim), {tiles, unsigned(a.num_heads), 1}, p, stream);
  }
  if (quantises_queries(a)) {
    const int64_t rows = int64_t(a.batch) * a.num_heads * a.seq;
    const AttentionSizes sizes = sizes_of(a);
    auto* codes = static_cast<unsigned char*>(workspace) + sizes.partial;
    auto* scale = reinterpret_cast<float*>(codes + sizes.codes);
    const QuantiseParams quantisation{a.q, codes, scale, rows, a.key_dim, bool(a.cache.rotated)};
    launch(Kernel::quantise_queries, {unsigned((rows + kAppendWarps - 1) / kAppendWarps), 1, 1}, quantisation, stream);
    p.q_codes = codes;
    p.q_scale = scale;
  }
  launch(prefill_causal_kernel(a.value_dim <= 64 ? 64 : 128, p.cache.key_format, p.cache.value_format),
         {unsigned(a.num_kv_heads * p.splits), unsigned(causal_tiles(a)), unsigned(a.batch)}, p, stream);
  if (p.splits > 1) merge(p, a.batch, stream);
}

}  // namespace
}  // namespace pascalvl

using namespace pascalvl;

extern "C" int pascalvl_attention_workspace(const pascalvl_attention_args* args, size_t* bytes) {
  return guarded([&] {
    require(args && bytes, "The arguments are a null pointer.");
    check(*args);
    *bytes = sizes_of(*args).all();
  });
}

extern "C" int pascalvl_attention(const pascalvl_attention_args* args, void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    require(args, "The arguments are a null pointer.");
    check(*args);
    const size_t needed = sizes_of(*args).all();
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
