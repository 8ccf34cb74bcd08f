// Runs CUDA kernels on the CPU: as much of the language as the kernels in plugins/kernels use, so that the very same
// source can be compiled by g++, checked by sanitizers and executed where there is no GPU.
//
// A block's threads are fibers that change over at barriers, at warp operations and at their end: fast, and always in
// the same order; blocks are spread over the cores. With PASCALVL_EMULATOR_SERIAL, for sanitizers, blocks run one after
// another on one core; shared memory is filled with NaNs before each (but not under the address sanitizer, whose red
// zones around it are worth more). The thread sanitizer is told that fibers are threads, which barriers alone bring
// into an order, so that it sees a missing barrier as the race it is.
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
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
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

enum Stop { kBlockBarrier, kWarpBarrier, kEnd };

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

class Worker;

struct Thread {
  Place place;
  Exchange* exchange;
  Worker* worker;
  unsigned passed[2] = {};  // barriers of the block, of the warp
};

constexpr size_t kStackBytes = 256 << 10;  // of a fiber, and what its first byte is aligned to

// The thread that runs: its stack begins with its address, which a variable of an operating system thread would be
// asked for by a call each time. The same all through a function: the compiler may read it once.
inline Thread* self() {
  Thread* thread;
  asm("movq %%rsp, %0\n\tandq %1, %0\n\tmovq (%0), %0" : "=r"(thread) : "i"(-long(kStackBytes)) : "cc");
  return thread;
}

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
  const unsigned lane = self()->place.index % kWarpSize;
  uint64_t* values = self()->exchange->values[self()->passed[kWarpBarrier] % 2];
  std::memcpy(&values[lane], &value, sizeof value);
  wait(kWarpBarrier);
  std::memcpy(&value, &values[source_lane], sizeof value);
  return value;
}

// What the thread sanitizer is told. What UNCHECKED functions do it does not see.
#ifdef __SANITIZE_THREAD__

#define UNCHECKED __attribute__((no_sanitize("thread")))

inline void* current_fiber() { return __tsan_get_current_fiber(); }
inline void* create_fiber() { return __tsan_create_fiber(0); }
inline void destroy_fiber(void* fiber) { __tsan_destroy_fiber(fiber); }
UNCHECKED inline void announce_switch(void* fiber) { __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync); }
// What acquires from an address comes after all that released to it.
UNCHECKED inline void release(void* address) { __tsan_release(address); }
UNCHECKED inline void acquire(void* address) { __tsan_acquire(address); }

#else

#define UNCHECKED

inline void* current_fiber() { return nullptr; }
inline void* create_fiber() { return nullptr; }
inline void destroy_fiber(void*) {}
inline void announce_switch(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}

#endif

#ifdef PASCALVL_EMULATOR_SERIAL

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

UNCHECKED inline void poison_shared_memory() {
  constexpr uint32_t kNaN = 0x7fc0dead;
  auto* p = reinterpret_cast<uint32_t*>(__start_emulated_shared);
  auto* end = reinterpret_cast<uint32_t*>(__stop_emulated_shared);
  while (p < end) *p++ = kNaN;
}

#endif

#else

#define __shared__ static thread_local

inline void poison_shared_memory() {}

#endif

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
#error "the emulator's fibers need x86-64"
#endif

// Fibers' stacks, kept for further launches: new pages took longer than most kernels.
class Stacks {
 public:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  using Stack = std::unique_ptr<void, Free>;

  Stack take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (unused_.empty()) return Stack(std::aligned_alloc(kStackBytes, kStackBytes));
    Stack stack = std::move(unused_.back());
    unused_.pop_back();
    return stack;
  }

  void give_back(Stack stack) {
    std::lock_guard<std::mutex> lock(mutex_);
    unused_.push_back(std::move(stack));
  }

 private:
  std::mutex mutex_;
  std::vector<Stack> unused_;
};

inline Stacks stacks;

// Runs the blocks that are handed to it, one after another, on one operating system thread.
class Worker {
 public:
  Worker(const std::function<void()>& kernel, dim3 grid_dim, dim3 block_dim)
      : kernel_(kernel),
        grid_dim_(grid_dim),
        block_dim_(block_dim),
        fibers_(block_dim.count()),
        warps_((block_dim.count() + kWarpSize - 1) / kWarpSize) {
    scheduler_.identity = current_fiber();
    for (unsigned t = 0; t < fibers_.size(); ++t) {
      Fiber& fiber = fibers_[t];
      fiber.thread = {{unflatten(t, block_dim_), {}, block_dim_, grid_dim_, t}, &warps_[t / kWarpSize].exchange, this};
      fiber.memory = stacks.take();
      *static_cast<Thread**>(fiber.memory.get()) = &fiber.thread;
      // Six registers, the entry, and room that keeps the alignment.
      void** stack = static_cast<void**>(fiber.memory.get()) + kStackBytes / sizeof(void*) - 8;
      stack[6] = reinterpret_cast<void*>(&enter);
      fiber.context = {stack, create_fiber()};
    }
  }

  ~Worker() {
    for (Fiber& fiber : fibers_) {
      destroy_fiber(fiber.context.identity);
      stacks.give_back(std::move(fiber.memory));
    }
  }

  UNCHECKED void run(unsigned block_index) {
    poison_shared_memory();
    const uint3 block = unflatten(block_index, grid_dim_);
    for (Fiber& fiber : fibers_) {
      fiber.thread.place.block = block;
      fiber.thread.passed[kBlockBarrier] = fiber.thread.passed[kWarpBarrier] = 0;
      fiber.ready = true;
    }
    release(&started_);
    running_ = fibers_.size();
    while (running_ > 0) {
      bool moved = false;
      for (Fiber& fiber : fibers_) {
        if (!fiber.ready) continue;
        moved = true;
        resume(fiber);
      }
      if (!moved && !open_barriers()) report_deadlock();
    }
    acquire(&ended_);
  }

  UNCHECKED void stop_current(Stop stop) {
    Fiber& fiber = *current_;
    fiber.stop = stop;
    fiber.ready = false;
    running_ -= stop == kEnd;
    // At once to the next one, where the scheduler would go.
    Fiber* next = &fiber + 1;
    const bool is_ready = next != past_last_ && next->ready;
    if (is_ready) current_ = next;
    switch_to(fiber.context, is_ready ? next->context : scheduler_);
  }

  // The current thread waits for the others of its block or warp.
  UNCHECKED void wait(Stop barrier) {
    Thread& thread = current_->thread;
    Barrier& all = barrier == kBlockBarrier ? barrier_ : warps_[thread.place.index / kWarpSize].barrier;
    uint64_t* turn = &all.turns[thread.passed[barrier]++ % 2];
    release(turn);
    stop_current(barrier);
    acquire(turn);
  }

 private:
  struct Context {
    void* stack;
    void* identity;  // for the thread sanitizer
  };

  struct Fiber {
    Stacks::Stack memory;
    Context context;
    Thread thread;
    Stop stop;
    bool ready;
  };

  // Addresses of which threads know when they pass it for an even and an odd time: who has passed it, and goes on to
  // the next, must not count as one who arrived.
  struct Barrier {
    uint64_t turns[2];
  };

  struct Warp {
    Exchange exchange;
    Barrier barrier;
  };

  UNCHECKED static void switch_to(Context& from, Context& to) {
    announce_switch(to.identity);
    pascalvl_switch_stack(&from.stack, to.stack);
  }

  UNCHECKED void resume(Fiber& fiber) {
    current_ = &fiber;
    switch_to(scheduler_, fiber.context);
  }

  // A fiber's life: its thread of one block after another.
  UNCHECKED static void enter() {
    Worker& worker = *self()->worker;
    for (;;) {
      acquire(&worker.started_);
      worker.kernel_();
      release(&worker.ended_);
      worker.stop_current(kEnd);
    }
  }

  // Lets on every warp, else the block, whose threads have all arrived; returns whether there was one.
  UNCHECKED bool open_barriers() {
    bool opened = false;
    for (size_t first = 0; first < fibers_.size(); first += kWarpSize) {
      opened |= open(first, std::min(fibers_.size(), first + kWarpSize), kWarpBarrier);
    }
    return opened || open(0, fibers_.size(), kBlockBarrier);
  }

  UNCHECKED bool open(size_t first, size_t last, Stop barrier) {
    bool any = false;
    for (size_t t = first; t < last; ++t) {
      if (fibers_[t].stop != barrier && fibers_[t].stop != kEnd) return false;
      any |= fibers_[t].stop == barrier;
    }
    for (size_t t = first; any && t < last; ++t) fibers_[t].ready = fibers_[t].stop == barrier;
    return any;
  }

  [[noreturn]] void report_deadlock() {
    for (Fiber& fiber : fibers_) {
      if (fiber.stop == kEnd) continue;
      fail(describe(fiber.thread.place) + " waits at a " + (fiber.stop == kBlockBarrier ? "block" : "warp") +
           " barrier that others do not reach");
    }
    std::abort();
  }

  const std::function<void()>& kernel_;
  dim3 grid_dim_, block_dim_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Fiber* const past_last_ = fibers_.data() + fibers_.size();
  Fiber* current_ = nullptr;
  unsigned running_ = 0;  // that have not ended
  Context scheduler_{};
  Barrier barrier_{};
  uint64_t started_ = 0, ended_ = 0;  // addresses, as a barrier's
};

inline void wait(Stop barrier) { self()->worker->wait(barrier); }

inline void run(const std::function<void()>& kernel, dim3 grid_dim, dim3 block_dim) {
  std::atomic<unsigned> next{0};
  auto work = [&] {
    Worker worker(kernel, grid_dim, block_dim);
    for (unsigned b; (b = next++) < grid_dim.count();) worker.run(b);
  };
#ifdef PASCALVL_EMULATOR_SERIAL
  const unsigned cores = 1;
#else
  const unsigned cores = std::max(1u, std::min(std::thread::hardware_concurrency(), grid_dim.count()));
#endif
  std::vector<std::thread> pool;
  for (unsigned i = 1; i < cores; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace emulator

// The language -------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict

#define threadIdx (emulator::self()->place.thread)
#define blockIdx (emulator::self()->place.block)
#define blockDim (emulator::self()->place.block_dim)
#define gridDim (emulator::self()->place.grid_dim)

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

inline void __syncthreads() { emulator::wait(emulator::kBlockBarrier); }
inline void __syncwarp(unsigned = 0xffffffff) { emulator::wait(emulator::kWarpBarrier); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = emulator::kWarpSize) {
  const unsigned own = emulator::self()->place.index % emulator::kWarpSize;
  return emulator::exchange(value, (own & ~(width - 1)) | (lane & (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = emulator::kWarpSize) {
  const unsigned own = emulator::self()->place.index % emulator::kWarpSize;
  const unsigned source = own ^ mask;
  return emulator::exchange(value, (source & ~(width - 1)) == (own & ~(width - 1)) ? source : own);
}

inline int __any_sync(unsigned lanes, int value) {
  int any = value != 0;
  for (int mask = 1; mask < int(emulator::kWarpSize); mask *= 2) any |= __shfl_xor_sync(lanes, any, mask);
  return any;
}

inline unsigned __ballot_sync(unsigned lanes, int value) {
  unsigned ballot = unsigned(value != 0) << emulator::self()->place.index % emulator::kWarpSize;
  for (int mask = 1; mask < int(emulator::kWarpSize); mask *= 2) ballot |= __shfl_xor_sync(lanes, ballot, mask);
  return ballot;
}

template <typename T, typename U>
T atomicAdd(T* address, U value) {
  return __atomic_fetch_add(address, T(value), __ATOMIC_RELAXED);
}

inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
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
