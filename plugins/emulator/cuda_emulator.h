// Runs CUDA kernels on the CPU: as much of the language as the kernels in plugins/kernels use, so that the very same
// source can be compiled by g++, checked by sanitizers and executed where there is no GPU.
//
// A block's threads are fibers that change over at barriers, at warp operations and at their end: fast, and always in
// the same order; blocks are spread over the cores. With PASCALVL_EMULATOR_THREADS each CUDA thread is a thread of the
// operating system instead, and blocks run one after another: so the thread sanitizer sees a missing barrier as the
// race it is. Shared memory is filled with NaNs before each block there (but not under the address sanitizer, whose red
// zones around it are worth more).
//
// Divergence is judged more strictly than on the card: all threads of a block that have not returned must meet at each
// __syncthreads, all of a warp at each warp operation; else the launch aborts and says who waits where.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#ifdef PASCALVL_EMULATOR_THREADS
#include <chrono>
#include <condition_variable>
#include <mutex>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

namespace emulator {

constexpr unsigned kWarpSize = 32;

enum class Stop { kBlockBarrier, kWarpBarrier, kEnd };

// One CUDA thread's place in its grid.
struct Place {
  uint3 thread;
  uint3 block;
  dim3 block_dim;
  dim3 grid_dim;
  unsigned index;  // of the thread in its block
};

// What the lanes of a warp show each other; two sets used in turn, so that one barrier an exchange is enough.
struct Exchange {
  uint64_t values[2][kWarpSize];
};

struct Thread {
  Place place;
  Exchange* exchange;
  unsigned turn = 0;
};

inline thread_local Thread* self = nullptr;

void wait(Stop stop);

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what.c_str());
  std::abort();
}

inline std::string describe(const Place& p) {
  char text[96];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", p.thread.x, p.thread.y, p.thread.z,
                p.block.x, p.block.y, p.block.z);
  return text;
}

inline uint3 unflatten(unsigned index, const dim3& shape) {
  return {index % shape.x, index / shape.x % shape.y, index / shape.x / shape.y};
}

template <typename T>
T exchange(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a lane shows at most eight bytes");
  const unsigned lane = self->place.index % kWarpSize;
  uint64_t* values = self->exchange->values[self->turn++ % 2];
  std::memcpy(&values[lane], &value, sizeof value);
  wait(Stop::kWarpBarrier);
  std::memcpy(&value, &values[source_lane], sizeof value);
  return value;
}

#ifdef PASCALVL_EMULATOR_THREADS

// A barrier that members can leave for good, as a CUDA thread does that returns.
class Barrier {
 public:
  explicit Barrier(unsigned members) : members_(members) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (++waiting_ == members_) return open();
    const unsigned phase = phase_;
    if (!opened_.wait_for(lock, std::chrono::seconds(60), [&] { return phase_ != phase; })) {
      fail(describe(self->place) + " waits at a barrier that others do not reach");
    }
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (--members_ > 0 && waiting_ == members_) open();
  }

 private:
  void open() {
    waiting_ = 0;
    ++phase_;
    opened_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable opened_;
  unsigned members_;
  unsigned waiting_ = 0;
  unsigned phase_ = 0;
};

struct Block {
  explicit Block(unsigned threads) : all(threads), exchanges((threads + kWarpSize - 1) / kWarpSize) {
    for (unsigned first = 0; first < threads; first += kWarpSize) {
      warps.push_back(std::make_unique<Barrier>(std::min(kWarpSize, threads - first)));
    }
  }
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::vector<Exchange> exchanges;
};

inline thread_local Block* block = nullptr;

inline void wait(Stop stop) {
  Barrier& warp = *block->warps[self->place.index / kWarpSize];
  switch (stop) {
    case Stop::kBlockBarrier:
      return block->all.wait();
    case Stop::kWarpBarrier:
      return warp.wait();
    case Stop::kEnd:
      warp.leave();
      block->all.leave();
  }
}

#ifdef __SANITIZE_ADDRESS__

// The address sanitizer surrounds only variables that are in no section of their own.
#define __shared__ static

inline void poison_shared_memory() {}

#else

extern "C" {
// Bounds of the section that __shared__ variables are put in, made by the linker.
extern char __start_emulated_shared[] __attribute__((weak));
extern char __stop_emulated_shared[] __attribute__((weak));
}

#define __shared__ static __attribute__((section("emulated_shared")))

inline void poison_shared_memory() {
  constexpr uint32_t kNaN = 0x7fc0dead;
  for (char* p = __start_emulated_shared; p && p + sizeof kNaN <= __stop_emulated_shared; p += sizeof kNaN) {
    std::memcpy(p, &kNaN, sizeof kNaN);
  }
}

#endif

inline void run(const std::function<void()>& kernel, dim3 grid_dim, dim3 block_dim) {
  const unsigned threads = block_dim.count();
  for (unsigned b = 0; b < grid_dim.count(); ++b) {
    poison_shared_memory();
    Block shared(threads);
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        Thread thread{{unflatten(t, block_dim), unflatten(b, grid_dim), block_dim, grid_dim, t},
                      &shared.exchanges[t / kWarpSize]};
        self = &thread;
        block = &shared;
        kernel();
        wait(Stop::kEnd);
      });
    }
    for (std::thread& thread : pool) thread.join();
  }
}

#else

#define __shared__ static thread_local

// Saves the callee-saved registers on the current stack, and goes on from another one.
extern "C" void pascalvl_switch_stack(void** save, void* load);
#ifdef __x86_64__
asm(R"(
.weak pascalvl_switch_stack
.type pascalvl_switch_stack, @function
pascalvl_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pascalvl_switch_stack, .-pascalvl_switch_stack
)");
#else
#error "the emulator's fibers need x86-64; build with PASCALVL_EMULATOR_THREADS elsewhere"
#endif

// Runs the blocks that are handed to it, one after another, on one operating system thread.
class Worker {
 public:
  Worker(const std::function<void()>& kernel, dim3 grid_dim, dim3 block_dim)
      : kernel_(kernel),
        grid_dim_(grid_dim),
        block_dim_(block_dim),
        fibers_(block_dim.count()),
        exchanges_((block_dim.count() + kWarpSize - 1) / kWarpSize) {
    // Not by make_unique, which would write zeros to 64 MB at each launch: most of the time that small kernels take.
    for (Fiber& fiber : fibers_) fiber.memory.reset(new char[kStackBytes]);
  }

  void run(unsigned block_index) {
    for (unsigned t = 0; t < fibers_.size(); ++t) start(fibers_[t], t, block_index);
    unsigned running = fibers_.size();
    while (running > 0) {
      bool moved = false;
      for (Fiber& fiber : fibers_) {
        if (!fiber.ready) continue;
        moved = true;
        resume(fiber);
        if (fiber.stop == Stop::kEnd) --running;
      }
      if (!moved && !open_barriers()) report_deadlock();
    }
  }

  void stop_current(Stop stop) {
    Fiber& fiber = *current_;
    fiber.stop = stop;
    fiber.ready = false;
    pascalvl_switch_stack(&fiber.stack, scheduler_);
  }

  static inline thread_local Worker* here = nullptr;

 private:
  static constexpr size_t kStackBytes = 256 << 10;

  struct Fiber {
    std::unique_ptr<char[]> memory;
    void* stack = nullptr;
    Thread thread;
    Stop stop;
    bool ready;
  };

  void start(Fiber& fiber, unsigned index, unsigned block_index) {
    fiber.thread =
        Thread{{unflatten(index, block_dim_), unflatten(block_index, grid_dim_), block_dim_, grid_dim_, index},
               &exchanges_[index / kWarpSize]};
    fiber.ready = true;
    auto top = reinterpret_cast<uintptr_t>(fiber.memory.get() + kStackBytes) & ~uintptr_t{15};
    void** stack = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and room that keeps the alignment
    stack[6] = reinterpret_cast<void*>(&enter);
    fiber.stack = stack;
  }

  void resume(Fiber& fiber) {
    current_ = &fiber;
    self = &fiber.thread;
    pascalvl_switch_stack(&scheduler_, fiber.stack);
  }

  static void enter() {
    here->kernel_();
    here->stop_current(Stop::kEnd);
  }

  // Lets on every warp, else the block, whose threads have all arrived; returns whether there was one.
  bool open_barriers() {
    bool opened = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarpSize) {
      opened |= open(first, std::min(fibers_.size(), first + kWarpSize), Stop::kWarpBarrier);
    }
    return opened || open(0, fibers_.size(), Stop::kBlockBarrier);
  }

  bool open(size_t first, size_t last, Stop barrier) {
    bool any = false;
    for (size_t t = first; t < last; ++t) {
      if (fibers_[t].stop != barrier && fibers_[t].stop != Stop::kEnd) return false;
      any |= fibers_[t].stop == barrier;
    }
    for (size_t t = first; any && t < last; ++t) fibers_[t].ready = fibers_[t].stop == barrier;
    return any;
  }

  [[noreturn]] void report_deadlock() {
    for (Fiber& fiber : fibers_) {
      if (fiber.stop == Stop::kEnd) continue;
      fail(describe(fiber.thread.place) + " waits at a " + (fiber.stop == Stop::kBlockBarrier ? "block" : "warp") +
           " barrier that others do not reach");
    }
    std::abort();
  }

  const std::function<void()>& kernel_;
  dim3 grid_dim_, block_dim_;
  std::vector<Fiber> fibers_;
  std::vector<Exchange> exchanges_;
  Fiber* current_ = nullptr;
  void* scheduler_ = nullptr;
};

inline void wait(Stop stop) { Worker::here->stop_current(stop); }

inline void run(const std::function<void()>& kernel, dim3 grid_dim, dim3 block_dim) {
  std::atomic<unsigned> next{0};
  auto work = [&] {
    Worker worker(kernel, grid_dim, block_dim);
    Worker::here = &worker;
    for (unsigned b; (b = next++) < grid_dim.count();) worker.run(b);
  };
  std::vector<std::thread> pool;
  const unsigned cores = std::max(1u, std::min(std::thread::hardware_concurrency(), grid_dim.count()));
  for (unsigned i = 1; i < cores; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
}

#endif

}  // namespace emulator

// The language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#define threadIdx (emulator::self->place.thread)
#define blockIdx (emulator::self->place.block)
#define blockDim (emulator::self->place.block_dim)
#define gridDim (emulator::self->place.grid_dim)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline void __syncthreads() { emulator::wait(emulator::Stop::kBlockBarrier); }
inline void __syncwarp(unsigned = 0xffffffff) { emulator::wait(emulator::Stop::kWarpBarrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = emulator::kWarpSize) {
  const unsigned own = emulator::self->place.index % emulator::kWarpSize;
  return emulator::exchange(value, (own & ~(width - 1)) | (lane & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = emulator::kWarpSize) {
  const unsigned own = emulator::self->place.index % emulator::kWarpSize;
  const unsigned source = own ^ mask;
  return emulator::exchange(value, (source & ~(width - 1)) == (own & ~(width - 1)) ? source : own);
}

inline int __any_sync(unsigned lanes, int value) {
  int any = value != 0;
  for (int mask = 1; mask < int(emulator::kWarpSize); mask *= 2) any |= __shfl_xor_sync(lanes, any, mask);
  return any;
}

inline unsigned __ballot_sync(unsigned lanes, int value) {
  unsigned ballot = unsigned(value != 0) << emulator::self->place.index % emulator::kWarpSize;
  for (int mask = 1; mask < int(emulator::kWarpSize); mask *= 2) ballot |= __shfl_xor_sync(lanes, ballot, mask);
  return ballot;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcs(const T* p) {
  return *p;
}

inline int __dp4a(int a, int b, int c) {
  uint32_t sum = c;
  for (int byte = 0; byte < 4; ++byte) sum += int8_t(a >> 8 * byte) * int8_t(b >> 8 * byte);
  return int(sum);
}

// Byte i of the result is the byte of y:x that nibble i of the selector numbers.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

// No number becomes 0, and what is too large the largest there is.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : int(std::nearbyint(x));
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// Half is a storage type alone, as on the card.
struct __half {
  _Float16 value;
};
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
