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

// Coefficients from the lowest power on: kExp of exp(r) for |r| <= log(2) / 2, kAtanh of
// atanh(s) / s in s * s for s <= 1 / 3. In float they are minimax polynomials, off by less than a
// tenth of a rounding; in double Taylor series.
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
  static constexpr float kExp[] = {1.0f,         1.0f,          0.49999994f,  0.16666521f,
                                   0.041668389f, 0.0083687454f, 0.0013814539f};
  static constexpr float kAtanh[] = {1.0f, 0.33333209f, 0.20010781f, 0.14000581f, 0.14007705f};
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
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    1.0 / 2,
                                    1.0 / 6,
                                    1.0 / 24,
                                    1.0 / 120,
                                    1.0 / 720,
                                    1.0 / 5040,
                                    1.0 / 40320,
                                    1.0 / 362880,
                                    1.0 / 3628800,
                                    1.0 / 39916800,
                                    1.0 / 479001600,
                                    1.0 / 6227020800};
  static constexpr double kAtanh[] = {1.0,      1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                      1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21, 1.0 / 23,
                                      1.0 / 25, 1.0 / 27, 1.0 / 29, 1.0 / 31, 1.0 / 33};
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

  // Minus the absolute value. Casts between vectors keep the bits.
  Lanes minus_magnitude() const {
    Lanes result;
    result.v = (Vector)((Bits)v | (Bits)Lanes(T(-0.0)).v);
    return result;
  }

  // Times 2 to the power of one less than the integer in the lowest bits of `rounded` - `zero`. The
  // integer itself has no power at the upper end.
  Lanes times_half_power_of_two(const Lanes& rounded, const Lanes& zero) const {
    const Bits exponent = (Bits)rounded.v - (Bits)zero.v + (Real<T>::kBias - 1);
    Lanes result;
    result.v = v * (Vector)(exponent << Real<T>::kMantissa);
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
  Lanes minus_magnitude() const { return {low.minus_magnitude(), high.minus_magnitude()}; }
  Lanes times_half_power_of_two(const Lanes& rounded, const Lanes& zero) const {
    return {low.times_half_power_of_two(rounded.low, zero.low),
            high.times_half_power_of_two(rounded.high, zero.high)};
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

// The sums over the lanes of kSums rows, each in a fixed order. Eight rows in vectors of eight
// lanes are added up side by side, with a third of the instructions of one after the other.
constexpr int kSums = 8;

template <typename T>
inline void sum_rows(const Lanes<T, kSums>* rows, T* sums) {
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

// A product that is rounded before it is added to something: in memory, the compiler makes no fused
// multiply-add of both.
template <typename T>
inline Lanes<T> rounded_product(const Lanes<T>& a, const Lanes<T>& b) {
  Lanes<T> product = a * b;
  __asm__("" : "+m"(product));
  return product;
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

// factor * (coefficients[0] + coefficients[1] * x + ...), the factor a power of two.
template <typename T, int kTerms>
inline Lanes<T> polynomial(const T (&coefficients)[kTerms], const Lanes<T>& x, T factor) {
  Lanes<T> value(factor * coefficients[kTerms - 1]);
#pragma GCC unroll 32
  for (int k = kTerms - 2; k >= 0; --k) value = value * x + Lanes<T>(factor * coefficients[k]);
  return value;
}

// As exp, of arguments up to kExpMax or NaN.
template <typename T>
inline Lanes<T> exp_to_max(const Lanes<T>& x) {
  using L = Lanes<T>;
  // Adding 1.5 * 2^mantissa leaves the nearest integer in the lowest bits.
  const L round = L(T(typename Real<T>::Int{3} << (Real<T>::kMantissa - 1)));
  const L rounded = x * L(T(1.44269504088896340736)) + round;
  const L exponent = rounded - round;
  const L r = (x - exponent * L(Real<T>::kLog2High)) - exponent * L(Real<T>::kLog2Low);

  const L twice = polynomial(Real<T>::kExp, r, T(2));
  return where_greater(L(Real<T>::kExpMin), x, L(T(0)),
                       twice.times_half_power_of_two(rounded, round));
}

// exp to about one unit in the last place, up to infinity, and zero where the result would be
// close to subnormal. NaN stays NaN.
template <typename T>
inline Lanes<T> exp(const Lanes<T>& x) {
  const Lanes<T> high(Real<T>::kExpMax);
  return exp_to_max(where_greater(x, high, high, x));
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
  const L e = exp_to_max(z.minus_magnitude());

  // log(1 + e) = 2 atanh(s) on 0 <= s <= 1/3, without cancellation for small e.
  const L upper = e + L(T(2));
  Softplus<T> result;
  L s;
  if constexpr (kWithSlope) {
    // One division gives both quotients.
    const L lower = e + one, inverse = one / (lower * upper);
    s = e * lower * inverse;
    result.slope = where_greater(z, zero, one, e) * (upper * inverse);
  } else {
    s = e / upper;
  }
  // `positive` is zero for NaN, but e is not.
  result.value = positive + s * polynomial(Real<T>::kAtanh, s * s, T(2));
  // In float both have rounded to this from 17 on.
  if constexpr (sizeof(T) > sizeof(float)) {
    result.value = where_greater(z, L(T(20)), z, result.value);
    if (kWithSlope) result.slope = where_greater(z, L(T(20)), one, result.slope);
  }
  return result;
}

}  // namespace MMVMAMBA_ISA
}  // namespace mmvmamba
