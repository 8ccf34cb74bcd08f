// The kernels' C ABI. One library, made in two ways: for CUDA (kernels for SM61 and, as PTX, for every newer GPU; the
// driver is found when first needed, so that the library loads without one) and for the CPU, by the emulator.
//
// Calls launch on the stream given and return. They allocate nothing and wait for nothing, so that they can be captured
// in a CUDA graph; the first call in a CUDA context loads the kernels there, which a capture does not allow: call
// pascalvl_load before. Pointers are to device memory (of the emulator: plain memory), to rows aligned to 16 bytes.
//
// What device arrays of integers hold is not checked on the host. A length, bound, slot or count out of range is taken
// as the nearest that there is, or for nothing: results mean nothing then, but no memory outside the arrays is touched,
// and no call takes longer than with the largest values that are in range.
//
// Every function returns 0, or an error code after which pascalvl_last_error tells, in one sentence, what was expected
// and what was found; then nothing was launched.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum pascalvl_status {
  PASCALVL_OK = 0,
  PASCALVL_BAD_ARGUMENT = 1,
  PASCALVL_CUDA_ERROR = 2,
};

// How large sizes may be: far more than models have, and so little that no number of elements, bytes or blocks that a
// call takes overflows, here or in a kernel.
enum pascalvl_limit {
  PASCALVL_MAX_SIZE = 1 << 24,  // tokens, pages, features, entries of a vocabulary, rows of logits
  PASCALVL_MAX_GRID = 65535,    // what CUDA counts blocks of in 16 bits: sequences, heads, layers, rows of a linear
                              // layer, tiles of 64 rows (128 with values of up to 72 channels) of a kv head in prefill
  PASCALVL_MAX_ROWS = 1 << 30,  // rows of q, new ones of a layer, and its pool's: heads * tokens or slots
};

#define PASCALVL_PAGE_SLOTS 128  // of a page of the cache: tokens

#define PASCALVL_MAX_SOFTMAX_SCALE 1e6f  // or its negative

enum pascalvl_format { PASCALVL_FLOAT32 = 0, PASCALVL_FLOAT16 = 1, PASCALVL_INT8 = 2, PASCALVL_INT4 = 3 };

// Keys and values of one layer: rows of bytes, see params.h; of quantised formats also a word for each key and value,
// the key's scale, a half, in its lower half, the value's in its upper one. New ones are [num_kv_heads, tokens, row], a
// pool's [num_pages, num_kv_heads, PASCALVL_PAGE_SLOTS, row].
typedef struct {
  void* key;
  void* value;
  uint32_t* scale;
} pascalvl_rows;

// Attention(q, k, v) = softmax(softmax_scale * q k^T + mask) v, from the packed result of the q/k/v projection. Queries
// and keys are first normed (RMS, over a head) and rotated by their positions (RoPE: element i and the one head_dim / 2
// further on make a pair). Query head h reads kv head h / (num_heads / num_kv_heads).
//
// Tokens of several sequences lie one behind the other: number b has those from cu_seqlens[b] to before cu_seqlens[b +
// 1].
//
// Causal: the new keys and values come out in the cache's format, and attention reads them so, as it does the past's.
// Queries that meet quantised keys are quantised to int8, scale the largest magnitude / 127. A sequence's past lies in
// past_length[b] slots of the pages that page_table names: slot s is slot s % 128 of page page_table[b][s / 128]. Its
// new token i sees its new tokens up to itself and, of these slots, those of which past_visible is more than i. Tokens
// from cu_seqlens[batch] on are padding, of which zeros come out. A call of as many tokens as sequences, with a past
// and without past_visible, is a decode step: there, of a sequence of several, only the first one means anything. Not
// causal: a token sees all of its own sequence.
typedef struct {
  const float* qkv;       // [tokens, num_heads * head_dim + num_kv_heads * (head_dim + value_dim)]: q, k, v
  const float* q_norm;    // [head_dim]; null: queries are not normed
  const float* k_norm;    // [head_dim]; null: keys are not
  const float* rope_cos;  // [tokens, head_dim]; null: nothing is rotated by positions
  const float* rope_sin;
  float* out;                   // [tokens, num_heads, value_dim]
  pascalvl_rows new_rows;       // causal
  pascalvl_rows pool;           // not read where there is no past
  const int32_t* cu_seqlens;    // [batch + 1]
  const int32_t* past_length;   // [batch]; null: no past
  const int32_t* page_table;    // [batch, sequence_pages]
  const int32_t* past_visible;  // [batch, sequence_pages * 128]; null: every slot is seen. A single token takes longer
                                // with than without: better keep only what it sees.
  int32_t tokens, batch, num_heads, num_kv_heads, head_dim, value_dim;
  int32_t key_format, value_format;  // of the cache
  int32_t num_pages, sequence_pages;
  int32_t rotated;  // whether keys are stored rotated by the orthonormal Hadamard matrix of 128
  int32_t causal;
  float softmax_scale, epsilon;  // epsilon: what norms add to mean squares
} pascalvl_attention_args;

// Bytes of workspace that a call with these arguments needs; it does not depend on what the device arrays hold.
int pascalvl_attention_workspace(const pascalvl_attention_args* args, size_t* bytes);
int pascalvl_attention(const pascalvl_attention_args* args, void* workspace, size_t workspace_bytes, void* stream);

// A layer's new rows as attention leaves them, and its pool, in the same format.
typedef struct {
  pascalvl_rows new_rows;
  pascalvl_rows pool;
  int32_t key_row, value_row;  // bytes
} pascalvl_append_layer;

// Copies the new keys and values of all layers into their pools.
typedef struct {
  const pascalvl_append_layer* layers;  // [num_layers], in the host's memory
  const int32_t* slots;  // [tokens]: where a token goes, page * PASCALVL_PAGE_SLOTS + slot (negative, or beyond the
                         // pool: nowhere), each slot once: of two tokens that go to one, parts of both may be written
  int32_t num_layers, num_kv_heads, tokens, num_pages;
} pascalvl_append_args;

int pascalvl_kv_append(const pascalvl_append_args* args, void* stream);

// How a row's token is chosen. Logits of tokens seen, whose count is not 0, are divided by repetition_penalty where
// positive, else multiplied; of those that the answer has, whose count without its highest bit is not 0,
// presence_penalty is subtracted, and frequency_penalty as often; then bias is added, and a token whose bit in mask is
// 0 left out. With a temperature (above 0) the logits are divided by it, and one token is drawn by their softmax, from
// what is left of the top_k likeliest, of the fewest of these that have a share of top_p, and of those with at least
// min_p of the likeliest one's share (equal ones stay together; top_k 0, top_p 1, min_p 0: all): the first in the order
// of their numbers at which the sum of the shares exceeds random / 2^64. Without, the likeliest is taken, the first of
// equal ones.
typedef struct {
  float repetition_penalty, presence_penalty, frequency_penalty;
  float temperature, top_p, min_p;
  int32_t top_k, unused;
  uint64_t random;
  const uint32_t* counts;  // [vocab_size]; null: no penalties
  const float* bias;       // [vocab_size], or null
  const uint32_t* mask;    // [ceil(vocab_size / 32)], bit i of word w for token 32 w + i; null: all
} pascalvl_choice;

// A token of each row of logits [rows, vocab_size], -1 where a mask leaves none; and the row's highest logit, NaN if
// any is, and then the token means nothing. choices [rows] are in the device's memory; null: the likeliest.
int pascalvl_choose(const float* logits, int32_t rows, int32_t vocab_size, const pascalvl_choice* choices,
                    int32_t* token, float* logit, void* stream);

// out[i] = from[rows[i]], of floats: from is [num_rows, width], out [count, width]; width is a multiple of 4.
int pascalvl_gather_rows(const float* from, int32_t num_rows, int32_t width, const int32_t* rows, int32_t count,
                         float* out, void* stream);

// x += y, both [rows, width]; width is a multiple of 4.
int pascalvl_add_to(float* x, const float* y, int32_t rows, int32_t width, void* stream);

enum pascalvl_activation {
  PASCALVL_NO_ACTIVATION = 0,
  PASCALVL_GELU_TANH = 1,
  PASCALVL_SILU_GATED = 2,
  PASCALVL_GELU_ERF = 3,
};

enum pascalvl_norm { PASCALVL_NO_NORM = 0, PASCALVL_RMS_NORM = 1, PASCALVL_LAYER_NORM = 2 };

// out = activation(norm(x) W^T + bias) + residual.
// With a norm, each norm_size of a row's inputs are normed by themselves: RMS, x * rsqrt(mean(x^2) + epsilon) *
// norm_weight; layer norm, (x - mean(x)) * rsqrt(variance(x) + epsilon) * norm_weight + norm_bias.
// Of bits 8 or 4: what the norm leaves is quantised to int8, by row and group of inputs, scale the largest magnitude /
// 127 (groups lie within what is normed together, unless that is the whole row); an element of W is (code - zero) *
// scale, with one scale and zero in half (a whole number, as large as a code at most) for each output and group of 32,
// 64 or 128 inputs. A row of codes is padded with zeros to whole groups. Codes of 4 bits, -8 to 7, are eight to a word:
// input 8 w + j in the low half of byte j of word w, input 8 w + 4 + j in its high half. Of bits 16 or 32: W is halves
// or floats, a row of which is padded with zeros to a multiple of 8 or 4, and what the norm leaves is as it is; scale
// and zero must be null, and group is not read. Gated: out_features is a multiple of 128; of each 128, the first 64 are
// gates and the others the values that they are for: out has silu(gate) * value, 64 for each 128.
typedef struct {
  const float* x;            // [rows, in_features]
  const void* weight;        // [out_features, padded * bits / 8]
  const uint16_t* scale;     // [padded / group, out_features up to a multiple of 8]; of bits 16 or 32 null
  const uint16_t* zero;      // as scale; null: zeros
  const float* bias;         // [out_features], or null
  const float* residual;     // of out's shape, or null
  float* out;                // [rows, out_features], or half of that where gated
  const float* norm_weight;  // [norm_size]; null without a norm
  const float* norm_bias;    // as norm_weight; null but of layer norm
  int32_t rows, in_features, out_features, bits, group, activation;
  int32_t norm, norm_size;  // norm_size divides in_features; not read without a norm
  float epsilon;            // not read without a norm
} pascalvl_linear_args;

int pascalvl_linear_workspace(const pascalvl_linear_args* args, size_t* bytes);
int pascalvl_linear(const pascalvl_linear_args* args, void* workspace, size_t workspace_bytes, void* stream);

// Bytes of a cache row of `dim` elements in a format, or 0 where there is no such format or dimension.
size_t pascalvl_row_bytes(int32_t format, int32_t dim);

// Makes the kernels ready in the current CUDA context.
int pascalvl_load(void);

// Takes the kernels out of the current CUDA context, before that is destroyed. None may be running; they are loaded
// again when next needed.
int pascalvl_unload(void);

// What went wrong in this thread's last call that did not return 0.
const char* pascalvl_last_error(void);

#ifdef __cplusplus
}
#endif
