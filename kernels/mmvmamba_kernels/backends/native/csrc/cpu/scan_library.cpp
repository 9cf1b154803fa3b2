// The scan's C interface: the division into tasks. No type of PyTorch's crosses it, so one library
// serves every PyTorch.
//
// Tasks are (image, group of channel blocks), however many threads there are: sums have one order,
// and results are the same, bit for bit, at every run and every number of threads.

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

template <typename T>
void forward(const ScanKernels<T>& kernels, const void* params, int64_t images, int threads) {
  const ScanParams<T>& p = *static_cast<const ScanParams<T>*>(params);
  const int parts = p.out_direction_stride ? p.directions : 1;
  const int64_t tasks = images * p.blocks();
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < parts * tasks; ++task) {
    const int first = static_cast<int>(task / tasks);
    kernels.forward(p, task % tasks / p.blocks(), task % p.blocks(), first,
                    parts > 1 ? first + 1 : p.directions);
  }
}

template <typename T>
void backward(const ScanKernels<T>& kernels, const void* params, int64_t first, int64_t images,
              int64_t groups, int threads) {
  const ScanParams<T>& p = *static_cast<const ScanParams<T>*>(params);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < images * groups; ++task) {
    const int64_t slot = task / groups, group = task % groups;
    kernels.backward(p, first + slot, slot, group, group * p.blocks() / groups,
                     (group + 1) * p.blocks() / groups);
  }
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
