// CUDA's language for a C++ compiler, as much of it as the kernels use. Threads of a warp are
// fibers that take turns at every warp primitive; warps and blocks run one after another, so that
// kernels may have no barrier of a whole block.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

namespace cuda_on_cpu {

// Of the thread that runs now.
extern dim3 thread, block;

// Runs every thread of every block. Fails if threads of a warp do not meet at the same primitives,
// or if one writes behind the shared memory that was asked for.
cudaError_t run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel);

// Waits for the other threads of the warp.
void meet();

// Where thread `lane` of the warp leaves what the others read after meet(). Two places take turns.
void* mailbox(unsigned lane, bool other);

// Alternates with every exchange of this thread.
bool turn();

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread)
#define blockIdx (cuda_on_cpu::block)

inline void __syncwarp() { cuda_on_cpu::meet(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  if (mask != 0xffffffffu) std::abort();
  const bool turn = cuda_on_cpu::turn();
  std::memcpy(cuda_on_cpu::mailbox(threadIdx.x % 32, turn), &value, sizeof(T));
  cuda_on_cpu::meet();
  std::memcpy(&value, cuda_on_cpu::mailbox(source, turn), sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance) {
  return __shfl_sync(mask, value, threadIdx.x % 32 ^ distance);
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 blocks, dim3 threads, void** arguments,
                             size_t shared, cudaStream_t) {
  const P& argument = *static_cast<P*>(arguments[0]);
  return cuda_on_cpu::run(blocks, threads, shared, [&] { kernel(argument); });
}
