// Vectors across each other: transposes, and sums over lanes for a whole vector of them at once.
#pragma once

#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

// v (kLanes, kLanes) becomes its transpose: interleaving row i with row i + kLanes / 2 rotates the
// bits of an entry's place (row, lane) by one, so log2(kLanes) rounds exchange rows and lanes.
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
