// Starts kernels on the emulator: the same sources, compiled for the CPU.
#define PASCALVL_EMULATED
#include <cstring>
#include <map>
#include <string>

#include "plugins/kernels/append.cu"
#include "plugins/kernels/decode.cu"
#include "plugins/kernels/greedy.cu"
#include "plugins/kernels/launch.h"
#include "plugins/kernels/linear.cu"
#include "plugins/kernels/prefill.cu"

namespace pascalvl {
namespace {

using Starter = std::function<void(Dim, unsigned, const void*)>;

template <typename Params>
Starter starter(void (*kernel)(Params)) {
  return [kernel](Dim grid, unsigned threads, const void* bytes) {
    Params params;
    std::memcpy(&params, bytes, sizeof params);
    emulator::run([&] { kernel(params); }, dim3(grid.x, grid.y, grid.z), dim3(threads));
  };
}

#define KERNEL(NAME) {#NAME, starter(NAME)}
#define FORMATS(NAME)                                                                             \
  KERNEL(NAME##_kFloat32_kFloat32), KERNEL(NAME##_kFloat16_kFloat16), KERNEL(NAME##_kInt8_kInt8), \
      KERNEL(NAME##_kInt8_kInt4), KERNEL(NAME##_kInt4_kInt8), KERNEL(NAME##_kInt4_kInt4)
#define DECODERS(GROUP) FORMATS(decode_##GROUP)
#define LINEAR_TILES(FORMAT) \
  KERNEL(linear_tile_64_##FORMAT), KERNEL(linear_tile_32_##FORMAT), KERNEL(linear_tile_16_##FORMAT)
#define LINEAR_FEW(FORMAT) \
  KERNEL(linear_1_##FORMAT), KERNEL(linear_2_##FORMAT), KERNEL(linear_4_##FORMAT), KERNEL(linear_8_##FORMAT)
#define PREFILLS(DIM) FORMATS(prefill_causal_##DIM)

const std::map<std::string, Starter>& kernels() {
  static const std::map<std::string, Starter> all{KERNEL(kv_append),
                                                  KERNEL(greedy_choice),
                                                  KERNEL(quantise_queries),
                                                  KERNEL(linear_quantise),
                                                  KERNEL(linear_sum),
                                                  LINEAR_TILES(w8),
                                                  LINEAR_TILES(w4),
                                                  LINEAR_TILES(f16),
                                                  LINEAR_FEW(w8),
                                                  LINEAR_FEW(w8z),
                                                  LINEAR_FEW(w4),
                                                  LINEAR_FEW(w4z),
                                                  LINEAR_FEW(f16),
                                                  PREFILLS(64),
                                                  PREFILLS(128),
                                                  KERNEL(prefill_packed_64),
                                                  KERNEL(prefill_packed_72),
                                                  KERNEL(prefill_packed_128),
                                                  KERNEL(decode_merge),
                                                  DECODERS(1),
                                                  DECODERS(2),
                                                  DECODERS(4),
                                                  DECODERS(8)};
  return all;
}

}  // namespace

void load_kernels() {}

void launch(const char* kernel, Dim grid, unsigned threads, const void* params, size_t, void*) {
  const auto found = kernels().find(kernel);
  if (found == kernels().end()) throw CudaError(std::string("There is no kernel ") + kernel + ".");
  found->second(grid, threads, params);
}

int multiprocessors() { return 2; }  // enough for several splits, few enough for tests to be quick

int resident_blocks(const char*, unsigned) { return 4; }

}  // namespace pascalvl
