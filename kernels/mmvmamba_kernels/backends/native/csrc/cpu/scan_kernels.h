// The scan's inner loops, compiled for several instruction sets.
#pragma once

#include "../scan_params.h"

namespace mmvmamba {

template <typename T>
struct ScanKernels {
  // One block of channels of one image: the directions [begin, end), summed into `out`. The skip
  // connection comes with the first.
  void (*forward)(const ScanParams<T>& params, int64_t image, int64_t block, int begin, int end);

  // The gradients of the blocks [first, last) of one image, in the directions [begin, end). `slot`
  // and `group` say where its parts of the parameters' and the coefficients' gradients go.
  void (*backward)(const ScanParams<T>& params, int64_t image, int64_t slot, int64_t group,
                   int64_t first, int64_t last, int begin, int end);
};

struct CpuKernels {
  ScanKernels<float> f32;
  ScanKernels<double> f64;
};

extern const CpuKernels kKernelsBaseline;
#if defined(__x86_64__)
extern const CpuKernels kKernelsAvx2;
extern const CpuKernels kKernelsAvx512;
#endif

}  // namespace mmvmamba
