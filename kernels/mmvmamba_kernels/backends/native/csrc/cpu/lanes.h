// Arithmetic on the kLanes channels that a CPU computes together, and the functions that the scan
// needs of them. Compiled once per instruction set, in a namespace of that name.
#pragma once

#include <cstdint>
#include <cstring>

#include "../scan_params.h"

namespace mmvmamba {
namespace MMVMAMBA_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct Real;

template <>
struct Real<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr Int kBias = 127;
  // Above the first exp is infinite, below the second it is taken for zero.
  static constexpr float kExpMax = 89.0f;
  static constexpr float kExpMin = -86.9f;
  // log(2) in two parts: multiples of the first by an exponent are exact.
  static constexpr float kLog2High = 0.693359375f;
  static constexpr float kLog2Low = -2.12194440e-4f;
  // Terms after which both series are exact to rounding.
  static constexpr int kExpTerms = 8;
  static constexpr int kLogTerms = 7;
};

template <>
struct Real<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr Int kBias = 1023;
  static constexpr double kExpMax = 710.0;
  static constexpr double kExpMin = -708.0;
  static constexpr double kLog2High = 6.93145751953125e-1;
  static constexpr double kLog2Low = 1.42860682030941723212e-6;
  static constexpr int kExpTerms = 14;
  static constexpr int kLogTerms = 17;
};

// kCount numbers: a vector of the machine, or two halves. Halves, and not an array of vectors,
// because compilers keep arrays in memory.
template <typename T, int kCount = kLanes, bool kNative = kCount * sizeof(T) <= kVectorBytes>
struct Lanes;

template <typename T, int kCount>
struct Lanes<T, kCount, true> {
  typedef T Vector __attribute__((vector_size(kCount * sizeof(T))));
  typedef typename Real<T>::Int Bits __attribute__((vector_size(kCount * sizeof(T))));

  Vector v;

  Lanes() = default;
  // NOLINTNEXTLINE: a number stands for itself in every lane.
  Lanes(T value) : v(value - Vector{}) {}

  static Lanes load(const T* source) {
    Lanes lanes;
    std::memcpy(&lanes.v, source, sizeof(Vector));
    return lanes;
  }
  void store(T* target) const { std::memcpy(target, &v, sizeof(Vector)); }

  Lanes& operator+=(const Lanes& other) { return v += other.v, *this; }
  Lanes& operator-=(const Lanes& other) { return v -= other.v, *this; }
  Lanes& operator*=(const Lanes& other) { return v *= other.v, *this; }
  Lanes& operator/=(const Lanes& other) { return v /= other.v, *this; }

  // Lane by lane: yes where a > b, no elsewhere, which is where one of them is NaN.
  static Lanes where_greater(const Lanes& a, const Lanes& b, const Lanes& yes, const Lanes& no) {
    Lanes result;
    result.v = a.v > b.v ? yes.v : no.v;
    return result;
  }

  // Times 2 to the power of the integer that is in the lowest bits of `rounded` - `zero`. A factor
  // of two is left out of the power, which has no number of its own at the upper end.
  Lanes times_power_of_two(const Lanes& rounded, const Lanes& zero) const {
    // Casts between vectors keep the bits.
    const Bits exponent = (Bits)rounded.v - (Bits)zero.v + (Real<T>::kBias - 1);
    Lanes result;
    result.v = (v + v) * (Vector)(exponent << Real<T>::kMantissa);
    return result;
  }

  // The lower half of the lanes plus the upper half.
  Lanes<T, kCount / 2> fold() const {
    Lanes<T, kCount / 2> low, high;
    std::memcpy(&low.v, &v, sizeof(low.v));
    std::memcpy(&high.v, reinterpret_cast<const char*>(&v) + sizeof(low.v), sizeof(high.v));
    return low += high;
  }
  // The sum over the lanes, in a fixed order.
  T sum() const {
    if constexpr (kCount == 2) {
      return v[0] + v[1];
    } else {
      return fold().sum();
    }
  }
};

template <typename T, int kCount>
struct Lanes<T, kCount, false> {
  using Half = Lanes<T, kCount / 2>;

  Half low, high;

  Lanes() = default;
  // NOLINTNEXTLINE: a number stands for itself in every lane.
  Lanes(T value) : low(value), high(value) {}
  Lanes(const Half& low_, const Half& high_) : low(low_), high(high_) {}

  static Lanes load(const T* source) {
    return {Half::load(source), Half::load(source + kCount / 2)};
  }
  void store(T* target) const {
    low.store(target);
    high.store(target + kCount / 2);
  }

  Lanes& operator+=(const Lanes& other) { return low += other.low, high += other.high, *this; }
  Lanes& operator-=(const Lanes& other) { return low -= other.low, high -= other.high, *this; }
  Lanes& operator*=(const Lanes& other) { return low *= other.low, high *= other.high, *this; }
  Lanes& operator/=(const Lanes& other) { return low /= other.low, high /= other.high, *this; }

  static Lanes where_greater(const Lanes& a, const Lanes& b, const Lanes& yes, const Lanes& no) {
    return {Half::where_greater(a.low, b.low, yes.low, no.low),
            Half::where_greater(a.high, b.high, yes.high, no.high)};
  }
  Lanes times_power_of_two(const Lanes& rounded, const Lanes& zero) const {
    return {low.times_power_of_two(rounded.low, zero.low),
            high.times_power_of_two(rounded.high, zero.high)};
  }
  Half fold() const {
    Half total = low;
    return total += high;
  }
  T sum() const { return fold().sum(); }
};

#if defined(__clang__)
#define MMVMAMBA_SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MMVMAMBA_SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

// target[j] += the sum over the lanes of rows[j], in a fixed order. Eight rows in vectors of eight
// lanes are added up side by side, with a third of the instructions of one after the other.
constexpr int kSums = 8;

template <typename T>
inline void add_sums(const Lanes<T, kSums>* rows, T* const* target, int64_t offset) {
  T sums[kSums];
  if constexpr (kSums * sizeof(T) <= kVectorBytes) {
    using Vector = typename Lanes<T, kSums>::Vector;
    using Mask = typename Lanes<T, kSums>::Bits;
    Vector pairs[4], fours[2];
    for (int j = 0; j < 4; ++j) {
      const Vector a = rows[2 * j].v, b = rows[2 * j + 1].v;
      pairs[j] = MMVMAMBA_SHUFFLE(Mask, a, b, 0, 8, 1, 9, 4, 12, 5, 13) +
                 MMVMAMBA_SHUFFLE(Mask, a, b, 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int j = 0; j < 2; ++j) {
      const Vector a = pairs[2 * j], b = pairs[2 * j + 1];
      fours[j] = MMVMAMBA_SHUFFLE(Mask, a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                 MMVMAMBA_SHUFFLE(Mask, a, b, 2, 3, 10, 11, 6, 7, 14, 15);
    }
    const Vector total = MMVMAMBA_SHUFFLE(Mask, fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) +
                         MMVMAMBA_SHUFFLE(Mask, fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
    std::memcpy(sums, &total, sizeof(total));
  } else {
    for (int j = 0; j < kSums; ++j) sums[j] = rows[j].sum();
  }
  for (int j = 0; j < kSums; ++j) target[j][offset] += sums[j];
}
#undef MMVMAMBA_SHUFFLE

#define MMVMAMBA_OPERATOR(op)                                                          \
  template <typename T, int kCount>                                                    \
  inline Lanes<T, kCount> operator op(Lanes<T, kCount> a, const Lanes<T, kCount>& b) { \
    return a op## = b;                                                                 \
  }
MMVMAMBA_OPERATOR(+)
MMVMAMBA_OPERATOR(-)
MMVMAMBA_OPERATOR(*)
MMVMAMBA_OPERATOR(/)
#undef MMVMAMBA_OPERATOR

template <typename T>
inline Lanes<T> where_greater(const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& yes,
                              const Lanes<T>& no) {
  return Lanes<T>::where_greater(a, b, yes, no);
}

// The first `count` channels of a block; zero in the other lanes.
template <typename T>
inline Lanes<T> load_channels(const T* source, int64_t count) {
  if (count == kLanes) return Lanes<T>::load(source);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
  return Lanes<T>::load(buffer);
}

template <typename T>
inline void store_channels(const Lanes<T>& lanes, T* target, int64_t count) {
  if (count == kLanes) return lanes.store(target);
  T buffer[kLanes];
  lanes.store(buffer);
  for (int64_t i = 0; i < count; ++i) target[i] = buffer[i];
}

constexpr double inverse_factorial(int n) { return n < 2 ? 1.0 : inverse_factorial(n - 1) / n; }

// exp to about one unit in the last place, up to infinity, and zero where the result would be
// close to subnormal. NaN stays NaN.
template <typename T>
inline Lanes<T> exp(const Lanes<T>& argument) {
  using L = Lanes<T>;
  const L low(Real<T>::kExpMin), high(Real<T>::kExpMax);
  L x = where_greater(argument, high, high, argument);
  x = where_greater(low, x, low, x);

  // Adding 1.5 * 2^mantissa leaves the nearest integer in the lowest bits.
  const L round = L(T(typename Real<T>::Int{3} << (Real<T>::kMantissa - 1)));
  const L rounded = x * L(T(1.44269504088896340736)) + round;
  const L exponent = rounded - round;
  const L r = (x - exponent * L(Real<T>::kLog2High)) - exponent * L(Real<T>::kLog2Low);

  // The Taylor series on |r| <= log(2) / 2.
  L series = L(T(inverse_factorial(Real<T>::kExpTerms - 1)));
#pragma GCC unroll 16
  for (int k = Real<T>::kExpTerms - 2; k >= 0; --k) {
    series = series * r + L(T(inverse_factorial(k)));
  }
  return where_greater(low, argument, L(T(0)), series.times_power_of_two(rounded, round));
}

// softplus(z) as PyTorch defines it with threshold 20, and its derivative.
template <typename T>
struct Softplus {
  Lanes<T> value;
  Lanes<T> slope;
};

template <typename T, bool kWithSlope>
inline Softplus<T> softplus(const Lanes<T>& z) {
  using L = Lanes<T>;
  const L zero(T(0)), one(T(1));
  const L positive = where_greater(z, zero, z, zero);
  const L e = exp(where_greater(z, zero, zero - z, z));

  // log(1 + e) = 2 atanh(s) on 0 <= s <= 1/3, without cancellation for small e.
  const L s = e / (e + L(T(2)));
  const L square = s * s;
  L series(T(1) / T(2 * Real<T>::kLogTerms - 1));
#pragma GCC unroll 16
  for (int k = Real<T>::kLogTerms - 2; k >= 0; --k) {
    series = series * square + L(T(1) / T(2 * k + 1));
  }
  // `positive` is zero for NaN, but e is not.
  const L value = positive + L(T(2)) * s * series;

  Softplus<T> result;
  result.value = where_greater(z, L(T(20)), z, value);
  if (kWithSlope) {
    const L sigmoid = where_greater(z, zero, one, e) / (one + e);
    result.slope = where_greater(z, L(T(20)), one, sigmoid);
  }
  return result;
}

}  // namespace MMVMAMBA_ISA
}  // namespace mmvmamba
