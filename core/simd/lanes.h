// Vectors across each other: transposes, and sums over lanes for a whole vector of them at once.
#pragma once

#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

#if defined(__AVX512F__)
#define ANYMAMBA_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ANYMAMBA_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define ANYMAMBA_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ANYMAMBA_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ANYMAMBA_LOW 0, 4, 1, 5
#define ANYMAMBA_HIGH 2, 6, 3, 7
#endif

ANYMAMBA_INLINE FloatVec interleave_low(FloatVec a, FloatVec b) { return __builtin_shufflevector(a, b, ANYMAMBA_LOW); }
ANYMAMBA_INLINE FloatVec interleave_high(FloatVec a, FloatVec b) { return __builtin_shufflevector(a, b, ANYMAMBA_HIGH); }

#undef ANYMAMBA_LOW
#undef ANYMAMBA_HIGH

// v (kLanes, kLanes) becomes its transpose: interleaving row i with row i + kLanes/2 rotates the bits of an
// entry's place (row, lane) by one, so log2(kLanes) rounds exchange rows and lanes.
ANYMAMBA_INLINE void transpose(FloatVec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    FloatVec u[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      u[2 * i] = interleave_low(v[i], v[i + kLanes / 2]);
      u[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = u[i];
  }
}

// Lane i of the result is the sum of the lanes of v[i], in pairs that do not depend on i.
ANYMAMBA_INLINE FloatVec sums_of_lanes(FloatVec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i)
      v[i] = interleave_low(v[i], v[i + left]) + interleave_high(v[i], v[i + left]);
  return v[0];
}

}  // namespace anymamba::ANYMAMBA_ISA
