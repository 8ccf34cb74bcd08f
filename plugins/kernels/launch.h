// How the host starts kernels: by the CUDA driver (driver.cpp) or on the emulator (emulated.cpp).
#pragma once

#include <stddef.h>

#include <stdexcept>

#include "plugins/kernels/kernels.h"
#include "plugins/kernels/params.h"

namespace pascalvl {

#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) NAME,
enum class Kernel { PASCALVL_ALL_KERNELS };
#undef PASCALVL_KERNEL

#define PASCALVL_TEXT(NAME) #NAME
#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) PASCALVL_TEXT(NAME),  // of a name that is a macro, what it says
constexpr const char* kKernelNames[] = {PASCALVL_ALL_KERNELS};
#undef PASCALVL_KERNEL

#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) THREADS,
constexpr unsigned kKernelThreads[] = {PASCALVL_ALL_KERNELS};  // of a block
#undef PASCALVL_KERNEL

#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) sizeof(PARAMS),
constexpr size_t kKernelParamBytes[] = {PASCALVL_ALL_KERNELS};
#undef PASCALVL_KERNEL

constexpr int kKernels = sizeof kKernelNames / sizeof *kKernelNames;

struct Dim {
  unsigned x, y, z;
};

// What the C ABI turns into PASCALVL_CUDA_ERROR.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Makes the kernels ready in the current context; throws CudaError.
void load_kernels();

// Takes them out of it; throws CudaError.
void unload_kernels();

// Starts a kernel with its params; throws CudaError.
void launch(Kernel kernel, Dim grid, const void* params, void* stream);

// Streaming multiprocessors of the current device; throws CudaError.
int multiprocessors();

// Blocks of a kernel that a multiprocessor runs at once; throws CudaError.
int resident_blocks(Kernel kernel);

}  // namespace pascalvl
