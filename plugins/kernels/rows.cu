// What is left between the ops where no TensorRT does it: rows picked out by number, and an addition. Bound by DRAM.
#include "plugins/kernels/device.cuh"

namespace pascalvl {

// Grid: (blocks of kRowThreads * 4 floats of a row, rows picked).
extern "C" __global__ void __launch_bounds__(kRowThreads) gather_rows(const GatherParams p) {
  const int at = 4 * (blockIdx.x * kRowThreads + threadIdx.x);
  if (at >= p.width) return;
  const int row = clamped(p.rows[blockIdx.y], 0, p.num_rows - 1);
  *reinterpret_cast<float4*>(p.out + (long long)blockIdx.y * p.width + at) =
      *reinterpret_cast<const float4*>(p.from + (long long)row * p.width + at);
}

// Grid: blocks of kRowThreads * 4 floats.
extern "C" __global__ void __launch_bounds__(kRowThreads) add_to(const AddParams p) {
  const long long at = 4 * ((long long)blockIdx.x * kRowThreads + threadIdx.x);
  if (at >= p.count) return;
  float4& x = *reinterpret_cast<float4*>(p.x + at);
  const float4 y = *reinterpret_cast<const float4*>(p.y + at);
  x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
}

}  // namespace pascalvl
