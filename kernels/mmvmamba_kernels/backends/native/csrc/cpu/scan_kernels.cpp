// Compiled several times, with MMVMAMBA_ISA naming the instruction set and MMVMAMBA_KERNELS the
// table to define. No inline function of the standard library is called here: the linker keeps one
// copy of those, and it could be one that this machine cannot run.

#include "scan_kernels.h"

#include "lanes.h"

namespace mmvmamba {
namespace MMVMAMBA_ISA {
namespace {

// Positions (or rows of a gradient) whose sums stay in registers together, of which AVX2 has 16.
constexpr int kUnroll = kVectorBytes < 64 ? 4 : 8;

// One tile of one direction's path, in the order of the path.
template <typename T>
struct Tile {
  int count;
  int64_t position[kTile];
  const T* row[kTile];  // [low rank | B | C]
  Lanes<T> delta[kTile];
  Lanes<T> drive[kTile];  // delta * x
};

// One direction of one image and block of channels.
template <typename T>
struct Direction {
  using Map = typename ScanParams<T>::Map;

  const ScanParams<T>& p;
  int64_t image;
  int64_t channel;  // The block's first.
  int64_t lanes;    // Channels of the block that exist.
  int k;

  Direction(const ScanParams<T>& params, int64_t image_, int64_t block, int k_)
      : p(params), image(image_), channel(block * kLanes), k(k_) {
    const int64_t left = p.channels - channel;
    lanes = left < kLanes ? left : kLanes;
  }

  const Path& path() const { return p.paths[k]; }

  // Row r of a parameter of `rows` rows per direction.
  Lanes<T> parameter(const T* data, int64_t rows, int64_t r) const {
    return Lanes<T>::load(data + (k * rows + r) * p.padded_channels + channel);
  }

  T* at(const Map& map, int64_t position) const {
    return map.image(image) + position * map.position_stride + channel;
  }

  Lanes<T> load(const Map& map, int64_t position) const {
    return load_channels(at(map, position), lanes);
  }

  void store(const Lanes<T>& value, const Map& map, int64_t position) const {
    store_channels(value, at(map, position), lanes);
  }

  void add(const Lanes<T>& value, const Map& map, int64_t position) const {
    store(load(map, position) + value, map, position);
  }

  // Zero in the lanes without a channel, where infinite coefficients have made NaN of zeros.
  Lanes<T> of_channels(const Lanes<T>& value) const {
    if (lanes == kLanes) return value;
    T buffer[kLanes];
    value.store(buffer);
    return load_channels(buffer, lanes);
  }

  // The states that enter tile `index` of sequence `s`.
  T* carry(int64_t s, int64_t index) const {
    const int64_t tile = (image * path().sequences + s) * path().tiles() + index;
    return p.carries + k * p.carries_direction_stride + tile * p.states * p.padded_channels +
           channel;
  }

  void locate(int64_t s, int64_t index, const Map& output, Tile<T>& tile) const {
    const Path& route = path();
    const int64_t start = index * kTile;
    const int64_t left = route.length - start;
    tile.count = static_cast<int>(left < kTile ? left : kTile);
    const T* rows =
        p.coefficients + image * p.coefficients_image_stride + k * p.coefficients_direction_stride;
    if (route.list) {
      for (int t = 0; t < tile.count; ++t) place(tile, t, route.list[start + t], rows, output);
      return;
    }
    const int64_t i = route.reverse ? route.length - 1 - start : start;
    const int64_t inner = i % route.inner;
    int64_t position = s * route.sequence_stride + i / route.inner * route.outer_stride +
                       inner * route.inner_stride;
    // Steps within a line, and from the end of one to the start of the next.
    const int64_t sign = route.reverse ? -1 : 1;
    const int64_t step = sign * route.inner_stride;
    const int64_t jump = sign * (route.outer_stride - (route.inner - 1) * route.inner_stride);
    int64_t until_jump = route.reverse ? inner : route.inner - 1 - inner;
    for (int t = 0; t < tile.count; ++t) {
      place(tile, t, position, rows, output);
      const bool at_end = until_jump == 0;
      position += at_end ? jump : step;
      until_jump = at_end ? route.inner - 1 : until_jump - 1;
    }
  }

  void place(Tile<T>& tile, int t, int64_t position, const T* rows, const Map& output) const {
    tile.position[t] = position;
    tile.row[t] = rows + position * p.coefficients_position_stride;
    // Paths jump: the processor does not foresee where to.
    __builtin_prefetch(tile.row[t]);
    __builtin_prefetch(at(p.x, position));
    __builtin_prefetch(at(output, position));
  }

  // The step sizes before softplus, into tile.delta.
  void raw_steps(Tile<T>& tile) const {
    const Lanes<T> bias = parameter(p.bias, 1, 0);
    for (int t = 0; t < tile.count; ++t) {
      tile.delta[t] = p.delta.data ? bias + load(p.delta, tile.position[t]) : bias;
    }
    int t = 0;
    for (; t + kUnroll <= tile.count; t += kUnroll) low_rank<kUnroll>(tile, t);
    for (; t < tile.count; ++t) low_rank<1>(tile, t);
  }

  template <int kCount>
  void low_rank(Tile<T>& tile, int t) const {
    Lanes<T> total[kCount];
    for (int j = 0; j < kCount; ++j) total[j] = tile.delta[t + j];
    for (int r = 0; r < p.rank; ++r) {
      const Lanes<T> weight = parameter(p.weight, p.rank, r);
      for (int j = 0; j < kCount; ++j) total[j] += weight * Lanes<T>(tile.row[t + j][r]);
    }
    for (int j = 0; j < kCount; ++j) tile.delta[t + j] = total[j];
  }
};

template <typename T>
void forward(const ScanParams<T>& p, int64_t image, int64_t block, int begin, int end) {
  typename ScanParams<T>::Map out = p.out;
  out.data += begin * p.sum_direction_stride;
  {
    const Direction<T> any(p, image, block, 0);
    const Lanes<T> skip = any.parameter(p.skip, 0, 0), none(T(0));
    for (int64_t i = 0; i < p.positions; ++i) {
      any.store(begin == 0 ? skip * any.load(p.x, i) : none, out, i);
    }
  }
  Tile<T> tile;
  Lanes<T> state[kMaxStates];
  Lanes<T> y[kTile];
  for (int k = begin; k < end; ++k) {
    const Direction<T> direction(p, image, block, k);
    const Path& path = direction.path();
    for (int64_t s = 0; s < path.sequences; ++s) {
      for (int n = 0; n < p.states; ++n) state[n] = Lanes<T>(T(0));
      for (int64_t index = 0; index < path.tiles(); ++index) {
        if (p.carries) {
          T* carry = direction.carry(s, index);
          for (int n = 0; n < p.states; ++n) state[n].store(carry + n * p.padded_channels);
        }
        direction.locate(s, index, out, tile);
        direction.raw_steps(tile);
        for (int t = 0; t < tile.count; ++t) {
          if (p.softplus) tile.delta[t] = softplus<T, false>(tile.delta[t]).value;
          tile.drive[t] = tile.delta[t] * direction.load(p.x, tile.position[t]);
          y[t] = Lanes<T>(T(0));
        }
        for (int n = 0; n < p.states; ++n) {
          const Lanes<T> rate = direction.parameter(p.A, p.states, n);
          Lanes<T> h = state[n];
          for (int t = 0; t < tile.count; ++t) {
            const T* weights = tile.row[t] + p.rank + n;
            h = exp(tile.delta[t] * rate) * h + tile.drive[t] * Lanes<T>(weights[0]);
            y[t] += h * Lanes<T>(weights[p.states]);
          }
          state[n] = h;
        }
        for (int t = 0; t < tile.count; ++t) {
          direction.add(y[t], out, tile.position[t]);
        }
      }
    }
  }
}

// Adds to a row of lanes in memory.
template <typename T>
inline void accumulate(T* target, const Lanes<T>& value) {
  (Lanes<T>::load(target) + value).store(target);
}

// grad_weight[r] += sum_t low_rank[t][r] * grad_raw[t] for kCount ranks from r on.
template <int kCount, typename T>
inline void grad_weight_rows(const Tile<T>& tile, const Lanes<T>* grad_raw, int r, T* grad_weight,
                             int64_t stride) {
  Lanes<T> total[kCount];
  for (int j = 0; j < kCount; ++j) total[j] = Lanes<T>::load(grad_weight + (r + j) * stride);
  for (int t = 0; t < tile.count; ++t) {
    const T* row = tile.row[t] + r;
    for (int j = 0; j < kCount; ++j) total[j] += grad_raw[t] * Lanes<T>(row[j]);
  }
  for (int j = 0; j < kCount; ++j) total[j].store(grad_weight + (r + j) * stride);
}

// grad_low_rank[t] += grad_raw[t] . weight for kCount positions, all ranks; = and not += for the
// first channels of a group. Both are zero in lanes without a channel.
template <int kCount, typename T>
inline void grad_low_rank_rows(const Lanes<T>* grad_raw, const T* weight, int64_t padded_rank,
                               bool first, T* const* target) {
  using Ranks = Lanes<T, kRankLanes>;
  T values[kCount][kLanes];
  for (int j = 0; j < kCount; ++j) grad_raw[j].store(values[j]);
  for (int64_t r = 0; r < padded_rank; r += kRankLanes) {
    Ranks total[kCount];
    for (int j = 0; j < kCount; ++j) {
      total[j] = first ? Ranks(T(0)) : Ranks::load(target[j] + r);
    }
    for (int c = 0; c < kLanes; ++c) {
      const Ranks row = Ranks::load(weight + c * padded_rank + r);
      for (int j = 0; j < kCount; ++j) total[j] += row * Ranks(values[j][c]);
    }
    for (int j = 0; j < kCount; ++j) total[j].store(target[j] + r);
  }
}

// The backward pass of one block of channels, in the directions [begin, end).
template <typename T>
struct Backward {
  const ScanParams<T>& p;
  int begin, end;
  typename ScanParams<T>::Map grad_x;  // What these directions are summed into.
  T* grad_parameters;                  // This slot's.
  T* partial;                          // This group's and slot's gradient of the coefficients.
  bool first;                          // Whether a block is its group's first.

  Tile<T> tile;
  Lanes<T> slope[kTile];
  Lanes<T> grad_y[kTile];
  Lanes<T> grad_drive[kTile];
  Lanes<T> grad_delta[kTile];
  Lanes<T> decay[kTile];
  Lanes<T> state[kTile + 1];  // state[t] enters position t.
  Lanes<T> adjoint[kMaxStates];
  Lanes<T, kSums> grad_b[kTile], grad_c[kTile];  // Sums over the lanes are left to do.
  T* target[kTile];                              // The partial's rows [low rank | B | C].

  Backward(const ScanParams<T>& params, int64_t slot, int64_t group, int begin_, int end_)
      : p(params),
        begin(begin_),
        end(end_),
        grad_x(params.grad_x),
        grad_parameters(params.grad_parameters + slot * params.grad_parameters_slot_stride),
        partial(params.partials + group * params.partials_group_stride +
                slot * params.partials_slot_stride) {
    grad_x.data += begin * params.sum_direction_stride;
  }

  void run(int64_t image, int64_t block, bool first_) {
    first = first_;
    const Direction<T> any(p, image, block, 0);
    if (begin == 0) {
      skip(any);
    } else {
      for (int64_t i = 0; i < p.positions; ++i) any.store(Lanes<T>(T(0)), grad_x, i);
    }
    for (int k = begin; k < end; ++k) {
      const Direction<T> direction(p, image, block, k);
      const Path& path = direction.path();
      for (int64_t s = 0; s < path.sequences; ++s) {
        for (int n = 0; n < p.states; ++n) adjoint[n] = Lanes<T>(T(0));
        for (int64_t index = path.tiles() - 1; index >= 0; --index) {
          prepare(direction, s, index);
          const T* carry = direction.carry(s, index);
          for (int n = 0; n < p.states; ++n) {
            scan(direction, n, Lanes<T>::load(carry + n * p.padded_channels));
          }
          finish(direction);
        }
      }
    }
  }

 private:
  // Row r of direction k's rows [weight (R) | bias | A (N)].
  T* grad_parameter(const Direction<T>& direction, int64_t r) const {
    const int64_t row = direction.k * (p.rank + 1 + p.states) + r;
    return grad_parameters + row * p.padded_channels + direction.channel;
  }

  void skip(const Direction<T>& any) const {
    const Lanes<T> weight = any.parameter(p.skip, 0, 0);
    Lanes<T> total(T(0));
    for (int64_t i = 0; i < p.positions; ++i) {
      const Lanes<T> grad = any.load(p.grad_out, i);
      total += grad * any.load(p.x, i);
      any.store(weight * grad, grad_x, i);
    }
    // After the rows of all directions.
    const int64_t row = p.directions * (p.rank + 1 + p.states);
    accumulate(grad_parameters + row * p.padded_channels + any.channel, total);
  }

  void prepare(const Direction<T>& direction, int64_t s, int64_t index) {
    direction.locate(s, index, grad_x, tile);
    direction.raw_steps(tile);
    for (int t = 0; t < tile.count; ++t) {
      if (p.softplus) {
        const Softplus<T> step = softplus<T, true>(tile.delta[t]);
        tile.delta[t] = step.value;
        slope[t] = step.slope;
      }
      const int64_t position = tile.position[t];
      tile.drive[t] = tile.delta[t] * direction.load(p.x, position);
      grad_y[t] = direction.load(p.grad_out, position);
      grad_drive[t] = Lanes<T>(T(0));
      grad_delta[t] = Lanes<T>(T(0));
      target[t] = partial + (position * p.directions + direction.k) * p.partials_row();
      // Here, since they are needed last.
      __builtin_prefetch(target[t]);
      __builtin_prefetch(target[t] + p.padded_rank);
    }
  }

  void scan(const Direction<T>& direction, int n, Lanes<T> h) {
    const Lanes<T> rate = direction.parameter(p.A, p.states, n);
    state[0] = h;
    for (int t = 0; t < tile.count; ++t) {
      decay[t] = exp(tile.delta[t] * rate);
      h = decay[t] * h + tile.drive[t] * Lanes<T>(tile.row[t][p.rank + n]);
      state[t + 1] = h;
    }
    Lanes<T> grad_rate(T(0));
    Lanes<T> g = adjoint[n];
    for (int t = tile.count - 1; t >= 0; --t) {
      const T* weights = tile.row[t] + p.rank + n;
      g += grad_y[t] * Lanes<T>(weights[p.states]);
      grad_b[t] = direction.of_channels(g * tile.drive[t]).fold();
      grad_c[t] = direction.of_channels(state[t + 1] * grad_y[t]).fold();
      grad_drive[t] += g * Lanes<T>(weights[0]);
      // What reaches the position before is also the gradient of its state's decay.
      g *= decay[t];
      const Lanes<T> grad_log = g * state[t];
      grad_delta[t] += grad_log * rate;
      grad_rate += grad_log * tile.delta[t];
    }
    adjoint[n] = g;
    add_sums(grad_b, p.padded_rank + n);
    add_sums(grad_c, p.padded_rank + p.states + n);
    accumulate(grad_parameter(direction, p.rank + 1 + n), grad_rate);
  }

  // Adds the sum of each position's lanes to its gradient, at `offset` of the row.
  void add_sums(const Lanes<T, kSums>* rows, int64_t offset) {
    T sums[kTile];
    int t = 0;
    for (; t + kSums <= tile.count; t += kSums) sum_rows<T>(rows + t, sums + t);
    for (; t < tile.count; ++t) sums[t] = rows[t].sum();
    for (t = 0; t < tile.count; ++t) {
      target[t][offset] = first ? sums[t] : target[t][offset] + sums[t];
    }
  }

  void finish(const Direction<T>& direction) {
    Lanes<T> grad_bias(T(0));
    Lanes<T>* grad_raw = grad_delta;
    for (int t = 0; t < tile.count; ++t) {
      const int64_t position = tile.position[t];
      grad_delta[t] += grad_drive[t] * direction.load(p.x, position);
      direction.add(rounded_product(grad_drive[t], tile.delta[t]), grad_x, position);
      if (p.softplus) grad_raw[t] *= slope[t];
      grad_raw[t] = direction.of_channels(grad_raw[t]);
      grad_bias += grad_raw[t];
      if (p.grad_delta.data) direction.store(grad_raw[t], p.grad_delta, position);
    }
    accumulate(grad_parameter(direction, p.rank), grad_bias);

    int r = 0;
    T* grad_weight = grad_parameter(direction, 0);
    for (; r + kUnroll <= p.rank; r += kUnroll) {
      grad_weight_rows<kUnroll>(tile, grad_raw, r, grad_weight, p.padded_channels);
    }
    for (; r < p.rank; ++r) grad_weight_rows<1>(tile, grad_raw, r, grad_weight, p.padded_channels);

    const T* weight =
        p.weight_by_channel + (direction.k * p.padded_channels + direction.channel) * p.padded_rank;
    int t = 0;
    for (; t + 8 <= tile.count; t += 8) {
      grad_low_rank_rows<8>(grad_raw + t, weight, p.padded_rank, first, target + t);
    }
    for (; t < tile.count; ++t) {
      grad_low_rank_rows<1>(grad_raw + t, weight, p.padded_rank, first, target + t);
    }
  }
};

template <typename T>
void backward(const ScanParams<T>& p, int64_t image, int64_t slot, int64_t group, int64_t first,
              int64_t last, int begin, int end) {
  Backward<T> pass(p, slot, group, begin, end);
  for (int64_t block = first; block < last; ++block) pass.run(image, block, block == first);
}

}  // namespace
}  // namespace MMVMAMBA_ISA

const CpuKernels MMVMAMBA_KERNELS = {
    {MMVMAMBA_ISA::forward<float>, MMVMAMBA_ISA::backward<float>},
    {MMVMAMBA_ISA::forward<double>, MMVMAMBA_ISA::backward<double>},
};

}  // namespace mmvmamba
