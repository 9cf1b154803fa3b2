// The scan's C interface: the division into tasks. No type of PyTorch's crosses it, so one library
// serves every PyTorch.
//
// Tasks are (directions, image, group of channel blocks), however many threads there are: sums have
// one order, and results are the same, bit for bit, at every run and every number of threads.

#include <cstring>

#include "scan_kernels.h"
#include "scan_paths.h"

#define MMVMAMBA_EXPORT extern "C" __attribute__((visibility("default")))

namespace mmvmamba {
namespace {

// By the number of the instruction set: none above the machine's own, AVX2, AVX-512.
const CpuKernels& kernels(int instruction_set) {
#if defined(__x86_64__)
  if (instruction_set == 2) return kKernelsAvx512;
  if (instruction_set == 1) return kKernelsAvx2;
#endif
  (void)instruction_set;
  return kKernelsBaseline;
}

// Calls work(image, group, begin, end) for all images and groups, and for all directions at once,
// or for each where each has a map of its own.
template <typename T, typename Work>
void divide(const ScanParams<T>& p, int64_t images, int64_t groups, int threads, Work work) {
  const int step = p.sum_direction_stride ? 1 : p.directions;
  const int64_t tasks = images * groups;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < p.directions / step * tasks; ++task) {
    const int begin = static_cast<int>(task / tasks) * step;
    work(task % tasks / groups, task % groups, begin, begin + step);
  }
}

template <typename T>
void forward(const ScanKernels<T>& kernels, const void* params, int64_t images, int threads) {
  const ScanParams<T>& p = *static_cast<const ScanParams<T>*>(params);
  divide(p, images, p.blocks(), threads, [&](int64_t image, int64_t block, int begin, int end) {
    kernels.forward(p, image, block, begin, end);
  });
}

// The gradient of the coefficients of `images` images from `first` on: the groups' partial sums,
// added up in their order.
template <typename T>
void add_partials(const ScanParams<T>& p, int64_t first, int64_t images, int64_t groups,
                  int threads) {
  constexpr int64_t kPositions = 64;  // Their rows stay in the cache between the groups.
  const int64_t chunks = (p.positions + kPositions - 1) / kPositions;
  const int64_t tail = p.partials_row() - p.padded_rank;
#pragma omp parallel for num_threads(threads)
  for (int64_t task = 0; task < images * chunks; ++task) {
    const int64_t slot = task / chunks, begin = task % chunks * kPositions;
    const int64_t end = begin + kPositions < p.positions ? begin + kPositions : p.positions;
    const int64_t rows = (end - begin) * p.directions, size = rows * p.partials_row();
    T* sum = p.partials + slot * p.partials_slot_stride + begin * p.directions * p.partials_row();
    for (int64_t group = 1; group < groups; ++group) {
      const T* partial = sum + group * p.partials_group_stride;
      for (int64_t i = 0; i < size; ++i) sum[i] += partial[i];
    }
    T* target = p.grad_coefficients +
                ((first + slot) * p.positions + begin) * p.directions * (p.rank + tail);
    for (int64_t row = 0; row < rows; ++row, sum += p.partials_row(), target += p.rank + tail) {
      std::memcpy(target, sum, p.rank * sizeof(T));
      std::memcpy(target + p.rank, sum + p.padded_rank, tail * sizeof(T));
    }
  }
}

template <typename T>
void backward(const ScanKernels<T>& kernels, const void* params, int64_t first, int64_t images,
              int64_t groups, int threads) {
  const ScanParams<T>& p = *static_cast<const ScanParams<T>*>(params);
  divide(p, images, groups, threads, [&](int64_t slot, int64_t group, int begin, int end) {
    kernels.backward(p, first + slot, slot, group, group * p.blocks() / groups,
                     (group + 1) * p.blocks() / groups, begin, end);
  });
  add_partials(p, first, images, groups, threads);
}

}  // namespace
}  // namespace mmvmamba

// Bytes of the parameters and of a path, which tell a caller with another idea of them.
MMVMAMBA_EXPORT void mmvmamba_sizes(int64_t* params, int64_t* path) {
  *params = sizeof(mmvmamba::ScanParams<float>);
  *path = sizeof(mmvmamba::Path);
}

// The path of a code over a map.
MMVMAMBA_EXPORT void mmvmamba_make_path(int64_t code, int64_t height, int64_t width,
                                        mmvmamba::Path* path) {
  *path = mmvmamba::make_path(code, height, width);
}

// All images; `params` is a ScanParams<double> or <float>.
MMVMAMBA_EXPORT void mmvmamba_scan_forward(const void* params, int is_double, int instruction_set,
                                           int threads, int64_t images) {
  const mmvmamba::CpuKernels& kernels = mmvmamba::kernels(instruction_set);
  if (is_double) return mmvmamba::forward<double>(kernels.f64, params, images, threads);
  return mmvmamba::forward<float>(kernels.f32, params, images, threads);
}

// `images` images from `first` on, the channels in `groups` groups.
MMVMAMBA_EXPORT void mmvmamba_scan_backward(const void* params, int is_double, int instruction_set,
                                            int threads, int64_t first, int64_t images,
                                            int64_t groups) {
  const mmvmamba::CpuKernels& kernels = mmvmamba::kernels(instruction_set);
  if (is_double) {
    return mmvmamba::backward<double>(kernels.f64, params, first, images, groups, threads);
  }
  return mmvmamba::backward<float>(kernels.f32, params, first, images, groups, threads);
}
