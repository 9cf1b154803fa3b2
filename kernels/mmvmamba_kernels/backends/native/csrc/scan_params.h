// What one selective scan over maps consists of. Plain data, so that code of any compiler and
// language agrees on it: cpp_scan.py has the same fields in the same order.
//
// Shape letters: B batch, P positions of a map, K directions, D channels, N state dimension,
// R rank of the step sizes. All strides count elements; channels are contiguous.
#pragma once

#include <cstdint>

namespace mmvmamba {

constexpr int kMaxStates = 64;

// Positions whose states are recomputed together in the backward pass: one state is saved for each.
constexpr int kTile = 64;

// Channels that are computed together. Parameters are padded with zeros to a multiple of it.
constexpr int kLanes = 16;

// Ranks that are computed together in their gradient; padded likewise.
constexpr int kRankLanes = 8;

// Bits of a path's code, which callers give a path as.
constexpr int64_t kColumnMajor = 1;
constexpr int64_t kReverse = 2;
constexpr int64_t kPerLine = 4;

// One direction's order of positions: `sequences` paths of `length` positions each. Position i of
// sequence s, counted from the front, is s * sequence_stride + (i / inner) * outer_stride +
// (i % inner) * inner_stride; or list[i], where there is a list.
struct Path {
  int64_t sequences;
  int64_t length;
  int64_t sequence_stride;
  int64_t inner;
  int64_t inner_stride;
  int64_t outer_stride;
  bool reverse;
  const int32_t* list;

  int64_t tiles() const { return (length + kTile - 1) / kTile; }
};

// T is the dtype of everything: float or double.
template <typename T>
struct ScanParams {
  int64_t channels;
  int64_t padded_channels;
  int64_t positions;
  int states;
  int rank;
  int directions;
  bool softplus;
  const Path* paths;

  // (B, P, D): x, delta, out and their gradients. Each has strides of its own.
  struct Map {
    T* data = nullptr;
    int64_t image_stride = 0;
    int64_t position_stride = 0;

    T* image(int64_t b) const { return data + b * image_stride; }
  };
  Map x;
  Map delta;  // No data where step sizes come from the low rank alone.
  Map out;
  // From the map that one direction is summed into (out, grad_x) to the next one's; 0 if all have
  // one map.
  int64_t sum_direction_stride;

  // (B, P, K, R + 2N): the low rank, B and C of every direction.
  const T* coefficients;
  int64_t coefficients_image_stride;
  int64_t coefficients_position_stride;
  int64_t coefficients_direction_stride;

  // Parameters, channels last and padded.
  const T* weight;  // (K, R, D)
  const T* bias;    // (K, D)
  const T* A;       // (K, N, D)
  const T* skip;    // (D), summed over directions

  // (K, B * sequences, tiles, N, D): the states that enter the tiles in the path's order. The
  // forward pass leaves them alone if there is no data.
  T* carries;
  int64_t carries_direction_stride;

  // The backward pass alone.
  Map grad_out;
  Map grad_x;
  Map grad_delta;

  // (R, D) transposed per direction, R padded: (K, D, padded rank).
  const T* weight_by_channel;
  int64_t padded_rank;

  // Images are worked on in waves; a slot is an image's number in its wave.
  // (slots, K * (R + 1 + N) + 1, D): what a slot's images add to the gradients of weight, bias and
  // A of every direction, and of skip.
  T* grad_parameters;
  int64_t grad_parameters_slot_stride;

  // (channel groups, slots, P, K, padded rank + 2N): what a group of channels adds to the gradient
  // of the coefficients. Only positions on no path have to be zero beforehand.
  T* partials;
  int64_t partials_group_stride;
  int64_t partials_slot_stride;

  // (B, P, K, R + 2N), contiguous.
  T* grad_coefficients;

  int64_t blocks() const { return padded_channels / kLanes; }
  int64_t partials_row() const { return padded_rank + 2 * states; }
};

}  // namespace mmvmamba
