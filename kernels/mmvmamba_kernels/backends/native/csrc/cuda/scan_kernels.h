// What the CUDA kernels of the selective scan are given, and their launches. Free of PyTorch, so
// that nvcc compiles kernels alone.
//
// Shape letters: B batch, P positions of a map, K directions, D channels, N state dimension,
// R rank of the step sizes. All strides count elements; channels are contiguous.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../scan_params.h"

namespace mmvmamba {
namespace cuda {

enum class Dtype : int { kHalf, kBFloat16, kFloat, kDouble };

// Of states and sums where maps are of a dtype.
template <Dtype X>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<Dtype::kDouble> {
  using type = double;
};
template <Dtype X>
using State = typename StateOf<X>::type;

// Positions that a warp holds in registers at a time.
constexpr int kInterval = 8;

// Lengths of chunks are multiples of it, and it is a multiple of every other number of positions.
constexpr int kShortestChunk = 64;

// (K, B * P, D). All maps of a scan have the same distance from a position to the next.
struct Map {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t direction_stride = 0;
};

// T is the dtype of states and sums. Absent tensors are null.
template <typename T>
struct ScanParams {
  int height;
  int width;
  int lines;      // Sequences of an image.
  int length;     // Positions of a sequence.
  int sequences;  // Of all images.
  int channels;
  int states;
  int directions;
  int low_rank;  // Columns of proj before B.
  int rank;      // As many if kernels expand step sizes from them; 0 if they read them from delta.
  unsigned column_major;  // Bit k belongs to direction k.
  unsigned reverse;
  bool softplus;

  int64_t position_stride;  // Of all maps.
  Map x;
  Map delta;
  const void* proj;  // (B * P, K, low_rank + 2N)
  Dtype proj_dtype;
  int proj_stride;  // From a position to the next.
  const T* weight;  // (K, R, D)
  const T* bias;    // (K, D)
  const T* A;       // (K, N, D)
  const T* skip;    // (K, D)

  // Set by a launch: paths are cut into `chunks` of `chunk` positions, and the launch works on
  // `wave` directions from the first one on.
  int chunk;
  int chunks;
  int first;
  int wave;
  int blocks;  // Warps that the channels take.
  int shared_per_warp;

  const T* entering;  // (sequences, K, chunks, N, D): states that enter chunks; zero if null.

  // The forward pass. The map of direction `first + i` is number i of y, written or added to.
  Map y;
  bool accumulate;
  T* carries;       // (sequences, K, intervals, N, D): states at every 2^saved_shift positions.
  int saved_shift;  // At least log2(kInterval), at most log2(kShortestChunk).
  T* end;           // (sequences, K, chunks, N, D): states at the chunks' ends.
  T* total;         // (sequences, K, chunks, D): sums of the chunks' step sizes.

  // The backward pass. `carries` has the states at every kInterval positions, `entering` the
  // gradients that enter chunks from behind; y is the gradient of x.
  Map grad_y;
  Map grad_raw;  // Of the step sizes before softplus, laid out as delta.
  T* grad_proj;  // (blocks, K, B * P, 2N): of B and C, a block's sum over its channels.
  T* grad_A;     // (sequences * chunks, K, N, D)
  T* grad_skip;  // (sequences * chunks, K, D)
};

// Each returns the first error. Kernels are compiled for maps of one dtype at a time.

// Outputs, saved states, ends of chunks: what there is a pointer for.
template <Dtype X>
cudaError_t launch_forward(ScanParams<State<X>> params, cudaStream_t stream);

// `end` and `total` of the adjoint recurrence, which runs from a chunk's end to its start.
template <Dtype X>
cudaError_t launch_adjoint_ends(ScanParams<State<X>> params, cudaStream_t stream);

// In place: what leaves every chunk, if nothing enters it, becomes what enters it.
template <Dtype X>
cudaError_t launch_carry(ScanParams<State<X>> params, bool backwards, cudaStream_t stream);

template <Dtype X>
cudaError_t launch_backward(ScanParams<State<X>> params, cudaStream_t stream);

}  // namespace cuda
}  // namespace mmvmamba
