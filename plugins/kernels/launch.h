// How the host starts kernels: by the CUDA driver (driver.cpp) or on the emulator (emulated.cpp).
#pragma once

#include <stddef.h>

#include <stdexcept>

namespace pascalvl {

struct Dim {
  unsigned x, y, z;
};

// What the C ABI turns into PASCALVL_CUDA_ERROR.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Makes the kernels ready in the current context; throws CudaError.
void load_kernels();

// Starts a kernel that takes one struct by value; throws CudaError.
void launch(const char* kernel, Dim grid, unsigned threads, const void* params, size_t bytes, void* stream);

// Streaming multiprocessors of the current device; throws CudaError.
int multiprocessors();

// Blocks of so many threads of a kernel that a multiprocessor runs at once; throws CudaError.
int resident_blocks(const char* kernel, unsigned threads);

}  // namespace pascalvl
