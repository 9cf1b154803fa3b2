// The scan as PyTorch operators on CPU tensors: layouts, buffers, and the division into tasks.
//
// Tasks are (image, group of channel blocks), however many threads there are: sums have one order,
// and results are the same, bit for bit, at every run and every number of threads.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "scan_kernels.h"
#include "scan_paths.h"

namespace mmvmamba {
namespace {

using at::Tensor;

// Images in a wave: bounds the memory of partial gradients.
constexpr int64_t kWaveImages = 16;
// Tasks that a wave is divided into if there are enough channels.
constexpr int64_t kWaveTasks = 32;

const CpuKernels& kernels() {
  // PyTorch's own choice, which ATEN_CPU_CAPABILITY lowers.
  static const CpuKernels& chosen = []() -> const CpuKernels& {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return kKernelsAvx512;
    if (capability == "AVX2") return kKernelsAvx2;
#endif
    return kKernelsBaseline;
  }();
  return chosen;
}

template <typename T>
const ScanKernels<T>& kernels_of();
template <>
const ScanKernels<float>& kernels_of<float>() {
  return kernels().f32;
}
template <>
const ScanKernels<double>& kernels_of<double>() {
  return kernels().f64;
}

// A path that is a list, from a row [length | positions] of a table.
Path list_path(const int32_t* row) {
  Path path{};
  path.sequences = 1;
  path.length = row[0];
  path.list = row + 1;
  return path;
}

// (..., D) -> contiguous (..., padded D); zeros where there is no tensor.
Tensor pad_channels(const std::optional<Tensor>& tensor, at::IntArrayRef shape, int64_t padded,
                    const Tensor& like) {
  std::vector<int64_t> sizes(shape.begin(), shape.end());
  const int64_t channels = sizes.back();
  sizes.back() = padded;
  Tensor result = at::zeros(sizes, like.options());
  if (tensor) result.narrow(-1, 0, channels).copy_(*tensor);
  return result;
}

// Strides of dimensions that are never stepped along may be anything.
bool has_contiguous_rows(const Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 || tensor.numel() == 0;
}

template <typename T>
typename ScanParams<T>::Map map_of(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 3 && has_contiguous_rows(tensor), name,
              " must be (B, P, D) with contiguous channels, got sizes ", tensor.sizes(),
              " and strides ", tensor.strides());
  return {tensor.data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}

// The arguments that both passes share.
struct Arguments {
  const Tensor& x;                      // (B, P, D)
  const std::optional<Tensor>& delta;   // (B, P, D)
  const Tensor& coefficients;           // (B, P, K, R + 2N)
  const std::optional<Tensor>& weight;  // (K, D, R)
  const std::optional<Tensor>& bias;    // (K, D)
  const Tensor& A;                      // (K, D, N)
  const std::optional<Tensor>& D;       // (K, D)
  int64_t height;
  int64_t width;
  at::IntArrayRef paths;
  const std::optional<Tensor>& lists;  // (K, 1 + L), int32
  bool softplus;
};

// Owns what the parameters point to.
template <typename T>
struct Scan {
  ScanParams<T> params{};
  int64_t batch;
  Tensor weight, bias, A, skip;
  std::vector<Path> paths;
  int64_t most_tiles;  // Of a path; lists may be shorter than their rows.

  explicit Scan(const Arguments& a) {
    TORCH_CHECK(a.A.dim() == 3 && a.coefficients.dim() == 4 && has_contiguous_rows(a.coefficients),
                "A must be (K, D, N) and coefficients (B, P, K, R + 2N) with contiguous rows, got ",
                a.A.sizes(), " and ", a.coefficients.sizes());
    const int64_t directions = a.A.size(0), channels = a.A.size(1), states = a.A.size(2);
    const int64_t rank = a.weight ? a.weight->size(2) : 0;
    TORCH_CHECK(states <= kMaxStates, "at most ", kMaxStates, " states, got ", states);
    TORCH_CHECK(directions == int64_t(a.paths.size()), "expected a path for each direction, got ",
                a.paths.size(), " for ", directions);
    TORCH_CHECK(!a.lists || (a.lists->scalar_type() == at::kInt && a.lists->is_contiguous() &&
                             a.lists->dim() == 2 && a.lists->size(0) == directions),
                "lists must be contiguous int32 (K, 1 + L)");
    batch = a.x.size(0);
    const int64_t positions = a.height * a.width;
    TORCH_CHECK(a.x.sizes() == at::IntArrayRef({batch, positions, channels}) &&
                    a.coefficients.sizes() ==
                        at::IntArrayRef({batch, positions, directions, rank + 2 * states}),
                "x ", a.x.sizes(), " and coefficients ", a.coefficients.sizes(),
                " do not fit a map of ", a.height, " by ", a.width, " and A ", a.A.sizes());

    const int64_t padded = round_up(channels, kLanes);
    std::optional<Tensor> by_rank, total;
    if (a.weight) by_rank = a.weight->transpose(1, 2);
    if (a.D) total = a.D->sum(0);
    weight = pad_channels(by_rank, {directions, rank, channels}, padded, a.x);
    bias = pad_channels(a.bias, {directions, channels}, padded, a.x);
    A = pad_channels(a.A.transpose(1, 2), {directions, states, channels}, padded, a.x);
    skip = pad_channels(total, {channels}, padded, a.x);

    ScanParams<T>& p = params;
    p.channels = channels;
    p.padded_channels = padded;
    p.positions = positions;
    p.states = static_cast<int>(states);
    p.rank = static_cast<int>(rank);
    p.padded_rank = round_up(rank, kRankLanes);
    p.directions = static_cast<int>(directions);
    p.softplus = a.softplus;
    for (int64_t k = 0; k < directions; ++k) {
      paths.push_back(a.lists ? list_path(a.lists->select(0, k).const_data_ptr<int32_t>())
                              : make_path(a.paths[k], a.height, a.width));
    }
    p.paths = paths.data();
    most_tiles = a.lists ? (a.lists->size(1) - 1 + kTile - 1) / kTile : paths[0].tiles();
    p.x = map_of<T>(a.x, "x");
    if (a.delta) p.delta = map_of<T>(*a.delta, "delta");
    p.coefficients = a.coefficients.template data_ptr<T>();
    p.coefficients_image_stride = a.coefficients.stride(0);
    p.coefficients_position_stride = a.coefficients.stride(1);
    p.coefficients_direction_stride = a.coefficients.stride(2);
    p.weight = weight.data_ptr<T>();
    p.bias = bias.data_ptr<T>();
    p.A = A.data_ptr<T>();
    p.skip = skip.data_ptr<T>();
  }

  void set_carries(const Tensor& carries) {
    TORCH_CHECK(
        carries.is_contiguous() &&
            carries.sizes() == at::IntArrayRef({params.directions, batch * paths[0].sequences,
                                                most_tiles, params.states, params.padded_channels}),
        "carries have an unexpected layout: ", carries.sizes());
    params.carries = carries.data_ptr<T>();
    params.carries_direction_stride = carries.numel() / params.directions;
  }
};

template <typename T>
void forward(const Arguments& arguments, const Tensor& out, const std::optional<Tensor>& carries) {
  Scan<T> scan(arguments);
  scan.params.out = map_of<T>(out, "out");
  if (carries) scan.set_carries(*carries);
  const ScanKernels<T>& functions = kernels_of<T>();
  const int64_t blocks = scan.params.padded_channels / kLanes;
  at::parallel_for(0, scan.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      functions.forward(scan.params, task / blocks, task % blocks);
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Gradients backward(const Arguments& arguments, const Tensor& grad_out, const Tensor& carries,
                   const Tensor& grad_x, const std::optional<Tensor>& grad_delta) {
  Scan<T> scan(arguments);
  ScanParams<T>& p = scan.params;
  scan.set_carries(carries);
  p.grad_out = map_of<T>(grad_out, "grad_out");
  p.grad_x = map_of<T>(grad_x, "grad_x");
  if (grad_delta) p.grad_delta = map_of<T>(*grad_delta, "grad_delta");

  const auto options = arguments.x.options();
  const int64_t directions = p.directions, rank = p.rank, states = p.states;
  const Tensor by_channel = at::zeros({directions, p.padded_channels, p.padded_rank}, options);
  if (arguments.weight) {
    by_channel.narrow(1, 0, p.channels).narrow(2, 0, rank).copy_(*arguments.weight);
  }
  p.weight_by_channel = by_channel.data_ptr<T>();

  const int64_t blocks = p.padded_channels / kLanes;
  const int64_t slots = std::clamp<int64_t>(scan.batch, 1, kWaveImages);
  const int64_t groups = std::clamp<int64_t>(kWaveTasks / slots, 1, blocks);
  const int64_t rows = rank + 1 + states;
  const Tensor parameters = at::zeros({slots, directions * rows + 1, p.padded_channels}, options);
  p.grad_parameters = parameters.data_ptr<T>();
  p.grad_parameters_slot_stride = parameters.stride(0);
  const Tensor partial =
      at::empty({groups, slots, p.positions, directions, p.padded_rank + 2 * states}, options);
  p.grad_coefficients = partial.data_ptr<T>();
  p.grad_coefficients_group_stride = partial.stride(0);
  p.grad_coefficients_image_stride = partial.stride(1);

  const Tensor grad_coefficients = at::empty(arguments.coefficients.sizes(), options);
  const ScanKernels<T>& functions = kernels_of<T>();
  for (int64_t first = 0; first < scan.batch; first += slots) {
    const int64_t images = std::min(slots, scan.batch - first);
    partial.zero_();
    at::parallel_for(0, images * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slot = task / groups, group = task % groups;
        functions.backward(p, first + slot, slot, group, group * blocks / groups,
                           (group + 1) * blocks / groups);
      }
    });
    const Tensor total = partial.select(0, 0);
    for (int64_t group = 1; group < groups; ++group) total.add_(partial.select(0, group));
    const Tensor target = grad_coefficients.narrow(0, first, images);
    const Tensor source = total.narrow(0, 0, images);
    target.narrow(3, 0, rank).copy_(source.narrow(3, 0, rank));
    target.narrow(3, rank, 2 * states).copy_(source.narrow(3, p.padded_rank, 2 * states));
  }

  const Tensor total = parameters.select(0, 0);
  for (int64_t slot = 1; slot < slots; ++slot) total.add_(parameters.select(0, slot));
  const Tensor real = total.narrow(1, 0, p.channels);
  const Tensor per_direction =
      real.narrow(0, 0, directions * rows).unflatten(0, {directions, rows});
  return {grad_coefficients, per_direction.narrow(1, 0, rank).transpose(1, 2),
          per_direction.select(1, rank), per_direction.narrow(1, rank + 1, states).transpose(1, 2),
          real.select(0, directions * rows)};
}

void scan_forward(const Tensor& x, const std::optional<Tensor>& delta, const Tensor& coefficients,
                  const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const Tensor& A, const std::optional<Tensor>& D, int64_t height, int64_t width,
                  at::IntArrayRef paths, const std::optional<Tensor>& lists, bool softplus,
                  Tensor out, const std::optional<Tensor>& carries) {
  const Arguments arguments{x, delta,  coefficients, weight, bias,  A,
                            D, height, width,        paths,  lists, softplus};
  if (x.scalar_type() == at::kDouble) return forward<double>(arguments, out, carries);
  return forward<float>(arguments, out, carries);
}

Gradients scan_backward(const Tensor& grad_out, const Tensor& carries, const Tensor& x,
                        const std::optional<Tensor>& delta, const Tensor& coefficients,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                        const Tensor& A, const std::optional<Tensor>& D, int64_t height,
                        int64_t width, at::IntArrayRef paths, const std::optional<Tensor>& lists,
                        bool softplus, Tensor grad_x, const std::optional<Tensor>& grad_delta) {
  const Arguments arguments{x, delta,  coefficients, weight, bias,  A,
                            D, height, width,        paths,  lists, softplus};
  if (x.scalar_type() == at::kDouble) {
    return backward<double>(arguments, grad_out, carries, grad_x, grad_delta);
  }
  return backward<float>(arguments, grad_out, carries, grad_x, grad_delta);
}

}  // namespace

// Behind the Python package's own operators, which autograd and compilers see.
TORCH_LIBRARY(mmvmamba_cpp, library) {
  library.def(
      "scan_forward(Tensor x, Tensor? delta, Tensor coefficients, Tensor? weight, Tensor? bias, "
      "Tensor A, Tensor? D, int height, int width, int[] paths, Tensor? lists, bool softplus, "
      "Tensor(a!) out, Tensor(b!)? carries) -> ()");
  library.def(
      "scan_backward(Tensor grad_out, Tensor carries, Tensor x, Tensor? delta, "
      "Tensor coefficients, Tensor? weight, Tensor? bias, Tensor A, Tensor? D, int height, "
      "int width, int[] paths, Tensor? lists, bool softplus, Tensor(a!) grad_x, "
      "Tensor(b!)? grad_delta) -> (Tensor grad_coefficients, Tensor grad_weight, "
      "Tensor grad_bias, Tensor grad_A, Tensor grad_D)");
}

TORCH_LIBRARY_IMPL(mmvmamba_cpp, CPU, library) {
  library.impl("scan_forward", scan_forward);
  library.impl("scan_backward", scan_backward);
}

}  // namespace mmvmamba
