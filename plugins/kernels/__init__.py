"""FlashAttention-2 for SM61: CUDA kernels behind a C ABI (`pascalvl.h`), built by `build`, called by `library`."""
