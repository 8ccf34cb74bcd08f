// Starts kernels on the emulator: the same sources, compiled for the CPU.
#define PASCALVL_EMULATED
#include <cstring>

#include "plugins/kernels/append.cu"
#include "plugins/kernels/choice.cu"
#include "plugins/kernels/decode.cu"
#include "plugins/kernels/launch.h"
#include "plugins/kernels/linear.cu"
#include "plugins/kernels/prefill.cu"
#include "plugins/kernels/prologue.cu"
#include "plugins/kernels/rows.cu"

namespace pascalvl {
namespace {

using Starter = void (*)(Dim, unsigned, const void*);

template <typename Params, void (*kKernel)(Params)>
void start(Dim grid, unsigned threads, const void* bytes) {
  Params params;
  std::memcpy(&params, bytes, sizeof params);
  emulator::run([&] { kKernel(params); }, dim3(grid.x, grid.y, grid.z), dim3(threads));
}

#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) start<PARAMS, NAME>,
const Starter kStarters[] = {PASCALVL_ALL_KERNELS};
#undef PASCALVL_KERNEL

}  // namespace

void load_kernels() {}

void unload_kernels() {}

void launch(Kernel kernel, Dim grid, const void* params, void*) {
  kStarters[int(kernel)](grid, kKernelThreads[int(kernel)], params);
}

int multiprocessors() { return 2; }  // enough for several splits, few enough for tests to be quick

int resident_blocks(Kernel) { return 4; }

}  // namespace pascalvl
