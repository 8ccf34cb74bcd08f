// The C ABI's small parts; attention.cpp and linear.cpp have the ops.
#include "plugins/kernels/host.h"

namespace pascalvl {
namespace {

thread_local std::string last_error;

}  // namespace

void set_last_error(const char* sentence) { last_error = sentence; }

}  // namespace pascalvl

using namespace pascalvl;

static_assert(sizeof(pascalvl_choice) == sizeof(TokenChoice), "the C ABI's struct is the kernel's");

extern "C" int pascalvl_choose(const float* logits, int32_t rows, int32_t vocab_size, const pascalvl_choice* choices,
                               int32_t* token, float* logit, void* stream) {
  return guarded([&] {
    require(logits && token && logit, "logits, token or logit is a null pointer.");
    require_size(rows, "rows");
    require_size(vocab_size, "vocab_size");
    const auto* how = reinterpret_cast<const TokenChoice*>(choices);
    launch(Kernel::choose_token, {unsigned(rows), 1, 1}, ChoiceParams{logits, how, token, logit, vocab_size}, stream);
  });
}

static void require_matrix(int rows, int width) {
  require_size(rows, "num_rows");
  require_size(width, "width");
  require(width % 4 == 0, "width is %d; it must be a multiple of 4.", width);
}

extern "C" int pascalvl_gather_rows(const float* from, int32_t num_rows, int32_t width, const int32_t* rows,
                                    int32_t count, float* out, void* stream) {
  return guarded([&] {
    require_pointer(from, "from");
    require_pointer(out, "out");
    require(rows, "rows is a null pointer.");
    require_matrix(num_rows, width);
    require_size(count, "count", PASCALVL_MAX_GRID);
    launch(Kernel::gather_rows, {unsigned(width + 4 * kRowThreads - 1) / (4 * kRowThreads), unsigned(count), 1},
           GatherParams{from, rows, out, num_rows, width}, stream);
  });
}

extern "C" int pascalvl_add_to(float* x, const float* y, int32_t rows, int32_t width, void* stream) {
  return guarded([&] {
    require_pointer(x, "x");
    require_pointer(y, "y");
    require_matrix(rows, width);
    const long long count = (long long)rows * width, blocks = (count + 4 * kRowThreads - 1) / (4 * kRowThreads);
    require(count <= PASCALVL_MAX_ROWS, "x has %lld elements; it may have %d at most.", count, PASCALVL_MAX_ROWS);
    launch(Kernel::add_to, {unsigned(blocks), 1, 1}, AddParams{x, y, count}, stream);
  });
}

extern "C" size_t pascalvl_row_bytes(int32_t format, int32_t dim) {
  return format >= kFloat32 && format <= kInt4 && dim > 0 && dim <= kMaxDim ? row_bytes(format, dim) : 0;
}

extern "C" int pascalvl_load(void) { return guarded(load_kernels); }

extern "C" int pascalvl_unload(void) { return guarded(unload_kernels); }

extern "C" const char* pascalvl_last_error(void) { return last_error.c_str(); }
