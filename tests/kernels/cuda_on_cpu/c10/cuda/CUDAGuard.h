#pragma once

#include <c10/core/Device.h>

namespace c10 {
namespace cuda {

struct OptionalCUDAGuard {
  explicit OptionalCUDAGuard(Device) {}
};

}  // namespace cuda
}  // namespace c10
