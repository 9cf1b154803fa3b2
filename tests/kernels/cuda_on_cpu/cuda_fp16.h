#pragma once

#include <c10/util/Half.h>

using __half = c10::Half;

inline __half __ushort_as_half(unsigned short bits) { return {bits, c10::Half::from_bits()}; }
inline unsigned short __half_as_ushort(__half value) { return value.x; }
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
