// The C ABI of attention and of the cache: checks arguments, chooses kernels and their grids.
#include <algorithm>
#include <cmath>

#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

static_assert(kPageSlots == PASCALVL_PAGE_SLOTS);

constexpr int kBlocksPerMultiprocessor = 2;  // of decode and prefill, by their registers
constexpr int kLeastTiles = 2;               // of keys, in a prefill split

// Of q, of a layer's new keys, or of its pool: the kernels number them.
void require_rows(int heads, int64_t count, const char* of) {
  require(heads * count <= PASCALVL_MAX_ROWS, "%d heads and %lld %s make %lld rows; expected at most %d.", heads,
          static_cast<long long>(count), of, static_cast<long long>(heads * count), int(PASCALVL_MAX_ROWS));
}

void require_pool(int num_pages, int num_kv_heads) {
  require_size(num_pages, "num_pages");
  require_rows(num_kv_heads, int64_t(num_pages) * kPageSlots, "slots");
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

int group_of(const pascalvl_attention_args& a) { return a.num_heads / a.num_kv_heads; }

// Whether a call is a decode step: the device is not asked how many tokens each sequence has.
bool is_step(const pascalvl_attention_args& a) { return a.tokens <= a.batch; }

// Whether sequences of one token go to decode's kernels. A single sequence that may have more goes to prefill alone.
bool decodes(const pascalvl_attention_args& a) {
  const int group = group_of(a);
  const bool has_kernel = group == 1 || group == 2 || group == 4 || group == 8;
  return a.causal && a.past_length && !a.past_visible && has_kernel && (is_step(a) || a.batch > 1);
}

bool prefills(const pascalvl_attention_args& a) { return !decodes(a) || !is_step(a); }

// Whether prefill's rows are so few that they go to prefill_short.
bool is_short(const pascalvl_attention_args& a) {
  return a.causal && a.value_dim > 72 && int64_t(a.tokens) * group_of(a) <= kShortRows;
}

int rows_of_tile(const pascalvl_attention_args& a) { return is_short(a) ? kShortRows : prefill_rows(a.value_dim); }

// Tiles of rows of `group` for each token: at least as many as the sequences have, and the padding.
int64_t tiles(const pascalvl_attention_args& a, int group) {
  return int64_t(a.tokens) * group / rows_of_tile(a) + a.batch + 1;
}

void check(const pascalvl_attention_args& a) {
  require_pointer(a.qkv, "qkv");
  require_pointer(a.out, "out");
  if (a.q_norm) require_pointer(a.q_norm, "q_norm");
  if (a.k_norm) require_pointer(a.k_norm, "k_norm");
  require(!a.rope_cos == !a.rope_sin, "One of rope_cos and rope_sin is a null pointer; expected both, or none.");
  if (a.rope_cos) require_pointer(a.rope_cos, "rope_cos"), require_pointer(a.rope_sin, "rope_sin");
  require(a.cu_seqlens, "cu_seqlens is a null pointer.");
  require_size(a.tokens, "tokens");
  require_size(a.num_heads, "num_heads", PASCALVL_MAX_GRID);
  require_size(a.num_kv_heads, "num_kv_heads", PASCALVL_MAX_GRID);
  require_rows(a.num_heads, a.tokens, "tokens");
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
    require_size(a.batch, "batch");
    require(a.num_heads == a.num_kv_heads, "Packed attention has as many kv heads as heads; found %d and %d.",
            a.num_kv_heads, a.num_heads);
    return;
  }
  require_size(a.batch, "batch", PASCALVL_MAX_GRID);
  require_dim(a.head_dim, "head_dim");
  require_dim(a.value_dim, "value_dim");
  check_formats(a);
  check_rows(a.new_rows, a.key_format, "The new rows'");
  if (a.past_length) {
    check_rows(a.pool, a.key_format, "The pool's");
    require(a.page_table, "page_table is a null pointer.");
    require_pool(a.num_pages, a.num_kv_heads);
    require_size(a.sequence_pages, "sequence_pages");
    const int64_t slots = int64_t(a.batch) * a.sequence_pages * kPageSlots;
    require(slots <= PASCALVL_MAX_ROWS, "batch %d of %d pages makes %lld slots; expected at most %d.", a.batch,
            a.sequence_pages, static_cast<long long>(slots), int(PASCALVL_MAX_ROWS));
  }
  require(tiles(a, group_of(a)) <= PASCALVL_MAX_GRID,
          "%d tokens of %d sequences with %d query heads a kv head make %lld tiles of %d rows; expected at most %d.",
          a.tokens, a.batch, group_of(a), static_cast<long long>(tiles(a, group_of(a))), rows_of_tile(a),
          int(PASCALVL_MAX_GRID));
}

int capacity_of(const pascalvl_attention_args& a) { return a.sequence_pages * kPageSlots; }

// Into how many a sequence's past is cut at most: as many as the card runs at once for one sequence alone, none shorter
// than it pays. Other sequences do not matter: see decode_share.
int decode_splits(const pascalvl_attention_args& a) {
  const int wanted = multiprocessors() * kBlocksPerMultiprocessor, most = capacity_of(a) / kLeastKeys;
  return std::max(1, std::min({most, wanted / a.num_kv_heads, kMaxSplits}));
}

// As many as leave no part of the card idle: 1 unless a short chunk meets a long past.
int prefill_splits(const pascalvl_attention_args& a) {
  if (!a.causal || !a.past_length) return 1;
  const int64_t rows = int64_t(a.tokens) * group_of(a);
  const int64_t blocks = ((rows - 1) / rows_of_tile(a) + a.batch) * a.num_kv_heads;
  const int64_t wanted = multiprocessors() * kBlocksPerMultiprocessor;
  const int64_t most = capacity_of(a) / (kLeastTiles * prefill_keys(a.value_dim));
  return int(std::max<int64_t>(1, std::min({most, wanted / blocks, int64_t(kMaxSplits)})));
}

// Parts of the workspace, in bytes.
struct AttentionSizes {
  size_t decoded, prefilled;      // what splits leave
  size_t q, q_scale, key, value;  // keys and values where they do not come out
  size_t all() const { return decoded + prefilled + q + q_scale + key + value; }
};

size_t up_to_16(size_t bytes) { return (bytes + 15) / 16 * 16; }

AttentionSizes sizes_of(const pascalvl_attention_args& a) {
  const size_t rows = size_t(a.num_heads) * a.tokens, partial = partial_pitch(a.value_dim) * sizeof(float);
  AttentionSizes sizes{};
  if (decodes(a)) sizes.decoded = size_t(a.batch) * a.num_heads * decode_splits(a) * partial;
  if (prefills(a) && prefill_splits(a) > 1) sizes.prefilled = rows * prefill_splits(a) * partial;
  if (!a.causal) {
    sizes.q = sizes.key = sizes.value = rows * a.head_dim * sizeof(float);
  } else if (is_quantised(a.key_format)) {
    sizes.q = rows * kCodeRow, sizes.q_scale = up_to_16(rows * sizeof(float));
  } else {
    sizes.q = rows * a.head_dim * sizeof(float);
  }
  return sizes;
}

// Those of all kernels; `partial` and `splits` are each one's own.
AttentionParams to_params(const pascalvl_attention_args& a, unsigned char* workspace) {
  const AttentionSizes sizes = sizes_of(a);
  AttentionParams p{};
  p.q = workspace + sizes.decoded + sizes.prefilled;
  p.q_scale = reinterpret_cast<const float*>(p.q + sizes.q);
  p.added = to_rows(a.new_rows);
  if (!a.causal) {
    p.added.key = const_cast<unsigned char*>(p.q) + sizes.q + sizes.q_scale;
    p.added.value = p.added.key + sizes.key;
  }
  p.out = a.out;
  p.cu_seqlens = a.cu_seqlens;
  p.tokens = a.tokens;
  p.batch = a.batch;
  if (a.causal && a.past_length) {
    p.pool = to_rows(a.pool);
    p.past_length = a.past_length;
    p.page_table = a.page_table;
    p.past_visible = a.past_visible;
    p.num_pages = a.num_pages;
    p.sequence_pages = a.sequence_pages;
  }
  p.num_heads = a.num_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.group = group_of(a);
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.scale_log2 = a.softmax_scale * 1.4426950408889634f;
  p.splits = 1;
  p.decodes = decodes(a);
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
  p.tokens = a.tokens;
  p.num_heads = a.num_heads;
  p.num_kv_heads = a.num_kv_heads;
  p.head_dim = a.head_dim;
  p.value_dim = a.value_dim;
  p.key_format = a.causal ? a.key_format : int(kFloat32);
  p.value_format = a.causal ? a.value_format : int(kFloat32);
  p.epsilon = a.epsilon;
  p.rotated = a.causal && a.rotated;
  const int64_t rows = int64_t(a.tokens) * (a.num_heads + 2 * a.num_kv_heads);
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

Kernel prefill_short_kernel(int key_format, int value_format) {
#define PASCALVL_CHOICE(DIM, KEY, VALUE)                         \
  if (key_format == KEY && value_format == VALUE) {              \
    return Kernel::PASCALVL_PREFILL_SHORT_NAME(DIM, KEY, VALUE); \
  }
  PASCALVL_PREFILL_SHORT(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of prefill of few rows");
}

Kernel prefill_packed_kernel(int dim) {
#define PASCALVL_CHOICE(DIM) \
  if (dim == DIM) return Kernel::PASCALVL_PREFILL_PACKED_NAME(DIM);
  PASCALVL_PREFILL_PACKED(PASCALVL_CHOICE)
#undef PASCALVL_CHOICE
  no_kernel("of packed prefill");
}

void check_layer(const pascalvl_append_layer& layer) {
  for (const int row : {layer.key_row, layer.value_row}) {
    require(row > 0 && row <= row_bytes(kFloat32, kMaxDim) && row % 16 == 0,
            "A row of the cache has %d bytes; expected a multiple of 16 from 16 to %d.", row,
            row_bytes(kFloat32, kMaxDim));
  }
  const bool has_scale = layer.pool.scale;
  require(has_scale == bool(layer.new_rows.scale), "Of the new rows' scales and the pool's, one is a null pointer.");
  check_rows(layer.new_rows, has_scale ? kInt8 : kFloat32, "The new rows'");
  check_rows(layer.pool, has_scale ? kInt8 : kFloat32, "The pool's");
}

AppendLayer to_layer(const pascalvl_append_layer& layer) {
  const Rows rows = to_rows(layer.new_rows);
  return {rows.key, rows.value, rows.scale, to_rows(layer.pool), layer.key_row, layer.value_row};
}

void attention(const pascalvl_attention_args& a, unsigned char* workspace, void* stream) {
  AttentionParams p = to_params(a, workspace);
  prologue(a, p, stream);
  if (!a.causal) {
    return launch(prefill_packed_kernel(a.value_dim), {unsigned(tiles(a, 1)), unsigned(a.num_heads), 1}, p, stream);
  }
  const AttentionSizes sizes = sizes_of(a);
  MergeParams merge{};
  if (decodes(a)) {
    p.partial = reinterpret_cast<float*>(workspace);
    p.splits = decode_splits(a);
    launch(decode_kernel(p.group, a.key_format, a.value_format),
           {unsigned(p.splits), unsigned(a.num_kv_heads), unsigned(a.batch)}, p, stream);
    merge.decoded = p.partial;
    merge.decode_splits = p.splits;
  }
  if (prefills(a)) {
    p.partial = sizes.prefilled ? reinterpret_cast<float*>(workspace + sizes.decoded) : nullptr;
    p.splits = prefill_splits(a);
    const int dim = a.value_dim <= 64 ? 64 : 128;
    launch(is_short(a) ? prefill_short_kernel(a.key_format, a.value_format)
                       : prefill_causal_kernel(dim, a.key_format, a.value_format),
           {unsigned(a.num_kv_heads * p.splits), unsigned(tiles(a, p.group)), 1}, p, stream);
    merge.prefilled = p.partial;
    merge.prefill_splits = p.splits;
  }
  if (!merge.decoded && !merge.prefilled) return;
  merge.out = a.out;
  merge.cu_seqlens = a.cu_seqlens;
  merge.tokens = a.tokens;
  merge.batch = a.batch;
  merge.num_heads = a.num_heads;
  merge.value_dim = a.value_dim;
  launch(Kernel::merge_splits, {unsigned(a.tokens), unsigned(a.num_heads), 1}, merge, stream);
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
    require_size(a.num_kv_heads, "num_kv_heads", PASCALVL_MAX_GRID);
    require_size(a.tokens, "tokens");
    require_rows(a.num_kv_heads, a.tokens, "tokens");
    require_pool(a.num_pages, a.num_kv_heads);
    require(a.slots, "slots is a null pointer.");
    for (int i = 0; i < a.num_layers; ++i) check_layer(a.layers[i]);
    const int64_t rows = int64_t(a.num_kv_heads) * a.tokens;
    const unsigned blocks = (rows + kRowWarps - 1) / kRowWarps;
    AppendParams p{{}, a.slots, a.num_kv_heads, a.tokens, a.num_pages};
    for (int first = 0; first < a.num_layers; first += kAppendLayers) {
      const int count = std::min(a.num_layers - first, kAppendLayers);
      std::transform(a.layers + first, a.layers + first + count, p.layers, to_layer);
      launch(Kernel::kv_append, {blocks, unsigned(count), 1}, p, stream);
    }
  });
}
