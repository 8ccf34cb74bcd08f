// The C ABI of attention and of the cache: checks arguments, chooses kernels and their grids.
#include <algorithm>
#include <cmath>

#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

constexpr int kBlocksPerMultiprocessor = 2;  // of decode and prefill, by their registers
constexpr int kLeastTiles = 2;               // of keys, in a prefill split

// Of q, or of a layer's new keys: the kernels number them.
void require_rows(int batch, int heads, int seq) {
  const int64_t rows = int64_t(batch) * heads * seq;
  require(rows <= PASCALVL_MAX_ROWS, "batch %d, %d heads and seq %d make %lld rows; expected at most %d.", batch, heads,
          seq, static_cast<long long>(rows), int(PASCALVL_MAX_ROWS));
}

void require_dim(int dim, const char* name) {
  require(dim == 64 || dim == 96 || dim == 112 || dim == 128, "%s is %d; expected 64, 96, 112 or 128.", name, dim);
}

const char* format_name(int format) {
  static const char* const names[] = {"float32", "float16", "int8", "int4"};
  return format >= kFloat32 && format <= kInt4 ? names[format] : "unknown";
}

void check_formats(const pascalvl_attention_args& a) {
  const int key = a.key_format, value = a.value_format;
  require(key >= kFloat32 && key <= kInt4 && value >= kFloat32 && value <= kInt4,
          "The cache's formats are %d and %d; expected 0 (float32), 1 (float16), 2 (int8) or 3 (int4).", key, value);
  require(key == value || (key == kInt8 && value == kInt4),
          "A cache of %s keys and %s values is not supported; expected both the same, or int8 keys and int4 values.",
          format_name(key), format_name(value));
  require(!a.rotated || is_quantised(key), "Only quantised keys are rotated; found %s.", format_name(key));
  require(!a.rotated || a.head_dim == kMaxDim, "Rotated keys have 128 channels; found head_dim %d.", a.head_dim);
}

void check_rows(const pascalvl_rows& rows, int key_format, const char* whose) {
  require_pointer(rows.key, text("%s array of keys", whose).c_str());
  require_pointer(rows.value, text("%s array of values", whose).c_str());
  if (!is_quantised(key_format)) return;
  require(rows.scale && reinterpret_cast<uintptr_t>(rows.scale) % sizeof(uint32_t) == 0,
          "%s array of scales is at %p; expected a pointer to words.", whose, static_cast<const void*>(rows.scale));
}

Rows to_rows(const pascalvl_rows& rows) {
  return {static_cast<unsigned char*>(rows.key), static_cast<unsigned char*>(rows.value), rows.scale};
}

bool is_decode(const pascalvl_attention_args& a) { return a.causal && a.seq == 1 && a.past_length && !a.past_visible; }

// Tiles of a kv head's rows.
int64_t causal_tiles(const pascalvl_attention_args& a) {
  const int64_t rows = int64_t(a.seq) * (a.num_heads / a.num_kv_heads);
  return (rows - 1) / prefill_rows(a.value_dim) + 1;
}

void check(const pascalvl_attention_args& a) {
  require_pointer(a.qkv, "qkv");
  require_pointer(a.out, "out");
  if (a.q_norm) require_pointer(a.q_norm, "q_norm");
  if (a.k_norm) require_pointer(a.k_norm, "k_norm");
  require(!a.rope_cos == !a.rope_sin, "One of rope_cos and rope_sin is a null pointer; expected both, or none.");
  if (a.rope_cos) require_pointer(a.rope_cos, "rope_cos"), require_pointer(a.rope_sin, "rope_sin");
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
  require(a.epsilon >= 0 && a.epsilon <= 1, "epsilon is %g; expected a number from 0 to 1.", double(a.epsilon));
  if (!a.causal) {
    require(a.head_dim == a.value_dim && (a.head_dim == 64 || a.head_dim == 72 || a.head_dim == 128),
            "Packed attention has head sizes 64, 72 and 128; found head_dim %d and value_dim %d.", a.head_dim,
            a.value_dim);
    require(a.batch == 1, "Packed attention has batch 1; found %d.", a.batch);
    require(a.num_heads == a.num_kv_heads, "Packed attention has as many kv heads as heads; found %d and %d.",
            a.num_kv_heads, a.num_heads);
    require_size(a.num_sequences, "num_sequences");
    require(a.cu_seqlens, "cu_seqlens is a null pointer.");
    return;
  }
  require_dim(a.head_dim, "head_dim");
  require_dim(a.value_dim, "value_dim");
  check_formats(a);
  check_rows(a.new_rows, a.key_format, "The new rows'");
  if (a.past_length) {
    check_rows(a.past, a.key_format, "The cache's");
    require_size(a.capacity, "The cache's capacity");
  }
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
int decode_splits(const pascalvl_attention_args& a) {
  const int64_t blocks = int64_t(a.batch) * a.num_kv_heads, wanted = multiprocessors() * kBlocksPerMultiprocessor;
  const int most = (a.capacity - 1) / kLeastKeys + 1;
  return std::max(1, std::min({most, int(wanted / blocks), kMaxSplits}));
}

// As many as leave no part of the card idle: 1 unless a short chunk meets a long past.
int prefill_splits(const pascalvl_attention_args& a) {
  if (!a.causal || !a.past_length) return 1;
  const int64_t blocks = causal_tiles(a) * a.num_kv_heads * a.batch;
  const int64_t wanted = multiprocessors() * kBlocksPerMultiprocessor;
  const int64_t most = (a.capacity - 1) / (kLeastTiles * prefill_keys(a.value_dim)) + 1;
  return int(std::max<int64_t>(1, std::min({most, wanted / blocks, int64_t(kMaxSplits)})));
}

int splits_of(const pascalvl_attention_args& a) { return is_decode(a) ? decode_splits(a) : prefill_splits(a); }

// Parts of the workspace, in bytes.
struct AttentionSizes {
  size_t partial, q, q_scale, key, value;  // keys and values where they do not come out
  size_t all() const { return partial + q + q_scale + key + value; }
};

size_t up_to_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

AttentionSizes sizes_of(const pascalvl_attention_args& a) {
  const size_t rows = size_t(a.batch) * a.num_heads * a.seq, splits = splits_of(a);
  AttentionSizes sizes{};
  if (is_decode(a) || splits > 1) sizes.partial = rows * splits * partial_pitch(a.value_dim) * sizeof(float);
  if (!a.causal) {
    sizes.q = sizes.key = sizes.value = rows * a.head_dim * sizeof(float);
  } else if (is_quantised(a.key_format)) {
    sizes.q = rows * kCodeRow, sizes.q_scale = up_to_16(rows * sizeof(float));
  } else {
    sizes.q = rows * a.head_dim * sizeof(float);
  }
  return sizes;
}

AttentionParams to_params(const pascalvl_attention_args& a, unsigned char* workspace) {
  const AttentionSizes sizes = sizes_of(a);
  AttentionParams p{};
  p.partial = reinterpret_cast<float*>(workspace);
  p.q = workspace + sizes.partial;
  p.q_scale = reinterpret_cast<const float*>(p.q + sizes.q);
  p.added = to_rows(a.new_rows);
  if (!a.causal) {
    p.added.key = workspace + sizes.partial + sizes.q + sizes.q_scale;
    p.added.value = p.added.key + sizes.key;
  }
  p.out = a.out;
  if (a.causal && a.past_length) {
    p.past = to_rows(a.past);
    p.capacity = a.capacity;
    p.past_length = a.past_length;
    p.past_visible = a.past_visible;
  }
  p.cu_seqlens = a.cu_seqlens;
  p.num_sequences = a.num_sequences;
  p.num_heads = a.num_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.group = a.num_heads / a.num_kv_heads;
  p.seq = a.seq;
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.splits = splits_of(a);
  return p;
}

void prologue(const pascalvl_attention_args& a, const AttentionParams& attention, void* stream) {
  PrologueParams p{};
  p.qkv = a.qkv;
  p.q_norm = a.q_norm;
  p.k_norm = a.k_norm;
  p.rope_cos = a.rope_cos;
  p.rope_sin = a.rope_sin;
  p.q = const_cast<unsigned char*>(attention.q);
  p.q_scale = const_cast<float*>(attention.q_scale);
  p.to = attention.added;
  p.tokens = int64_t(a.batch) * a.seq;
  p.seq = a.seq;
  p.num_heads = a.num_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.key_format = a.causal ? a.key_format : int(kFloat32);
  p.value_format = a.causal ? a.value_format : int(kFloat32);
  p.epsilon = a.epsilon;
  p.rotated = a.causal && a.rotated;
  const int64_t rows = p.tokens * (a.num_heads + 2 * a.num_kv_heads);
  launch(Kernel::attention_prologue, {unsigned((rows + kRowWarps - 1) / kRowWarps), 1, 1}, p, stream);
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

void check_layer(const pascalvl_append_layer& layer) {
  for (const int row : {layer.key_row, layer.value_row}) {
    require(row > 0 && row <= row_bytes(kFloat32, kMaxDim) && row % 16 == 0,
            "A row of the cache has %d bytes; expected a multiple of 16 from 16 to %d.", row,
            row_bytes(kFloat32, kMaxDim));
  }
  const bool has_scale = layer.cache.scale;
  require(has_scale == bool(layer.new_rows.scale), "Of the new rows' scales and the cache's, one is a null pointer.");
  check_rows(layer.new_rows, has_scale ? kInt8 : kFloat32, "The new rows'");
  check_rows(layer.cache, has_scale ? kInt8 : kFloat32, "The cache's");
}

AppendLayer to_layer(const pascalvl_append_layer& layer) {
  const Rows rows = to_rows(layer.new_rows);
  return {rows.key, rows.value, rows.scale, to_rows(layer.cache), layer.key_row, layer.value_row};
}

void attention(const pascalvl_attention_args& a, unsigned char* workspace, void* stream) {
  const AttentionParams p = to_params(a, workspace);
  prologue(a, p, stream);
  if (!a.causal) {
    const unsigned tiles = a.seq / prefill_rows(a.value_dim) + a.num_sequences;
    return launch(prefill_packed_kernel(a.value_dim), {tiles, unsigned(a.num_heads), 1}, p, stream);
  }
  if (is_decode(a)) {
    launch(decode_kernel(p.group, a.key_format, a.value_format),
           {unsigned(p.splits), unsigned(a.num_kv_heads), unsigned(a.batch)}, p, stream);
    return merge(p, a.batch, stream);
  }
  launch(prefill_causal_kernel(a.value_dim <= 64 ? 64 : 128, a.key_format, a.value_format),
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
    attention(*args, static_cast<unsigned char*>(workspace), stream);
  });
}

extern "C" int pascalvl_kv_append(const pascalvl_append_args* args, void* stream) {
  return guarded([&] {
    require(args, "The arguments are a null pointer.");
    const pascalvl_append_args& a = *args;
    require(a.layers, "layers is a null pointer.");
    require_size(a.num_layers, "num_layers", PASCALVL_MAX_GRID);
    require_size(a.batch, "batch", PASCALVL_MAX_GRID);
    require_size(a.num_kv_heads, "num_kv_heads", PASCALVL_MAX_GRID);
    require_size(a.seq, "seq");
    require_rows(a.batch, a.num_kv_heads, a.seq);
    require_size(a.capacity, "The cache's capacity");
    require(a.slots, "slots is a null pointer.");
    for (int i = 0; i < a.num_layers; ++i) check_layer(a.layers[i]);
    const int64_t rows = int64_t(a.batch) * a.num_kv_heads * a.seq;
    const unsigned blocks = (rows + kRowWarps - 1) / kRowWarps;
    AppendParams p{{}, a.slots, a.batch, a.num_kv_heads, a.seq, a.capacity};
    for (int first = 0; first < a.num_layers; first += kAppendLayers) {
      const int count = std::min(a.num_layers - first, kAppendLayers);
      std::transform(a.layers + first, a.layers + first + count, p.layers, to_layer);
      launch(Kernel::kv_append, {blocks, unsigned(count), 1}, p, stream);
    }
  });
}
