// The C ABI's small parts; attention.cpp and linear.cpp have the ops.
#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

thread_local std::string last_error;

}  // namespace

void set_last_error(const char* sentence) { last_error = sentence; }

}  // namespace pascalvl

using namespace pascalvl;

extern "C" int pascalvl_greedy(const float* logits, int32_t rows, int32_t vocab_size, int32_t* token, float* logit,
                               void* stream) {
  return guarded([&] {
    require(logits && token && logit, "logits, token or logit is a null pointer.");
    require_size(rows, "rows");
    require_size(vocab_size, "vocab_size");
    launch(Kernel::greedy_choice, {unsigned(rows), 1, 1}, GreedyParams{logits, token, logit, vocab_size}, stream);
  });
}

extern "C" size_t pascalvl_row_bytes(int32_t format, int32_t dim) {
  return format >= kFloat32 && format <= kInt4 && dim > 0 && dim <= kMaxDim ? row_bytes(format, dim) : 0;
}

extern "C" int pascalvl_load(void) { return guarded(load_kernels); }

extern "C" const char* pascalvl_last_error(void) { return last_error.c_str(); }
