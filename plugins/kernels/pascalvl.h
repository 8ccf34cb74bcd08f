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
  PASCALVL_MAX_SIZE = 1 << 24,  // tokens, slots, features, entries of a vocabulary, rows of logits
  PASCALVL_MAX_GRID = 65535,    // what CUDA counts blocks of in 16 bits: batch, heads, layers, rows of a linear layer,
                                // tiles of 64 rows (128 with values of up to 72 channels) of a kv head in prefill
  PASCALVL_MAX_ROWS = 1 << 30,  // rows of q, and new ones of a layer: batch * heads * seq
};

#define PASCALVL_MAX_SOFTMAX_SCALE 1e6f  // or its negative

enum pascalvl_format { PASCALVL_FLOAT32 = 0, PASCALVL_FLOAT16 = 1, PASCALVL_INT8 = 2, PASCALVL_INT4 = 3 };

// One layer's cache of keys and values: rows [batch, num_kv_heads, capacity, row bytes], see params.h; of quantised
// formats also a scale in half for each row, [batch, num_kv_heads, capacity].
typedef struct {
  void* key;
  void* value;
  void* key_scale;
  void* value_scale;
  int32_t key_format;
  int32_t value_format;
  int32_t capacity;
  int32_t rotated;  // whether keys are stored rotated by the Hadamard matrix of 128
} pascalvl_cache;

// Attention(q, k, v) = softmax(softmax_scale * q k^T + mask) v. Query head h reads kv head h / (num_heads /
// num_kv_heads).
typedef struct {
  const float* q;  // [batch, num_heads, seq, key_dim]
  const float* k;  // [batch, num_kv_heads, seq, key_dim]
  const float* v;  // [batch, num_kv_heads, seq, value_dim]
  float* out;      // [batch, seq, num_heads, value_dim]
  int32_t batch, num_heads, num_kv_heads, seq, key_dim, value_dim;
  float softmax_scale;
  // Causal: new token i of sequence b sees the new tokens up to itself and, of the first past_length[b] slots of the
  // cache, those of which past_visible is more than i.
  // Not causal: `seq` tokens of batch 1, cut into num_sequences by cu_seqlens [num_sequences + 1]; each sees its own.
  int32_t causal;
  const int32_t* past_length;   // [batch], at most capacity each; null: no past
  const int32_t* past_visible;  // [batch, capacity]; null: every slot is seen. A single token takes longer with than
                                // without: better keep only what it sees.
  // The first recent_length[b] rows of `recent`, which one new token (seq 1) sees besides; null: none. Only where the
  // cache is quantised and past_visible is null; several new tokens take no notice: they come with lengths of 0.
  const int32_t* recent_length;  // [batch], at most the recent rows' capacity each
  const int32_t* cu_seqlens;
  int32_t num_sequences;
  pascalvl_cache cache;
  pascalvl_cache recent;  // float16, not rotated, with a capacity of its own
} pascalvl_attention_args;

// Bytes of workspace that a call with these arguments needs; it does not depend on what the device arrays hold.
int pascalvl_attention_workspace(const pascalvl_attention_args* args, size_t* bytes);
int pascalvl_attention(const pascalvl_attention_args* args, void* workspace, size_t workspace_bytes, void* stream);

// Writes the new keys and values of all layers into their caches.
typedef struct {
  const float* key;    // [layers, batch, num_kv_heads, seq, key_dim]
  const float* value;  // [layers, batch, num_kv_heads, seq, value_dim]
  int32_t layers, batch, num_kv_heads, seq, key_dim, value_dim;
  const int32_t* past_length;  // [batch]: token i goes to slot past_length + i; or
  const int32_t* slots;        // [batch, seq]: to these (negative: nowhere), each once: of two tokens that go to one,
                               // parts of both may be written. Slots beyond the capacity are not written.
  pascalvl_cache cache;        // of the first layer
  int64_t key_stride, value_stride, key_scale_stride, value_scale_stride;  // bytes from a layer's to the next one's
} pascalvl_append_args;

int pascalvl_kv_append(const pascalvl_append_args* args, void* stream);

// The likeliest token of each row of logits [rows, vocab_size], the first of equal ones, and its logit: NaN if any is.
int pascalvl_greedy(const float* logits, int32_t rows, int32_t vocab_size, int32_t* token, float* logit, void* stream);

enum pascalvl_activation { PASCALVL_NO_ACTIVATION = 0, PASCALVL_GELU_TANH = 1, PASCALVL_SILU_GATED = 2 };

// out = activation(x W^T + bias) + residual.
// Of bits 8 or 4: x is quantised to int8 before, by row and group of inputs, scale the largest magnitude / 127; an
// element of W is (code - zero) * scale, with one scale and zero in half (a whole number, as large as a code at most)
// for each output and group of 32, 64 or 128 inputs. A row of codes is padded with zeros to whole groups. Codes of 4
// bits, -8 to 7, are eight to a word: input 8 w + j in the low half of byte j of word w, input 8 w + 4 + j in its high
// half.
// Of bits 16: W is halves, a row of which is padded with zeros to a multiple of 8, and x is as it is; scale and zero
// must be null, and group is not read.
// Gated: out_features is a multiple of 128; of each 128, the first 64 are gates and the others the values that they are
// for: out has silu(gate) * value, 64 for each 128.
typedef struct {
  const float* x;         // [rows, in_features]
  const void* weight;     // [out_features, padded * bits / 8]
  const uint16_t* scale;  // [padded / group, out_features up to a multiple of 8]; of bits 16 null
  const uint16_t* zero;   // as scale; null: zeros
  const float* bias;      // [out_features], or null
  const float* residual;  // of out's shape, or null
  float* out;             // [rows, out_features], or half of that where gated
  int32_t rows, in_features, out_features, bits, group, activation;
} pascalvl_linear_args;

int pascalvl_linear_workspace(const pascalvl_linear_args* args, size_t* bytes);
int pascalvl_linear(const pascalvl_linear_args* args, void* workspace, size_t workspace_bytes, void* stream);

// Bytes of a cache row of `dim` elements in a format, or 0 where there is no such format or dimension.
size_t pascalvl_row_bytes(int32_t format, int32_t dim);

// Makes the kernels ready in the current CUDA context.
int pascalvl_load(void);

// What went wrong in this thread's last call that did not return 0.
const char* pascalvl_last_error(void);

#ifdef __cplusplus
}
#endif
