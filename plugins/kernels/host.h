// What the parts of the C ABI share: arguments are checked, kernels started, and what goes wrong told.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "plugins/kernels/launch.h"
#include "plugins/kernels/params.h"
#include "plugins/kernels/pascalvl.h"

namespace pascalvl {

constexpr int kMaxDim = 128;

struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <typename... Values>
std::string text(const char* format, Values... values) {
  char buffer[320];
  std::snprintf(buffer, sizeof buffer, format, values...);
  return buffer;
}

template <typename... Values>
void require(bool condition, const char* format, Values... values) {
  if (!condition) throw BadArgument(text(format, values...));
}

// What pascalvl_last_error tells this thread.
void set_last_error(const char* sentence);

// Runs what may throw, and turns that into a status and a message.
template <typename Work>
int guarded(Work work) {
  try {
    work();
    return PASCALVL_OK;
  } catch (const CudaError& error) {
    set_last_error(error.what());
    return PASCALVL_CUDA_ERROR;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return PASCALVL_BAD_ARGUMENT;
  }
}

inline void require_pointer(const void* pointer, const char* name) {
  require(pointer, "%s is a null pointer.", name);
  require(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, "%s is not aligned to 16 bytes.", name);
}

// The sizes that are multiplied below are within these bounds; products that may leave 32 bits are made in 64.
inline void require_size(int value, const char* name, int most = PASCALVL_MAX_SIZE) {
  require(value > 0, "%s is %d; it must be at least 1.", name, value);
  require(value <= most, "%s is %d; it must be at most %d.", name, value, most);
}

template <typename Params>
void launch(Kernel kernel, Dim grid, const Params& params, void* stream) {
  if (kKernelParamBytes[int(kernel)] != sizeof params) throw std::logic_error("A kernel was given another's params.");
  launch(kernel, grid, static_cast<const void*>(&params), stream);
}

[[noreturn]] inline void no_kernel(const char* name) {
  throw std::logic_error(text("There is no kernel %s for these arguments.", name));
}

}  // namespace pascalvl
