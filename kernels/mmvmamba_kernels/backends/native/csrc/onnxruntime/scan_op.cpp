// The 2D scan as an operator of ONNX Runtime, `SelectiveScan2d` of the domain `mmvmamba`: the CPU's
// kernels without PyTorch.
//
// Inputs: x (B, H, W, D), proj (B, H, W, K, R + 2N), dt_weight (K, D, R), dt_bias (K, D),
// A (K, D, N), D (K, D), all float32. Attribute: paths, a code for each direction, as
// ../cpu/scan_paths.h has them. Output: (B, H, W, D).

#include <climits>
#include <exception>
#include <string>
#include <vector>

#include "../cpu/scan_kernels.h"
#include "../cpu/scan_paths.h"
#include "api.h"

namespace mmvmamba {
namespace onnxruntime {
namespace {

constexpr size_t kInputs = 6;
constexpr size_t kMostPaths = 64;

const ScanKernels<float>& kernels() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kKernelsAvx512.f32;
  }
  if (avx2) return kKernelsAvx2.f32;
#endif
  return kKernelsBaseline.f32;
}

// What failed inside of the runtime, on its way out.
struct Failure {
  Status* status;
};

void check(Status* status) {
  if (status) throw Failure{status};
}

// Nothing may be thrown across the interface.
template <typename Function>
Status* guarded(const Api& api, Function&& function) {
  try {
    function();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return api.fail(kFail, error.what());
  }
}

struct Tensor {
  float* data = nullptr;
  std::vector<int64_t> sizes;

  Tensor(const Api& api, const Context* context, size_t index) {
    const Value* value = nullptr;
    check(api.input(context, index, &value));
    Shape* shape = nullptr;
    check(api.shape(value, &shape));
    size_t rank = 0;
    Status* status = api.rank(shape, &rank);
    if (!status) {
      sizes.resize(rank);
      status = api.sizes(shape, sizes.data(), rank);
    }
    api.release(shape);
    check(status);
    check(api.data(value, &data));
  }
};

struct Kernel {
  const Api& api;
  std::vector<int64_t> codes;

  Kernel(const Api& api_, const KernelInfo* info) : api(api_) {
    size_t count = kMostPaths;
    codes.resize(count);
    check(api.integers(info, "paths", codes.data(), &count));
    codes.resize(count);
  }

  void compute(Context* context) const {
    const Tensor x(api, context, 0), proj(api, context, 1), weight(api, context, 2),
        bias(api, context, 3), rates(api, context, 4), skips(api, context, 5);
    if (x.sizes.size() != 4 || rates.sizes.size() != 3 || weight.sizes.size() != 3) {
      refuse("x must be (B, H, W, D), dt_weight (K, D, R) and A (K, D, N)");
    }
    const int64_t batch = x.sizes[0], height = x.sizes[1], width = x.sizes[2], D = x.sizes[3];
    const int64_t K = codes.size(), R = weight.sizes[2], N = rates.sizes[2];
    using Sizes = std::vector<int64_t>;
    if (proj.sizes != Sizes{batch, height, width, K, R + 2 * N} || weight.sizes != Sizes{K, D, R} ||
        bias.sizes != Sizes{K, D} || rates.sizes != Sizes{K, D, N} || skips.sizes != Sizes{K, D} ||
        N > kMaxStates) {
      refuse("inputs do not fit each other, the number of paths, or 64 states");
    }

    Value* output = nullptr;
    check(api.output(context, 0, x.sizes.data(), x.sizes.size(), &output));
    const int64_t padded = round_up(D, kLanes);
    // Channels last and padded: (K, R, D), (K, D), (K, N, D), and the sum over K.
    std::vector<float> weights(K * R * padded), biases(K * padded), decays(K * N * padded),
        skip(padded);
    std::vector<Path> paths;
    for (int64_t k = 0; k < K; ++k) {
      paths.push_back(make_path(codes[k], height, width));
      for (int64_t d = 0; d < D; ++d) {
        const int64_t row = k * D + d;
        for (int64_t r = 0; r < R; ++r) {
          weights[(k * R + r) * padded + d] = weight.data[row * R + r];
        }
        for (int64_t n = 0; n < N; ++n) {
          decays[(k * N + n) * padded + d] = rates.data[row * N + n];
        }
        biases[k * padded + d] = bias.data[row];
        skip[d] += skips.data[row];
      }
    }

    ScanParams<float> params{};
    params.channels = D;
    params.padded_channels = padded;
    params.positions = height * width;
    params.states = static_cast<int>(N);
    params.rank = static_cast<int>(R);
    params.directions = static_cast<int>(K);
    params.softplus = true;
    params.paths = paths.data();
    params.x = {x.data, params.positions * D, D};
    params.out = params.x;
    check(api.data(output, &params.out.data));
    params.coefficients = proj.data;
    params.coefficients_direction_stride = R + 2 * N;
    params.coefficients_position_stride = K * params.coefficients_direction_stride;
    params.coefficients_image_stride = params.positions * params.coefficients_position_stride;
    params.weight = weights.data();
    params.bias = biases.data();
    params.A = decays.data();
    params.skip = skip.data();
    auto task = [](void* data, size_t index) {
      const auto& p = *static_cast<const ScanParams<float>*>(data);
      const int64_t number = static_cast<int64_t>(index);
      kernels().forward(p, number / p.blocks(), number % p.blocks(), 0, p.directions);
    };
    check(api.parallel_for(context, task, batch * params.blocks(), &params));
  }

  [[noreturn]] void refuse(const char* what) const {
    const std::string message = std::string("mmvmamba's SelectiveScan2d: ") + what;
    throw Failure{api.fail(kInvalidArgument, message.c_str())};
  }
};

const CustomOp kScan = {
    kVersion,
    nullptr,
    [](const CustomOp*) { return "SelectiveScan2d"; },
    [](const CustomOp*) -> const char* { return nullptr; },
    [](const CustomOp*, size_t) { return kFloat; },
    [](const CustomOp*) { return kInputs; },
    [](const CustomOp*, size_t) { return kFloat; },
    [](const CustomOp*) -> size_t { return 1; },
    nullptr,
    [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*, size_t) { return 0; },
    [](const CustomOp*, size_t) { return 0; },
    nullptr,
    nullptr,
    nullptr,
    nullptr,
    [](const CustomOp*, const Api* api, const KernelInfo* info, void** kernel) {
      return guarded(*api, [&] { *kernel = new Kernel(*api, info); });
    },
    [](void* state, Context* context) {
      const auto& kernel = *static_cast<const Kernel*>(state);
      return guarded(kernel.api, [&] { kernel.compute(context); });
    },
    nullptr,
    [](const CustomOp*) { return 1; },
    [](const CustomOp*) { return INT_MAX; },
};

}  // namespace
}  // namespace onnxruntime
}  // namespace mmvmamba

// What ONNX Runtime looks for in a library of operators.
extern "C" __attribute__((visibility("default"))) mmvmamba::onnxruntime::Status* RegisterCustomOps(
    mmvmamba::onnxruntime::Options* options, const mmvmamba::onnxruntime::ApiBase* base) {
  using namespace mmvmamba::onnxruntime;
  const Api* api = base->get(kVersion);
  if (!api) {
    // Version 1 is there in all of them.
    return base->get(1)->fail(kFail, "mmvmamba's operators need ONNX Runtime 1.17 or later");
  }
  return guarded(*api, [&] {
    // Sessions keep it: it stays, as do the operators.
    static Domain* domain = [&] {
      Domain* made = nullptr;
      check(api->create_domain("mmvmamba", &made));
      check(api->add_operator(made, &kScan));
      return made;
    }();
    check(api->add_domain(options, domain));
  });
}
