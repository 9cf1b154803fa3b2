// The scan as PyTorch operators on CUDA tensors: layouts, buffers, and where paths are cut.
//
// Everything runs on the current stream, and nothing waits for the device.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "scan_kernels.h"

// The tests compile all this for the CPU, under another name.
#ifndef MMVMAMBA_LIBRARY
#define MMVMAMBA_LIBRARY mmvmamba_cuda
#define MMVMAMBA_DEVICE CUDA
#endif
#define LIBRARY(name, variable) TORCH_LIBRARY(name, variable)

namespace mmvmamba {
namespace cuda {
namespace {

using at::Tensor;

// Warps of a multiprocessor: with fewer than `enough`, paths are cut into chunks, although that
// computes every step size twice; `full` is what they are cut for.
struct Warps {
  int64_t enough;
  int64_t full;
};
constexpr Warps kForwardWarps{8, 20};
constexpr Warps kBackwardWarps{6, 16};

int64_t divide_up(int64_t size, int64_t part) { return (size + part - 1) / part; }

// One state at every interval is half as much memory as a float32 input. Several would be many
// times the input, so they are saved further apart, and the backward pass fills the gaps.
int saved_shift(int64_t states) { return states == 1 ? 3 : 6; }
static_assert(kInterval == 1 << 3 && kShortestChunk == 1 << 6, "");

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kFloat:
      return Dtype::kFloat;
    case at::kDouble:
      return Dtype::kDouble;
    default:
      TORCH_CHECK(false, "not a floating-point dtype: ", tensor.scalar_type());
  }
}

// A kernel that was not compiled for this GPU is the error that users can do something about.
void check(cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess,
              "the CUDA kernels of mmvmamba failed: ", cudaGetErrorString(error),
              error == cudaErrorNoKernelImageForDevice
                  ? "; for the GPUs of this machine, run: python -m mmvmamba_kernels.build --cuda"
                  : "");
}

// The arguments that both passes share, on one device.
struct Arguments {
  const Tensor& x;                      // (K, B * P, D), any strides but that of the channels
  const std::optional<Tensor>& delta;   // (K, B * P, D), likewise
  const Tensor& proj;                   // (B * P, K, R + 2N), and the rest, contiguous
  const std::optional<Tensor>& weight;  // (K, R, D), in the dtype of states and sums like the rest
  const std::optional<Tensor>& bias;    // (K, D)
  const Tensor& A;                      // (K, N, D)
  const std::optional<Tensor>& D;       // (K, D)
  int64_t batch;
  int64_t height;
  int64_t width;
  at::IntArrayRef paths;
  bool softplus;
};

template <Dtype X>
struct Scan {
  using T = State<X>;

  const Arguments& arguments;
  ScanParams<T> params{};
  cudaStream_t stream;

  explicit Scan(const Arguments& a)
      : arguments(a), stream(c10::cuda::getCurrentCUDAStream(a.x.device().index()).stream()) {
    const int64_t directions = a.A.size(0), states = a.A.size(1), channels = a.A.size(2);
    TORCH_CHECK(states <= kMaxStates, "at most ", kMaxStates, " states, got ", states);
    TORCH_CHECK(directions == static_cast<int64_t>(a.paths.size()), "expected a path for each of ",
                directions, " directions, got ", a.paths.size());
    TORCH_CHECK(a.height * a.width <= INT32_MAX - kShortestChunk, "a map of ", a.height, " x ",
                a.width, " positions is too large: kernels number them with 32 bits");
    const bool columns = a.paths[0] & kColumnMajor, per_line = a.paths[0] & kPerLine;
    const int64_t lines = !per_line ? 1 : columns ? a.width : a.height;
    TORCH_CHECK(a.batch * lines <= INT32_MAX, "too many sequences: ", a.batch * lines);

    ScanParams<T>& p = params;
    p.height = static_cast<int>(a.height);
    p.width = static_cast<int>(a.width);
    p.lines = static_cast<int>(lines);
    p.length = static_cast<int>(a.height * a.width / lines);
    p.sequences = static_cast<int>(a.batch * lines);
    p.channels = static_cast<int>(channels);
    p.states = static_cast<int>(states);
    p.directions = static_cast<int>(directions);
    p.low_rank = static_cast<int>(a.proj.size(2) - 2 * states);
    p.rank = a.delta ? 0 : p.low_rank;
    p.softplus = a.softplus;
    for (size_t k = 0; k < std::min<size_t>(a.paths.size(), 32); ++k) {
      p.column_major |= unsigned(bool(a.paths[k] & kColumnMajor)) << k;
      p.reverse |= unsigned(bool(a.paths[k] & kReverse)) << k;
    }
    p.position_stride = a.x.stride(1);
    p.x = map_of(a.x, "x", directions);
    TORCH_CHECK(p.x.dtype == X && dtype_of(a.A) == (X == Dtype::kDouble ? X : Dtype::kFloat),
                "dtypes of x and A do not fit: ", a.x.scalar_type(), " and ", a.A.scalar_type());
    if (a.delta) p.delta = map_of(*a.delta, "delta", directions);
    TORCH_CHECK(p.rank == 0 || a.weight, "expected dt weights for ", p.rank, " low ranks");
    p.proj = a.proj.const_data_ptr();
    p.proj_dtype = dtype_of(a.proj);
    p.proj_stride = static_cast<int>(a.proj.stride(0));
    p.weight = data<const T>(a.weight);
    p.bias = data<const T>(a.bias);
    p.A = a.A.const_data_ptr<T>();
    p.skip = data<const T>(a.D);
    p.wave = p.directions;
    p.chunk = p.length;
    p.chunks = 1;
  }

  template <typename P>
  static P* data(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<P*>(tensor->data_ptr()) : nullptr;
  }

  // Checks that there are `maps` maps of all positions.
  Map map_of(const Tensor& tensor, const char* name, int64_t maps) const {
    const int64_t positions = arguments.batch * arguments.height * arguments.width;
    TORCH_CHECK(tensor.sizes() == at::IntArrayRef({maps, positions, arguments.A.size(2)}) &&
                    (tensor.stride(2) == 1 || tensor.size(2) == 1),
                name, " must be (maps, positions, channels) with contiguous channels, got sizes ",
                tensor.sizes(), " and strides ", tensor.strides());
    return {tensor.data_ptr(), dtype_of(tensor), tensor.stride(0)};
  }

  // Memory in the dtype of states and sums.
  Tensor buffer(at::IntArrayRef sizes) const { return at::empty(sizes, arguments.A.options()); }

  bool empty() const { return params.sequences == 0; }

  void set_chunk(int64_t chunk) {
    params.chunk = static_cast<int>(chunk);
    params.chunks = static_cast<int>(divide_up(params.length, chunk));
  }

  // Cuts paths where there are too few of them to fill the GPU.
  void cut(Warps warps) {
    int processors = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                 arguments.x.device().index()));
    const int64_t whole =
        int64_t(params.sequences) * params.directions * divide_up(params.channels, 32);
    const int64_t parts =
        whole < processors * warps.enough ? divide_up(processors * warps.full, whole) : 1;
    const int64_t chunk = divide_up(divide_up(params.length, parts), kShortestChunk);
    set_chunk(parts == 1 ? params.length
                         : std::min<int64_t>(chunk * kShortestChunk, params.length));
  }

  // Finds the states that enter the chunks. Returns the memory that `entering` points to.
  Tensor enter(bool backwards) {
    ScanParams<T> p = params;
    if (p.chunks == 1) return {};
    const Tensor ends = buffer({p.sequences, p.directions, p.chunks, p.states, p.channels});
    const Tensor totals = buffer({p.sequences, p.directions, p.chunks, p.channels});
    p.end = ends.data_ptr<T>();
    p.total = totals.data_ptr<T>();
    p.y = {};
    p.carries = nullptr;
    check(backwards ? launch_adjoint_ends<X>(p, stream) : launch_forward<X>(p, stream));
    check(launch_carry<X>(p, backwards, stream));
    params.entering = p.end;
    return ends;
  }

  // Runs `launch` for as many directions at a time as there are maps in y; later ones add to them.
  template <typename F>
  void in_waves(const Tensor& y, F launch) {
    const int64_t maps = y.size(0);
    const Map map = map_of(y, "the output", maps);
    TORCH_CHECK(maps >= params.directions || y.scalar_type() == arguments.A.scalar_type(),
                "outputs of several launches are added in the dtype of sums, got ",
                y.scalar_type());
    for (int64_t first = 0; first < params.directions; first += maps) {
      params.first = static_cast<int>(first);
      params.wave = static_cast<int>(std::min<int64_t>(maps, params.directions - first));
      params.accumulate = first > 0;
      params.y = map;
      check(launch(params, stream));
    }
  }

  at::DimVector carries_sizes(int64_t interval) const {
    return {params.sequences, params.directions, divide_up(params.length, interval), params.states,
            params.channels};
  }

  void forward(const Tensor& y, const std::optional<Tensor>& carries) {
    if (empty()) return;
    params.saved_shift = saved_shift(params.states);
    cut(kForwardWarps);
    const Tensor entering = enter(false);
    if (carries) {
      TORCH_CHECK(carries->is_contiguous() && carries->scalar_type() == arguments.A.scalar_type() &&
                      carries->sizes() == carries_sizes(1 << params.saved_shift),
                  "carries have an unexpected layout: ", carries->sizes());
      params.carries = carries->data_ptr<T>();
    }
    in_waves(y, launch_forward<X>);
  }

  // The states at every kInterval positions, from those that were saved.
  Tensor states_at_intervals(const Tensor& carries) const {
    if (1 << saved_shift(params.states) == kInterval) return carries;
    ScanParams<T> p = params;
    p.chunk = 1 << saved_shift(p.states);
    p.chunks = static_cast<int>(divide_up(p.length, p.chunk));
    p.entering = carries.const_data_ptr<T>();
    const Tensor states = buffer(carries_sizes(kInterval));
    p.carries = states.data_ptr<T>();
    p.saved_shift = 3;
    check(launch_forward<X>(p, stream));
    return states;
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& carries,
                                              const Tensor& grad_x, const Tensor& grad_raw) {
    ScanParams<T>& p = params;
    const int64_t positions = arguments.batch * p.height * p.width;
    p.grad_y = map_of(grad_y, "the output's gradient", p.directions);
    TORCH_CHECK(p.grad_y.dtype == X, "the output's gradient must be ", arguments.x.scalar_type(),
                ", got ", grad_y.scalar_type());
    p.grad_raw = map_of(grad_raw, "the gradient of step sizes", p.directions);
    TORCH_CHECK(
        carries.is_contiguous() && carries.sizes() == carries_sizes(1 << saved_shift(p.states)),
        "carries have an unexpected layout: ", carries.sizes());
    if (!empty()) cut(kBackwardWarps);
    const int64_t rows = int64_t(p.sequences) * p.chunks;
    const Tensor grad_proj =
        buffer({divide_up(p.channels, 32), p.directions, positions, 2 * p.states});
    const Tensor grad_A = buffer({rows, p.directions, p.states, p.channels});
    const Tensor grad_skip = buffer({rows, p.directions, p.channels});
    if (!empty()) {
      const Tensor states = states_at_intervals(carries);
      const Tensor entering = enter(true);
      p.carries = states.data_ptr<T>();
      p.grad_proj = grad_proj.data_ptr<T>();
      p.grad_A = grad_A.data_ptr<T>();
      p.grad_skip = grad_skip.data_ptr<T>();
      in_waves(grad_x, launch_backward<X>);
    }
    return {grad_proj.sum(0), grad_A.sum(0), grad_skip.sum(0)};
  }
};

// Calls function(Scan<X>&) with the dtype of x.
template <typename F>
auto with_scan(const Arguments& arguments, F function) {
  const c10::cuda::OptionalCUDAGuard guard(arguments.x.device());
  switch (dtype_of(arguments.x)) {
    case Dtype::kHalf: {
      Scan<Dtype::kHalf> scan(arguments);
      return function(scan);
    }
    case Dtype::kBFloat16: {
      Scan<Dtype::kBFloat16> scan(arguments);
      return function(scan);
    }
    case Dtype::kFloat: {
      Scan<Dtype::kFloat> scan(arguments);
      return function(scan);
    }
    default: {
      Scan<Dtype::kDouble> scan(arguments);
      return function(scan);
    }
  }
}

void scan_forward(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& proj,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor& A, const std::optional<Tensor>& D, int64_t batch, int64_t height,
                  int64_t width, at::IntArrayRef paths, bool softplus, Tensor y,
                  const std::optional<Tensor>& carries) {
  with_scan({x, delta, proj, weight, bias, A, D, batch, height, width, paths, softplus},
            [&](auto& scan) { scan.forward(y, carries); });
}

std::tuple<Tensor, Tensor, Tensor> scan_backward(
    const Tensor& grad_y, const Tensor& carries, const Tensor& x,
    const std::optional<Tensor>& delta, const Tensor& proj, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& A, const std::optional<Tensor>& D,
    int64_t batch, int64_t height, int64_t width, at::IntArrayRef paths, bool softplus,
    Tensor grad_x, Tensor grad_raw) {
  return with_scan({x, delta, proj, weight, bias, A, D, batch, height, width, paths, softplus},
                   [&](auto& scan) { return scan.backward(grad_y, carries, grad_x, grad_raw); });
}

}  // namespace

// Behind the Python package's own operators, which autograd and compilers see.
LIBRARY(MMVMAMBA_LIBRARY, library) {
  library.def(
      "scan_forward(Tensor x, Tensor? delta, Tensor proj, Tensor? weight, Tensor? bias, Tensor A, "
      "Tensor? D, int batch, int height, int width, int[] paths, bool softplus, Tensor(a!) y, "
      "Tensor(b!)? carries) -> ()");
  library.def(
      "scan_backward(Tensor grad_y, Tensor carries, Tensor x, Tensor? delta, Tensor proj, "
      "Tensor? weight, Tensor? bias, Tensor A, Tensor? D, int batch, int height, int width, "
      "int[] paths, bool softplus, Tensor(a!) grad_x, Tensor(b!) grad_raw) -> "
      "(Tensor grad_proj, Tensor grad_A, Tensor grad_D)");
}

TORCH_LIBRARY_IMPL(MMVMAMBA_LIBRARY, MMVMAMBA_DEVICE, library) {
  library.impl("scan_forward", scan_forward);
  library.impl("scan_backward", scan_backward);
}

}  // namespace cuda
}  // namespace mmvmamba
