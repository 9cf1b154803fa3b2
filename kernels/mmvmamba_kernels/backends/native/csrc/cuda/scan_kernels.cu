// The selective scan on CUDA: kernels and their launches, for maps of the dtype MMVMAMBA_MAP.
//
// A warp owns 32 channels of one direction of one chunk of one sequence, a thread a channel, and
// walks positions in that direction's order, an interval at a time. Coefficients of its positions
// go through shared memory, transposed, so that four positions are one load. Nothing crosses lanes
// but the sums over channels in the backward pass, and warps do not meet: blocks are only a way to
// have more warps on a multiprocessor. kernels/README.md has the maths and the counts.
//
// The tests compile this file for the CPU as well, whose threads meet at warp primitives alone.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "scan_kernels.h"

namespace mmvmamba {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 2;
constexpr int kCarryThreads = 128;
constexpr int kChunksAtOnce = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks that a multiprocessor of 65536 registers is to hold.
template <typename T>
constexpr int kForwardBlocks = sizeof(T) == sizeof(float) ? 10 : 5;
template <typename T>
constexpr int kBackwardBlocks = sizeof(T) == sizeof(float) ? 8 : 4;

// Dynamic shared memory, of every block.
extern __shared__ float4 shared_memory[];

// Numbers in memory.

template <Dtype X>
struct Stored;

template <>
struct Stored<Dtype::kHalf> {
  using type = unsigned short;
  __device__ static float decode(type bits) { return __half2float(__ushort_as_half(bits)); }
  template <typename T>
  __device__ static type encode(T value) {
    return __half_as_ushort(__float2half(static_cast<float>(value)));
  }
};

template <>
struct Stored<Dtype::kBFloat16> {
  using type = unsigned short;
  __device__ static float decode(type bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  template <typename T>
  __device__ static type encode(T value) {
    return __bfloat16_as_ushort(__float2bfloat16(static_cast<float>(value)));
  }
};

template <>
struct Stored<Dtype::kFloat> {
  using type = float;
  __device__ static float decode(type value) { return value; }
  template <typename T>
  __device__ static type encode(T value) {
    return static_cast<float>(value);
  }
};

template <>
struct Stored<Dtype::kDouble> {
  using type = double;
  __device__ static double decode(type value) { return value; }
  template <typename T>
  __device__ static type encode(T value) {
    return static_cast<double>(value);
  }
};

template <Dtype X>
struct DtypeTag {
  static constexpr Dtype value = X;
};

// Calls function(DtypeTag<dtype>()): one branch, which all lanes take, in front of a loop.
template <typename F>
__device__ __forceinline__ void with_dtype(Dtype dtype, F function) {
  switch (dtype) {
    case Dtype::kHalf:
      return function(DtypeTag<Dtype::kHalf>());
    case Dtype::kBFloat16:
      return function(DtypeTag<Dtype::kBFloat16>());
    case Dtype::kFloat:
      return function(DtypeTag<Dtype::kFloat>());
    case Dtype::kDouble:
      return function(DtypeTag<Dtype::kDouble>());
  }
}

// Keeps a pointer to global memory in one piece. The compiler would rather add up the offsets that
// it is made of at every use.
template <typename N>
__device__ __forceinline__ N* whole(N* pointer) {
#ifdef __CUDA_ARCH__
  asm("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Functions of one number.

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

__device__ __forceinline__ float power_of_2(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }

// softplus(z) and its slope; z itself and 1 beyond 20, where exp(z) may be infinite.
__device__ __forceinline__ void softplus(float z, float& value, float& slope) {
  const float e = exp2f(z * static_cast<float>(kLog2E));
  const float w = 1.0f + e;
  // Below 1/32 the logarithm of 1 + e loses digits; four terms of its series suffice.
  const float series = e * (1.0f - e * (0.5f - e * (0.33333333f - e * 0.25f)));
  const float near_zero = e < 0.03125f ? series : static_cast<float>(kLn2) * __log2f(w);
  value = z > 20.0f ? z : near_zero;
  slope = z > 20.0f ? 1.0f : __fdividef(e, w);
}

__device__ __forceinline__ void softplus(double z, double& value, double& slope) {
  const double e = exp(z);
  value = z > 20.0 ? z : log1p(e);
  slope = z > 20.0 ? 1.0 : e / (1.0 + e);
}

// Four numbers, which are read at once from a multiple of 16 bytes.
template <typename T>
struct alignas(16) Four {
  T values[4];
};

template <typename T>
__device__ __forceinline__ void read(const T* shared, T (&out)[kInterval]) {
#pragma unroll
  for (int i = 0; i < kInterval / 4; ++i) {
    const Four<T> four = reinterpret_cast<const Four<T>*>(shared)[i];
#pragma unroll
    for (int j = 0; j < 4; ++j) out[4 * i + j] = four.values[j];
  }
}

// One warp's part of the work, and the interval that it is at. X is the dtype of x and the gradient
// of the output.
template <Dtype X>
struct Walk {
  using T = State<X>;
  using Raw = typename Stored<X>::type;

  const ScanParams<T>& p;
  const int lane = threadIdx.x;
  const int column = threadIdx.x % kInterval;  // The position of an interval that this lane finds.
  int k;
  int chunk;
  int sequence;
  int block;
  int channel;  // The last one in lanes that have none.
  bool inside;  // Whether this lane has one.
  int begin;    // Of the chunk, in steps of the path.
  int end;

  int64_t image;  // The image's first position.
  int origin;     // The sequence's first position in the image.
  int run;        // Positions of a run, of which each is `step` from the one before.
  int step;
  int ahead;   // From this lane's position to that of the next interval, if a run had no end.
  int within;  // The number of this lane's position in its run,
  int line;    // and the run's.

  T bias;              // Of the step sizes.
  int64_t proj_first;  // What this lane stages of the image's first position.
  int64_t* offsets;    // Of the interval's positions in the image's maps, in elements.
  T* rows;             // (R + 2N, kInterval): low rank, B and C at the interval's positions.

  __device__ __forceinline__ explicit Walk(const ScanParams<T>& params) : p(params) {}

  static int shared_bytes(const ScanParams<T>& p) {
    const int row_bytes = kInterval * static_cast<int>(sizeof(T));
    return kInterval * static_cast<int>(sizeof(int64_t)) + (p.rank + 2 * p.states) * row_bytes;
  }

  // Whether there is work for this warp.
  __device__ __forceinline__ bool start(bool backwards) {
    unsigned program = blockIdx.x * kWarpsPerBlock + threadIdx.y;
    block = program % p.blocks;
    program /= p.blocks;
    k = p.first + program % p.wave;
    program /= p.wave;
    chunk = program % p.chunks;
    sequence = program / p.chunks;
    if (sequence >= p.sequences) return false;

    inside = block * kWarp + lane < p.channels;
    channel = min(block * kWarp + lane, p.channels - 1);
    begin = chunk * p.chunk;
    end = min(begin + p.chunk, p.length);

    // Directions of one dimension are groups, of any number.
    const bool by_column = k < 32 && (p.column_major >> k & 1);
    const bool reverse = k < 32 && (p.reverse >> k & 1);
    image = static_cast<int64_t>(sequence / p.lines) * p.height * p.width;
    origin = sequence % p.lines * (by_column ? 1 : p.width);
    run = by_column ? p.height : p.length;
    step = by_column ? p.width : 1;
    ahead = reverse != backwards ? -kInterval : kInterval;
    const int t = (backwards ? last() : begin) + column;
    const int index = reverse ? p.length - 1 - t : t;
    line = index / run;
    within = index - line * run;

    char* shared = reinterpret_cast<char*>(shared_memory) + threadIdx.y * p.shared_per_warp;
    const int width = p.low_rank + 2 * p.states;
    proj_first = (image * p.directions + k) * width + p.low_rank - p.rank + lane / kInterval;
    bias = p.bias ? parameter(p.bias, k) : T(0);
    offsets = reinterpret_cast<int64_t*>(shared);
    rows = reinterpret_cast<T*>(offsets + kInterval);
    return true;
  }

  // The first step of the chunk's last interval.
  __device__ __forceinline__ int last() const {
    return begin + (end - 1 - begin) / kInterval * kInterval;
  }

  // Finds the positions of the interval at step t. This lane's comes from the interval before, in
  // the walk's order, without a division.
  __device__ __forceinline__ int locate(int t) {
    while (within >= run) within -= run, ++line;
    while (within < 0) within += run, --line;
    // Behind the end any position that exists will do.
    const int position = origin + (t + column < end ? line + within * step : 0);
    within += ahead;
    __syncwarp();
    if (lane < kInterval) offsets[lane] = position * p.position_stride;
    __syncwarp();
    return position;
  }

  // Positions of the interval at step t at which this lane has something to read and write.
  __device__ __forceinline__ int count(int t) const { return inside ? end - t : 0; }

  // The number of this lane's element of the image's first position.
  __device__ __forceinline__ int64_t first_of(const Map& map, int direction) const {
    return image * p.position_stride + direction * map.direction_stride + channel;
  }
  __device__ __forceinline__ const Raw* pointer_to(const Map& map) const {
    return whole(static_cast<const Raw*>(map.data) + first_of(map, k));
  }

  // What is behind the end, or of no channel, is zero if `count` says so.
  __device__ __forceinline__ void load(const Raw* first, int count, Raw (&out)[kInterval]) const {
    int64_t at[kInterval];
    read(offsets, at);
#pragma unroll
    for (int j = 0; j < kInterval; ++j) out[j] = j < count ? __ldg(first + at[j]) : Raw(0);
  }

  // Adds what is in a map of the dtype of sums.
  __device__ __forceinline__ void add(const Map& map, int64_t first, int count,
                                      T (&values)[kInterval]) const {
    const T* data = whole(static_cast<const T*>(map.data) + first);
#pragma unroll
    for (int j = 0; j < kInterval; ++j) {
      if (j < count) values[j] += data[offsets[j]];
    }
  }

  __device__ __forceinline__ void store(const Map& map, int64_t first, int count,
                                        const T (&values)[kInterval]) const {
    int64_t at[kInterval];
    read(offsets, at);
    with_dtype(map.dtype, [&](auto tag) {
      using Y = Stored<decltype(tag)::value>;
      auto* data = whole(static_cast<typename Y::type*>(map.data) + first);
#pragma unroll
      for (int j = 0; j < kInterval; ++j) {
        const auto value = Y::encode(values[j]);
        if (j < count) data[at[j]] = value;
      }
    });
  }

  // Turns what the interval's positions have in proj into `rows`: a lane takes every fourth number
  // of its position.
  __device__ __forceinline__ void stage(int position) {
    const int count = p.rank + 2 * p.states;
    const int row = lane / kInterval;
    const int64_t first = proj_first + static_cast<int64_t>(position) * p.proj_stride;
    with_dtype(p.proj_dtype, [&](auto tag) {
      using P = Stored<decltype(tag)::value>;
      const auto* source = whole(static_cast<const typename P::type*>(p.proj) + first);
      T* target = rows + lane;
#pragma unroll 4
      for (int i = row; i < count; i += kWarp / kInterval) {
        *target = static_cast<T>(P::decode(__ldg(source)));
        source += kWarp / kInterval;
        target += kWarp;
      }
    });
    __syncwarp();
  }

  __device__ __forceinline__ T parameter(const T* tensor, int row) const {
    return __ldg(tensor + static_cast<int64_t>(row) * p.channels + channel);
  }

  // The interval's step sizes and their slopes, zero behind the end.
  __device__ __forceinline__ void step_sizes(int t, T (&sizes)[kInterval],
                                             T (&slopes)[kInterval]) const {
#pragma unroll
    for (int j = 0; j < kInterval; ++j) sizes[j] = bias;
    const T* weights = whole(p.weight + static_cast<int64_t>(k) * p.rank * p.channels + channel);
    const T* row_of_rank = rows;
#pragma unroll 4
    for (int r = 0; r < p.rank; ++r) {
      const T weight = __ldg(weights);
      T row[kInterval];
      read(row_of_rank, row);
#pragma unroll
      for (int j = 0; j < kInterval; ++j) sizes[j] += row[j] * weight;
      weights += p.channels;
      row_of_rank += kInterval;
    }
    if (p.rank == 0) {
      int64_t at[kInterval];
      read(offsets, at);
      with_dtype(p.delta.dtype, [&](auto tag) {
        using P = Stored<decltype(tag)::value>;
        const auto* first =
            whole(static_cast<const typename P::type*>(p.delta.data) + first_of(p.delta, k));
#pragma unroll
        for (int j = 0; j < kInterval; ++j) {
          sizes[j] += static_cast<T>(P::decode(__ldg(first + at[j])));
        }
      });
    }
#pragma unroll
    for (int j = 0; j < kInterval; ++j) slopes[j] = T(1);
    if (p.softplus) {
#pragma unroll
      for (int j = 0; j < kInterval; ++j) softplus(sizes[j], sizes[j], slopes[j]);
    }
    if (t + kInterval > end) {
#pragma unroll
      for (int j = 0; j < kInterval; ++j) sizes[j] = t + j < end ? sizes[j] : T(0);
    }
  }

  __device__ __forceinline__ const T* row_b(int n) const { return rows + (p.rank + n) * kInterval; }
  __device__ __forceinline__ const T* row_c(int n) const { return row_b(p.states + n); }

  // The number of this sequence's direction in buffers of (sequences, K, ...).
  __device__ __forceinline__ int64_t path() const {
    return static_cast<int64_t>(sequence) * p.directions + k;
  }
};

// SINGLE says that N is 1. More states are in local memory, which the first-level cache holds, and
// take their turns at every interval, whose step sizes and outputs stay in registers.
template <Dtype X, bool SINGLE>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kForwardBlocks<State<X>>)
    scan_forward_kernel(const ScanParams<State<X>> p) {
  using T = State<X>;
  Walk<X> walk(p);
  if (!walk.start(false)) return;
  const int states = SINGLE ? 1 : p.states;
  const int64_t chunk_row = walk.path() * p.chunks + walk.chunk;
  const int64_t intervals = ((p.length - 1) >> p.saved_shift) + 1;
  const T skip = p.skip ? walk.parameter(p.skip, walk.k) : T(0);
  T h[SINGLE ? 1 : kMaxStates];
  for (int n = 0; n < states; ++n) {
    const int64_t row = (chunk_row * states + n) * p.channels + walk.channel;
    h[n] = p.entering ? p.entering[row] : T(0);
  }
  const auto* x = walk.pointer_to(p.x);
  const int64_t y_first = walk.first_of(p.y, walk.k - p.first);
  const T only_rate = walk.parameter(p.A, walk.k * states) * T(kLog2E);
  T total = T(0);
  for (int t = walk.begin; t < walk.end; t += kInterval) {
    const int position = walk.locate(t);
    const int count = walk.count(t);
    typename Walk<X>::Raw raw[kInterval];
    walk.load(x, kInterval, raw);
    walk.stage(position);
    T sizes[kInterval], drives[kInterval], y[kInterval];
    {
      T unused[kInterval];
      walk.step_sizes(t, sizes, unused);
    }
#pragma unroll
    for (int j = 0; j < kInterval; ++j) {
      const T u = Stored<X>::decode(raw[j]);
      drives[j] = sizes[j] * u;
      y[j] = skip * u;
      total += sizes[j];
    }
    if (p.accumulate) walk.add(p.y, y_first, count, y);
    const bool save = p.carries && walk.inside && (t & ((1 << p.saved_shift) - 1)) == 0;
    for (int n = 0; n < states; ++n) {
      const T rate = SINGLE ? only_rate : walk.parameter(p.A, walk.k * states + n) * T(kLog2E);
      T b[kInterval], c[kInterval];
      read(walk.row_b(n), b);
      read(walk.row_c(n), c);
      T state = h[n];
      if (save) {
        const int64_t interval = walk.path() * intervals + (t >> p.saved_shift);
        p.carries[(interval * states + n) * p.channels + walk.channel] = state;
      }
#pragma unroll
      for (int j = 0; j < kInterval; ++j) {
        state = power_of_2(sizes[j] * rate) * state + drives[j] * b[j];
        y[j] += state * c[j];
      }
      h[n] = state;
    }
    if (p.y.data) walk.store(p.y, y_first, count, y);
  }
  if (p.end && walk.inside) {
    for (int n = 0; n < states; ++n) {
      p.end[(chunk_row * states + n) * p.channels + walk.channel] = h[n];
    }
    p.total[chunk_row * p.channels + walk.channel] = total;
  }
}

// The gradient that leaves a position for the one before it: s = exp(delta A) (s + C dy).
template <Dtype X, bool SINGLE>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kForwardBlocks<State<X>>)
    scan_adjoint_ends_kernel(const ScanParams<State<X>> p) {
  using T = State<X>;
  Walk<X> walk(p);
  if (!walk.start(true)) return;
  const int states = SINGLE ? 1 : p.states;
  T s[SINGLE ? 1 : kMaxStates];
  for (int n = 0; n < states; ++n) s[n] = T(0);
  const auto* grad_y = walk.pointer_to(p.grad_y);
  const T only_rate = walk.parameter(p.A, walk.k * states) * T(kLog2E);
  T total = T(0);
  for (int t = walk.last(); t >= walk.begin; t -= kInterval) {
    const int position = walk.locate(t);
    typename Walk<X>::Raw raw[kInterval];
    walk.load(grad_y, walk.count(t), raw);
    walk.stage(position);
    T sizes[kInterval], unused[kInterval];
    walk.step_sizes(t, sizes, unused);
#pragma unroll
    for (int j = 0; j < kInterval; ++j) total += sizes[j];
    for (int n = 0; n < states; ++n) {
      const T rate = SINGLE ? only_rate : walk.parameter(p.A, walk.k * states + n) * T(kLog2E);
      T c[kInterval];
      read(walk.row_c(n), c);
      T state = s[n];
#pragma unroll
      for (int j = kInterval - 1; j >= 0; --j) {
        state = power_of_2(sizes[j] * rate) * (state + c[j] * T(Stored<X>::decode(raw[j])));
      }
      s[n] = state;
    }
  }
  if (!walk.inside) return;
  const int64_t chunk_row = walk.path() * p.chunks + walk.chunk;
  for (int n = 0; n < states; ++n) {
    p.end[(chunk_row * states + n) * p.channels + walk.channel] = s[n];
  }
  p.total[chunk_row * p.channels + walk.channel] = total;
}

// A thread follows one state of one channel over the chunks of its path.
template <typename T, bool BACKWARDS>
__global__ void __launch_bounds__(kCarryThreads) scan_carry_kernel(const ScanParams<T> p) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kCarryThreads + threadIdx.x;
  const int channel = i % p.channels;
  i /= p.channels;
  const int n = i % p.states;
  const int64_t path = i / p.states;
  if (path >= static_cast<int64_t>(p.sequences) * p.directions) return;
  const int64_t k = path % p.directions;
  const T rate = p.A[(k * p.states + n) * p.channels + channel] * T(kLog2E);
  T state = T(0);
  for (int first = 0; first < p.chunks; first += kChunksAtOnce) {
    // All loads come before the stores, which the compiler would not dare to let them pass.
    int64_t rows[kChunksAtOnce];
    T ends[kChunksAtOnce], decays[kChunksAtOnce];
#pragma unroll
    for (int j = 0; j < kChunksAtOnce; ++j) {
      const int c = min(first + j, p.chunks - 1);
      const int64_t row = path * p.chunks + (BACKWARDS ? p.chunks - 1 - c : c);
      rows[j] = (row * p.states + n) * p.channels + channel;
      ends[j] = p.end[rows[j]];
      decays[j] = power_of_2(p.total[row * p.channels + channel] * rate);
    }
#pragma unroll
    for (int j = 0; j < kChunksAtOnce; ++j) {
      if (first + j < p.chunks) p.end[rows[j]] = state;
      state = decays[j] * state + ends[j];
    }
  }
}

// Sums COUNT numbers over the lanes, of which lane i gets number i * COUNT / 32. A lane sends half
// of its numbers to a partner and keeps the other half, so that a sum costs one exchange and not
// five.
template <int COUNT, typename T>
__device__ __forceinline__ T sum_over_lanes(T* values, int lane, int distance = kWarp / 2) {
  if constexpr (COUNT == 1) {
    T sum = values[0];
    for (; distance; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return sum;
  } else {
    constexpr int half = COUNT / 2;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[half + i] : values[i];
      const T sent = upper ? values[i] : values[half + i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
    }
    return sum_over_lanes<half>(values, lane, distance / 2);
  }
}

template <Dtype X, bool SINGLE>
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock, kBackwardBlocks<State<X>>)
    scan_backward_kernel(const ScanParams<State<X>> p) {
  using T = State<X>;
  Walk<X> walk(p);
  if (!walk.start(true)) return;
  const int states = SINGLE ? 1 : p.states;
  const int64_t chunk_row = walk.path() * p.chunks + walk.chunk;
  const int64_t intervals = (p.length + kInterval - 1) / kInterval;
  const int64_t positions = static_cast<int64_t>(p.sequences / p.lines) * p.height * p.width;
  const T skip = p.skip ? walk.parameter(p.skip, walk.k) : T(0);
  // The gradient that comes in from behind, and the sum for the gradient of A.
  T incoming[SINGLE ? 1 : kMaxStates], grad_A[SINGLE ? 1 : kMaxStates];
  for (int n = 0; n < states; ++n) {
    const int64_t row = (chunk_row * states + n) * p.channels + walk.channel;
    // Lanes without a channel take part in sums over channels.
    incoming[n] = p.entering && walk.inside ? p.entering[row] : T(0);
    grad_A[n] = T(0);
  }
  const auto* x = walk.pointer_to(p.x);
  const auto* grad_y = walk.pointer_to(p.grad_y);
  const int64_t grad_x_first = walk.first_of(p.y, walk.k - p.first);
  const int64_t grad_raw_first = walk.first_of(p.grad_raw, walk.k);
  const T only_A = walk.parameter(p.A, walk.k * states);
  T grad_skip = T(0);
  // Where this lane puts what it gets of an interval's sums: dB in the lower half, dC in the upper.
  const int number = walk.lane / 2;
  const int summed = number % kInterval;
  T* const grad_proj =
      p.grad_proj +
      ((static_cast<int64_t>(walk.block) * p.directions + walk.k) * positions + walk.image) * 2 *
          states +
      number / kInterval * states;

  for (int t = walk.last(); t >= walk.begin; t -= kInterval) {
    const int position = walk.locate(t);
    const int count = walk.count(t);
    typename Walk<X>::Raw raw_u[kInterval], raw_grad[kInterval];
    walk.load(x, kInterval, raw_u);
    walk.load(grad_y, count, raw_grad);
    walk.stage(position);
    T sizes[kInterval], slopes[kInterval];
    walk.step_sizes(t, sizes, slopes);
    T u[kInterval], grad[kInterval];
    // B g and the gradient of the step sizes through the decays, summed over states.
    T through_drive[kInterval], through_rate[kInterval];
#pragma unroll
    for (int j = 0; j < kInterval; ++j) {
      u[j] = Stored<X>::decode(raw_u[j]);
      grad[j] = Stored<X>::decode(raw_grad[j]);
      grad_skip += u[j] * grad[j];
      through_drive[j] = through_rate[j] = T(0);
    }
    const int64_t summed_row = int64_t{2} * __shfl_sync(kAllLanes, position, summed) * states;
    const int64_t carries_row = (walk.path() * intervals + t / kInterval) * states;
    for (int n = 0; n < states; ++n) {
      const T A = SINGLE ? only_A : walk.parameter(p.A, walk.k * states + n);
      T state = p.carries[(carries_row + n) * p.channels + walk.channel];
      T b[kInterval], c[kInterval], before[kInterval], decays[kInterval], sums[2 * kInterval];
      read(walk.row_b(n), b);
      read(walk.row_c(n), c);
#pragma unroll
      for (int j = 0; j < kInterval; ++j) {
        before[j] = state;
        decays[j] = power_of_2(sizes[j] * (A * T(kLog2E)));
        state = decays[j] * state + sizes[j] * u[j] * b[j];
        sums[kInterval + j] = grad[j] * state;
      }
      T arriving = incoming[n], grad_rate = T(0);
#pragma unroll
      for (int j = kInterval - 1; j >= 0; --j) {
        const T adjoint = c[j] * grad[j] + arriving;
        arriving = decays[j] * adjoint;
        const T through = arriving * before[j];
        grad_rate += sizes[j] * through;
        through_rate[j] += A * through;
        through_drive[j] += b[j] * adjoint;
        sums[j] = adjoint * (sizes[j] * u[j]);
      }
      incoming[n] = arriving;
      grad_A[n] += grad_rate;
      const T sum = sum_over_lanes<2 * kInterval>(sums, walk.lane);
      if (walk.lane % 2 == 0 && t + summed < walk.end) {
        grad_proj[summed_row + n] = sum;
      }
    }
    T grad_u[kInterval], grad_raw[kInterval];
#pragma unroll
    for (int j = 0; j < kInterval; ++j) {
      grad_u[j] = skip * grad[j] + sizes[j] * through_drive[j];
      grad_raw[j] = (u[j] * through_drive[j] + through_rate[j]) * slopes[j];
    }
    if (p.accumulate) walk.add(p.y, grad_x_first, count, grad_u);
    walk.store(p.y, grad_x_first, count, grad_u);
    walk.store(p.grad_raw, grad_raw_first, count, grad_raw);
  }
  if (!walk.inside) return;
  // A row for every sequence and chunk, so that one sum over rows finishes them.
  const int64_t sums_row =
      (static_cast<int64_t>(walk.sequence) * p.chunks + walk.chunk) * p.directions + walk.k;
  for (int n = 0; n < states; ++n) {
    p.grad_A[(sums_row * states + n) * p.channels + walk.channel] = grad_A[n];
  }
  if (p.grad_skip) p.grad_skip[sums_row * p.channels + walk.channel] = grad_skip;
}

namespace {

template <typename T>
cudaError_t launch(void (*kernel)(const ScanParams<T>), const ScanParams<T>& params, int64_t blocks,
                   dim3 threads, int shared, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  void* arguments[] = {const_cast<ScanParams<T>*>(&params)};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), threads, arguments, shared,
                          stream);
}

// Launches a kernel whose warps walk.
template <typename T>
cudaError_t launch_walk(void (*single)(const ScanParams<T>), void (*several)(const ScanParams<T>),
                        ScanParams<T>& p, int shared_bytes, cudaStream_t stream) {
  p.blocks = (p.channels + kWarp - 1) / kWarp;
  p.shared_per_warp = (shared_bytes + 15) / 16 * 16;
  const int64_t warps = static_cast<int64_t>(p.blocks) * p.wave * p.chunks * p.sequences;
  if (warps > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(p.states == 1 ? single : several, p, (warps + kWarpsPerBlock - 1) / kWarpsPerBlock,
                dim3(kWarp, kWarpsPerBlock), kWarpsPerBlock * p.shared_per_warp, stream);
}

}  // namespace

template <Dtype X>
cudaError_t launch_forward(ScanParams<State<X>> params, cudaStream_t stream) {
  using T = State<X>;
  return launch_walk<T>(scan_forward_kernel<X, true>, scan_forward_kernel<X, false>, params,
                        Walk<X>::shared_bytes(params), stream);
}

template <Dtype X>
cudaError_t launch_adjoint_ends(ScanParams<State<X>> params, cudaStream_t stream) {
  using T = State<X>;
  return launch_walk<T>(scan_adjoint_ends_kernel<X, true>, scan_adjoint_ends_kernel<X, false>,
                        params, Walk<X>::shared_bytes(params), stream);
}

template <Dtype X>
cudaError_t launch_carry(ScanParams<State<X>> params, bool backwards, cudaStream_t stream) {
  using T = State<X>;
  const int64_t threads =
      static_cast<int64_t>(params.sequences) * params.directions * params.states * params.channels;
  return launch<T>(backwards ? scan_carry_kernel<T, true> : scan_carry_kernel<T, false>, params,
                   (threads + kCarryThreads - 1) / kCarryThreads, dim3(kCarryThreads), 0, stream);
}

template <Dtype X>
cudaError_t launch_backward(ScanParams<State<X>> params, cudaStream_t stream) {
  return launch_walk<State<X>>(scan_backward_kernel<X, true>, scan_backward_kernel<X, false>,
                               params, Walk<X>::shared_bytes(params), stream);
}

constexpr Dtype kMap = Dtype::MMVMAMBA_MAP;
template cudaError_t launch_forward<kMap>(ScanParams<State<kMap>>, cudaStream_t);
template cudaError_t launch_adjoint_ends<kMap>(ScanParams<State<kMap>>, cudaStream_t);
template cudaError_t launch_carry<kMap>(ScanParams<State<kMap>>, bool, cudaStream_t);
template cudaError_t launch_backward<kMap>(ScanParams<State<kMap>>, cudaStream_t);

}  // namespace cuda
}  // namespace mmvmamba
