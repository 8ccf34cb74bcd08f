// Starts kernels through the CUDA driver, which is opened when first needed: the library itself needs no CUDA to load.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>

#include "plugins/kernels/launch.h"

// The images that build.py compiled, put in by images.S: for each module a cubin for SM61 and PTX for newer GPUs.
#define MODULE(NAME)                               \
  extern "C" const char pascalvl_##NAME##_cubin[]; \
  extern "C" const char pascalvl_##NAME##_ptx[];
PASCALVL_ALL_MODULES(MODULE)
#undef MODULE

namespace pascalvl {
namespace {

using Result = int;
using Context = void*;
using LoadedModule = void*;
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
  Result (*load_module)(LoadedModule*, const void*);
  Result (*unload_module)(LoadedModule);
  Result (*get_function)(Function*, LoadedModule, const char*);
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
    find(library, "cuModuleUnload", unload_module);
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

#define MODULE(NAME) NAME,
enum class Module { PASCALVL_ALL_MODULES(MODULE) };
#undef MODULE

#define MODULE(NAME) {pascalvl_##NAME##_cubin, pascalvl_##NAME##_ptx},
const char* const kImages[][2] = {PASCALVL_ALL_MODULES(MODULE)};
#undef MODULE
constexpr int kModules = sizeof kImages / sizeof *kImages;

#define PASCALVL_KERNEL(MODULE, NAME, PARAMS, THREADS) Module::MODULE,
constexpr Module kModuleOf[] = {PASCALVL_ALL_KERNELS};
#undef PASCALVL_KERNEL

// The kernels in one context; functions are found when first needed.
struct Kernels {
  LoadedModule modules[kModules];
  Function functions[kKernels];
  int resident_blocks[kKernels];
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
  for (int i = 0; i < kModules; ++i)
    cuda.check(cuda.load_module(&kernels.modules[i], kImages[i][capability == 61 ? 0 : 1]), "to load the kernels");
  kernels.multiprocessors = cuda.attribute(kMultiprocessorCount);
  return kernels;
}

std::mutex mutex;

// By context. Whoever looks in it, or at what is in it, holds the mutex.
std::map<Context, Kernels> loaded;

Context current_context() {
  Context context = nullptr;
  driver().check(driver().current_context(&context), "to tell the current context");
  if (!context) throw CudaError("There is no current CUDA context in this thread; make one before.");
  return context;
}

// The current context's kernels.
Kernels& current() {
  Context context = current_context();
  const auto found = loaded.find(context);
  return found != loaded.end() ? found->second : loaded.emplace(context, load()).first->second;
}

std::string doing(const char* what, Kernel kernel) { return std::string(what) + kKernelNames[int(kernel)]; }

Function function_of(Kernels& kernels, Kernel kernel) {
  Function& known = kernels.functions[int(kernel)];
  const LoadedModule module = kernels.modules[int(kModuleOf[int(kernel)])];
  if (!known)
    driver().check(driver().get_function(&known, module, kKernelNames[int(kernel)]), doing("to find ", kernel));
  return known;
}

}  // namespace

void load_kernels() {
  const std::lock_guard<std::mutex> lock(mutex);
  current();
}

void unload_kernels() {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find(current_context());
  if (found == loaded.end()) return;
  const Kernels kernels = found->second;
  loaded.erase(found);
  for (LoadedModule module : kernels.modules) driver().check(driver().unload_module(module), "to unload the kernels");
}

int multiprocessors() {
  const std::lock_guard<std::mutex> lock(mutex);
  return current().multiprocessors;
}

int resident_blocks(Kernel kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  Kernels& kernels = current();
  int& known = kernels.resident_blocks[int(kernel)];
  if (!known)
    driver().check(driver().resident_blocks(&known, function_of(kernels, kernel), int(kKernelThreads[int(kernel)]), 0),
                   doing("to tell about ", kernel));
  return known;
}

void launch(Kernel kernel, Dim grid, const void* params, void* stream) {
  Function function = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    function = function_of(current(), kernel);
  }
  void* arguments[] = {const_cast<void*>(params)};
  driver().check(driver().launch_kernel(function, grid.x, grid.y, grid.z, kKernelThreads[int(kernel)], 1, 1, 0, stream,
                                        arguments, nullptr),
                 doing("to start ", kernel));
}

}  // namespace pascalvl
