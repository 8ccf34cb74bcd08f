// The one list of the kernels. `.cu` files instantiate their families by it, the host finds, starts and reports kernels
// by it: define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) and write PASCALVL_ALL_KERNELS. A module is a `.cu`
// file, PARAMS the struct that its kernels take, THREADS those of a block.
#pragma once

#define PASCALVL_ALL_MODULES(MODULE) \
  MODULE(append) MODULE(choice) MODULE(decode) MODULE(linear) MODULE(prefill) MODULE(prologue) MODULE(rows)

// Formats of a cache's keys and values.
#define PASCALVL_FORMATS(KERNEL, FIRST) \
  KERNEL(FIRST, kFloat32, kFloat32)     \
  KERNEL(FIRST, kFloat16, kFloat16)     \
  KERNEL(FIRST, kInt8, kInt8)           \
  KERNEL(FIRST, kInt8, kInt4)           \
  KERNEL(FIRST, kInt4, kInt4)

// By query heads of a kv head, and formats.
#define PASCALVL_DECODE(KERNEL) \
  PASCALVL_FORMATS(KERNEL, 1)   \
  PASCALVL_FORMATS(KERNEL, 2)   \
  PASCALVL_FORMATS(KERNEL, 4)   \
  PASCALVL_FORMATS(KERNEL, 8)
#define PASCALVL_DECODE_NAME(GROUP, KEY, VALUE) decode_##GROUP##_##KEY##_##VALUE

// By the most channels of a value, and formats.
#define PASCALVL_PREFILL_CAUSAL(KERNEL) PASCALVL_FORMATS(KERNEL, 64) PASCALVL_FORMATS(KERNEL, 128)
#define PASCALVL_PREFILL_CAUSAL_NAME(DIM, KEY, VALUE) prefill_causal_##DIM##_##KEY##_##VALUE

// By the most channels of a value, and formats: for few rows.
#define PASCALVL_PREFILL_SHORT(KERNEL) PASCALVL_FORMATS(KERNEL, 128)
#define PASCALVL_PREFILL_SHORT_NAME(DIM, KEY, VALUE) prefill_short_##DIM##_##KEY##_##VALUE

// By the head size.
#define PASCALVL_PREFILL_PACKED(KERNEL) KERNEL(64) KERNEL(72) KERNEL(128)
#define PASCALVL_PREFILL_PACKED_NAME(DIM) prefill_packed_##DIM

// By threads of a block.
#define PASCALVL_LINEAR_NORM(KERNEL) KERNEL(256) KERNEL(512) KERNEL(1024)
#define PASCALVL_LINEAR_NORM_NAME(THREADS) linear_norm_##THREADS

// By rows of a tile, and bits of a weight.
#define PASCALVL_LINEAR_GEMMS(KERNEL, BITS) KERNEL(64, BITS) KERNEL(32, BITS) KERNEL(16, BITS)
#define PASCALVL_LINEAR_GEMM(KERNEL) \
  PASCALVL_LINEAR_GEMMS(KERNEL, 32)  \
  PASCALVL_LINEAR_GEMMS(KERNEL, 16)  \
  PASCALVL_LINEAR_GEMMS(KERNEL, 8)   \
  PASCALVL_LINEAR_GEMMS(KERNEL, 4)
#define PASCALVL_LINEAR_GEMM_NAME(ROWS, BITS) linear_gemm_##ROWS##_w##BITS

// By rows, bits of a weight, and whether its codes have zeros.
#define PASCALVL_LINEAR_GEMVS(KERNEL, BITS, ZERO) \
  KERNEL(1, BITS, ZERO) KERNEL(2, BITS, ZERO) KERNEL(4, BITS, ZERO) KERNEL(8, BITS, ZERO)
#define PASCALVL_LINEAR_GEMV(KERNEL)   \
  PASCALVL_LINEAR_GEMVS(KERNEL, 32, 0) \
  PASCALVL_LINEAR_GEMVS(KERNEL, 16, 0) \
  PASCALVL_LINEAR_GEMVS(KERNEL, 8, 0)  \
  PASCALVL_LINEAR_GEMVS(KERNEL, 8, 1)  \
  PASCALVL_LINEAR_GEMVS(KERNEL, 4, 0)  \
  PASCALVL_LINEAR_GEMVS(KERNEL, 4, 1)
#define PASCALVL_LINEAR_GEMV_NAME(ROWS, BITS, ZERO) linear_gemv_##ROWS##_w##BITS##_z##ZERO

#define PASCALVL_DECODE_KERNEL(GROUP, KEY, VALUE) \
  PASCALVL_KERNEL(decode, PASCALVL_DECODE_NAME(GROUP, KEY, VALUE), AttentionParams, kDecodeThreads)
#define PASCALVL_PREFILL_CAUSAL_KERNEL(DIM, KEY, VALUE) \
  PASCALVL_KERNEL(prefill, PASCALVL_PREFILL_CAUSAL_NAME(DIM, KEY, VALUE), AttentionParams, kPrefillThreads)
#define PASCALVL_PREFILL_SHORT_KERNEL(DIM, KEY, VALUE) \
  PASCALVL_KERNEL(prefill, PASCALVL_PREFILL_SHORT_NAME(DIM, KEY, VALUE), AttentionParams, kPrefillThreads)
#define PASCALVL_PREFILL_PACKED_KERNEL(DIM) \
  PASCALVL_KERNEL(prefill, PASCALVL_PREFILL_PACKED_NAME(DIM), AttentionParams, kPrefillThreads)
#define PASCALVL_LINEAR_NORM_KERNEL(THREADS) \
  PASCALVL_KERNEL(linear, PASCALVL_LINEAR_NORM_NAME(THREADS), NormParams, THREADS)
#define PASCALVL_LINEAR_GEMM_KERNEL(ROWS, BITS) \
  PASCALVL_KERNEL(linear, PASCALVL_LINEAR_GEMM_NAME(ROWS, BITS), LinearParams, kLinearThreads)
#define PASCALVL_LINEAR_GEMV_KERNEL(ROWS, BITS, ZERO) \
  PASCALVL_KERNEL(linear, PASCALVL_LINEAR_GEMV_NAME(ROWS, BITS, ZERO), LinearParams, kLinearThreads)

#define PASCALVL_ALL_KERNELS                                                 \
  PASCALVL_KERNEL(append, kv_append, AppendParams, kRowThreads)              \
  PASCALVL_KERNEL(prologue, attention_prologue, PrologueParams, kRowThreads) \
  PASCALVL_DECODE(PASCALVL_DECODE_KERNEL)                                    \
  PASCALVL_KERNEL(decode, merge_splits, MergeParams, kMergeThreads)          \
  PASCALVL_KERNEL(choice, choose_token, ChoiceParams, kChoiceThreads)        \
  PASCALVL_KERNEL(rows, gather_rows, GatherParams, kRowThreads)              \
  PASCALVL_KERNEL(rows, add_to, AddParams, kRowThreads)                      \
  PASCALVL_KERNEL(linear, linear_quantise, LinearParams, kLinearThreads)     \
  PASCALVL_KERNEL(linear, linear_sum, LinearParams, kLinearThreads)          \
  PASCALVL_LINEAR_NORM(PASCALVL_LINEAR_NORM_KERNEL)                          \
  PASCALVL_LINEAR_GEMM(PASCALVL_LINEAR_GEMM_KERNEL)                          \
  PASCALVL_LINEAR_GEMV(PASCALVL_LINEAR_GEMV_KERNEL)                          \
  PASCALVL_PREFILL_CAUSAL(PASCALVL_PREFILL_CAUSAL_KERNEL)                    \
  PASCALVL_PREFILL_SHORT(PASCALVL_PREFILL_SHORT_KERNEL)                      \
  PASCALVL_PREFILL_PACKED(PASCALVL_PREFILL_PACKED_KERNEL)
