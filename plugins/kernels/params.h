// What the kernels are told: plain structs that the host fills and passes by value. Also the byte layout of the cache.
#pragma once

#ifdef __CUDACC__
#define PASCALVL_BOTH_SIDES __host__ __device__
#else
#define PASCALVL_BOTH_SIDES
#endif

namespace pascalvl {

// How the elements of a cache row are stored. A row is one token's key (or value) of one head; rows start on 16-byte
// boundaries. kInt8 and kInt4 have one scale a row, in half: element = code * scale.
enum Format : int {
  kFloat32 = 0,
  kFloat16 = 1,
  kInt8 = 2,  // two's complement, -127..127
  // Code + 8 in a nibble; of eight elements, byte i holds number i low and number i + 4 high. The element of largest
  // magnitude has code -8, so that the scale has the other sign: all 16 codes are of use.
  kInt4 = 3,
};

// Bytes of a row of `dim` elements.
PASCALVL_BOTH_SIDES constexpr int row_bytes(int format, int dim) {
  const int bits = format == kFloat32 ? 32 : format == kFloat16 ? 16 : format == kInt8 ? 8 : 4;
  return (dim * bits / 8 + 15) / 16 * 16;
}

PASCALVL_BOTH_SIDES constexpr bool is_quantised(int format) { return format == kInt8 || format == kInt4; }

constexpr int kPageSlots = 128;  // of a page of the cache, a token each

// Keys and values of one layer: rows of bytes, and where they are quantised a word for each key and value, the key's
// scale in its lower half, the value's in its upper one. New ones are [num_kv_heads, tokens], those of a pool of pages
// [num_pages, num_kv_heads, kPageSlots].
struct Rows {
  unsigned char* key;
  unsigned char* value;
  unsigned* scale;
};

// What comes before attention, by rows, each a token's query, key or value of one head: queries and keys are normed
// and rotated by their positions (RoPE); those that meet quantised keys also by the orthonormal Hadamard matrix of 128,
// if `rotated`, and queries quantised to int8. Keys and values go to their rows.
struct PrologueParams {
  const float* qkv;     // [tokens, num_heads * head_dim + num_kv_heads * (head_dim + value_dim)]
  const float* q_norm;  // [head_dim]; null: no norm
  const float* k_norm;
  const float* rope_cos;  // [tokens, head_dim]; null: no RoPE
  const float* rope_sin;
  unsigned char* q;  // [num_heads, tokens]: floats [head_dim], or kCodeRow codes, zeros beyond head_dim
  float* q_scale;    // of codes, one a row
  Rows to;
  int tokens;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int value_dim;
  int key_format;
  int value_format;
  float epsilon;
  bool rotated;
};

// Attention of q over the past in a pool of pages and the new keys and values, which are in the cache's format too; see
// pascalvl.h for shapes.
struct AttentionParams {
  const unsigned char* q;  // as the prologue leaves them
  const float* q_scale;
  Rows pool;
  Rows added;
  float* out;
  const int* cu_seqlens;    // [batch + 1]
  const int* past_length;   // [batch]; null: no past
  const int* page_table;    // [batch, sequence_pages]
  const int* past_visible;  // [batch, sequence_pages * kPageSlots]; null: all of the past is seen; prefill reads it
  int tokens;
  int batch;
  int num_pages;
  int sequence_pages;
  int num_heads;
  int num_kv_heads;
  int group;  // query heads of a kv head
  int head_dim;
  int value_dim;
  float scale_log2;  // softmax_scale * log2(e): exponentials are powers of two
  float* partial;    // see MergeParams; of prefill null where a single split writes `out` itself
  int splits;        // into how many a past is cut, at most
  bool decodes;      // of prefill: whether sequences of one token are decode's
};

constexpr int kCodeRow = 128;  // bytes of a row of quantised queries
constexpr int kRowWarps = 4;   // of a block of kv_append and attention_prologue: rows, too
constexpr int kRowThreads = 32 * kRowWarps;

constexpr int kPrefillThreads = 128;

// Query rows of a prefill block, and keys of a tile, where values have up to so many channels.
PASCALVL_BOTH_SIDES constexpr int prefill_rows(int value_dim) { return value_dim > 72 ? 64 : 128; }
PASCALVL_BOTH_SIDES constexpr int prefill_keys(int value_dim) { return value_dim > 72 ? 128 : 64; }
constexpr int kShortRows = 32;  // of a block of prefill_short, for a call that has no more

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kMergeThreads = 256;
constexpr int kLeastKeys = 128;  // of a decode split: a tile for each warp
constexpr int kLongPast = 8 * kLeastKeys;
constexpr int kMaxSplits = 512;

// Floats of what a split leaves: rows start on 16-byte boundaries.
PASCALVL_BOTH_SIDES constexpr int partial_pitch(int value_dim) { return value_dim + 4; }

// What splits of the past leave, rows of unnormalised output, maximum and sum, and where their merge goes.
struct MergeParams {
  const float* decoded;    // [batch, num_heads, decode_splits, partial_pitch], in a step by token, else by sequence;
                           // null: there was no decode
  const float* prefilled;  // [num_heads, tokens, prefill_splits, partial_pitch]; null: prefill had one split, or none
  float* out;              // [tokens, num_heads, value_dim]
  const int* cu_seqlens;   // [batch + 1]
  int tokens;
  int batch;
  int num_heads;
  int value_dim;
  int decode_splits;
  int prefill_splits;
};

constexpr int kAppendLayers = 64;  // of a launch of kv_append: as many as fit its params

// A layer's new rows, and its pool, in the same format.
struct AppendLayer {
  const unsigned char* new_key;    // [num_kv_heads, tokens, key_row]
  const unsigned char* new_value;  // [num_kv_heads, tokens, value_row]
  const unsigned* new_scale;       // [num_kv_heads, tokens], or null
  Rows to;                         // a pool
  int key_row;                     // bytes
  int value_row;
};

// Copies the new rows of all layers into their pools.
struct AppendParams {
  AppendLayer layers[kAppendLayers];
  const int* slots;  // [tokens]: where each goes, page * kPageSlots + slot; negative: nowhere
  int num_kv_heads;
  int tokens;
  int num_pages;
};
static_assert(sizeof(AppendParams) <= 4096, "what a kernel takes");

// What becomes of a linear layer's sums, see pascalvl_activation.
enum Activation : int { kNoActivation = 0, kGeluTanh = 1, kSiluGated = 2, kGeluErf = 3 };

constexpr int kGatedBlock = 64;  // gates that lie together, and the values that they are for
constexpr int kLinearThreads = 128;
constexpr int kLinearWarps = kLinearThreads / 32;
constexpr int kTileColumns = 2 * kGatedBlock;  // that a block of a GEMM computes
constexpr int kWarpColumns = 4;                // that a warp of a GEMV computes
constexpr int kGemvRows = 8;                   // at most
constexpr int kLine = 128;                     // bytes that DRAM is asked for at once

constexpr int kNormQuads = 2;  // of inputs that a thread of a norm holds in registers

// A linear layer, see pascalvl_linear_args; rows are tokens, columns outputs.
struct LinearParams {
  const float* x;               // [rows, in_features]
  const unsigned char* weight;  // [out_features, padded * bits / 8]
  const unsigned short* scale;  // [padded / group, scale_pitch]
  const unsigned short* zero;   // the same; null: zeros
  const float* bias;
  const float* residual;
  float* out;            // [rows, out_features], or half of that where gated
  unsigned char* codes;  // of x: [rows, padded]
  float* x_scale;        // [padded / group, row_pitch]
  float* x_sum;          // the same: sums of a group's codes; only where there are zeros
  float* partial;        // [splits, rows, out_features]
  int rows;
  int in_features;
  int padded;  // in_features, up to whole groups (of halves and floats: to whole lines of 16 bytes)
  int out_features;
  int group;  // of halves and floats: inputs that a split has whole
  int row_pitch;
  int scale_pitch;
  int splits;  // of the inputs
  int activation;
  int lines_ahead;  // of 128 bytes of the weights, which linear_quantise, or a norm, brings to the L2
};

// What a linear layer's inputs are normed by. Apart from LinearParams: how large those are decides what ptxas makes of
// the kernels that take them, registers too.
struct NormParams {
  LinearParams layer;
  const float* weight;  // [size]
  const float* bias;    // the same; null: RMS
  float* normed;        // [rows, in_features]: where floats are left; null: codes are
  int size;             // inputs that are normed together,
  int blocks;           // and how often a row has so many
  float epsilon;
};

constexpr int kChoiceThreads = 512;

// How a row's token is chosen, see pascalvl_choice.
struct TokenChoice {
  float repetition_penalty, presence_penalty, frequency_penalty;
  float temperature, top_p, min_p;
  int top_k, unused;
  unsigned long long random;
  const unsigned* counts;  // [vocab_size]
  const float* bias;       // [vocab_size]
  const unsigned* mask;    // [ceil(vocab_size / 32)]
};

struct ChoiceParams {
  const float* logits;         // [rows, vocab_size]
  const TokenChoice* choices;  // [rows]; null: the likeliest
  int* token;
  float* logit;
  int vocab_size;
};

// Rows of a matrix by their numbers, which are clamped.
struct GatherParams {
  const float* from;  // [num_rows, width]
  const int* rows;    // [rows picked]
  float* out;         // [rows picked, width]
  int num_rows, width;
};

// x += y.
struct AddParams {
  float* x;  // [count]
  const float* y;
  long long count;
};

}  // namespace pascalvl
