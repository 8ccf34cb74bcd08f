// Starts kernels through the CUDA driver, which is opened when first needed: the library itself needs no CUDA to load.
#include <dlfcn.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "plugins/kernels/launch.h"

// The images that build.py compiled, put in by images.S: for each source file a cubin for SM61 and PTX for newer GPUs.
#define IMAGE(NAME)                                \
  extern "C" const char pascalvl_##NAME##_cubin[]; \
  extern "C" const char pascalvl_##NAME##_ptx[];
IMAGE(append)
IMAGE(decode)
IMAGE(greedy)
IMAGE(linear)
IMAGE(prefill)

namespace pascalvl {
namespace {

using Result = int;
using Context = void*;
using Module = void*;
using Function = void*;
constexpr int kSuccess = 0;
constexpr int kMultiprocessorCount = 16;  // of enum CUdevice_attribute
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;

// The functions of libcuda that are used here, declared as in its manual.
struct Driver {
  Result (*error_string)(Result, const char**);
  Result (*current_context)(Context*);
  Result (*current_device)(int*);
  Result (*device_attribute)(int*, int, int);
  Result (*load_module)(Module*, const void*);
  Result (*get_function)(Function*, Module, const char*);
  Result (*resident_blocks)(int*, Function, int, size_t);
  Result (*launch_kernel)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**,
                          void**);

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw CudaError("The CUDA driver (libcuda.so.1) is not installed; these kernels need an NVIDIA GPU.");
    find(library, "cuGetErrorString", error_string);
    find(library, "cuCtxGetCurrent", current_context);
    find(library, "cuCtxGetDevice", current_device);
    find(library, "cuDeviceGetAttribute", device_attribute);
    find(library, "cuModuleLoadData", load_module);
    find(library, "cuModuleGetFunction", get_function);
    find(library, "cuOccupancyMaxActiveBlocksPerMultiprocessor", resident_blocks);
    find(library, "cuLaunchKernel", launch_kernel);
  }

  void check(Result result, const std::string& doing) const {
    if (result == kSuccess) return;
    const char* reason = nullptr;
    error_string(result, &reason);
    throw CudaError("The CUDA driver failed " + doing + ": " + (reason ? reason : "unknown error") + ".");
  }

  int attribute(int which) const {
    int device = 0, value = 0;
    check(current_device(&device), "to tell the current device");
    check(device_attribute(&value, which, device), "to tell about the current device");
    return value;
  }

 private:
  template <typename Pointer>
  static void find(void* library, const char* name, Pointer& function) {
    function = reinterpret_cast<Pointer>(dlsym(library, name));
    if (!function) throw CudaError(std::string("The CUDA driver has no ") + name + "; it is too old.");
  }
};

const Driver& driver() {
  static const Driver instance;
  return instance;
}

// The modules, in this order, and how the names of their kernels begin; those of the last one as they like.
constexpr int kModules = 5;
const char* const kPrefixes[kModules] = {"decode", "prefill", "greedy", "linear", ""};

// The kernels in one context.
struct Kernels {
  Module modules[kModules];
  std::map<std::string, Function> functions;
  std::map<std::string, int> resident_blocks;
  int multiprocessors;
};

Kernels load() {
  const Driver& cuda = driver();
  Kernels kernels{};
  const int major = cuda.attribute(kCapabilityMajor), minor = cuda.attribute(kCapabilityMinor);
  const int capability = 10 * major + minor;
  if (capability < 61) {
    throw CudaError("The GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
                    "; expected 6.1 or higher.");
  }
  const bool sm61 = capability == 61;
  const char* images[kModules] = {
      sm61 ? pascalvl_decode_cubin : pascalvl_decode_ptx, sm61 ? pascalvl_prefill_cubin : pascalvl_prefill_ptx,
      sm61 ? pascalvl_greedy_cubin : pascalvl_greedy_ptx, sm61 ? pascalvl_linear_cubin : pascalvl_linear_ptx,
      sm61 ? pascalvl_append_cubin : pascalvl_append_ptx};
  for (int i = 0; i < kModules; ++i)
    cuda.check(cuda.load_module(&kernels.modules[i], images[i]), "to load the kernels");
  kernels.multiprocessors = cuda.attribute(kMultiprocessorCount);
  return kernels;
}

std::mutex mutex;

// The current context's kernels. The caller holds the mutex.
Kernels& current() {
  static std::map<Context, Kernels> all;
  Context context = nullptr;
  driver().check(driver().current_context(&context), "to tell the current context");
  if (!context) throw CudaError("There is no current CUDA context in this thread; make one before.");
  const auto found = all.find(context);
  return found != all.end() ? found->second : all.emplace(context, load()).first->second;
}

Function function_of(Kernels& kernels, const char* kernel) {
  Function& known = kernels.functions[kernel];
  int module = 0;
  while (std::strncmp(kernel, kPrefixes[module], std::strlen(kPrefixes[module])) != 0) ++module;
  if (!known)
    driver().check(driver().get_function(&known, kernels.modules[module], kernel), std::string("to find ") + kernel);
  return known;
}

}  // namespace

void load_kernels() {
  const std::lock_guard<std::mutex> lock(mutex);
  current();
}

int multiprocessors() {
  const std::lock_guard<std::mutex> lock(mutex);
  return current().multiprocessors;
}

int resident_blocks(const char* kernel, unsigned threads) {
  const std::lock_guard<std::mutex> lock(mutex);
  Kernels& kernels = current();
  int& known = kernels.resident_blocks[kernel];
  if (!known)
    driver().check(driver().resident_blocks(&known, function_of(kernels, kernel), int(threads), 0),
                   std::string("to tell about ") + kernel);
  return known;
}

void launch(const char* kernel, Dim grid, unsigned threads, const void* params, size_t, void* stream) {
  Function function = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    function = function_of(current(), kernel);
  }
  void* arguments[] = {const_cast<void*>(params)};
  driver().check(driver().launch_kernel(function, grid.x, grid.y, grid.z, threads, 1, 1, 0, stream, arguments, nullptr),
                 std::string("to start ") + kernel);
}

}  // namespace pascalvl
