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

// Lane i of v[s] is word s of row i: four neighbours of 32 bits of each of kLanes rows, `stride` bytes
// apart. That takes fewer instructions than transposing whole vectors.
ANYMAMBA_INLINE void load_columns(FloatVec (&v)[4], const void* rows, std::int64_t stride) {
  const char* const first = static_cast<const char*>(rows);
  FloatVec fours[4];  // of the rows i, i + 4, ...
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) fours[i] = load_fours(first + i * stride, 4 * stride);
  const FloatVec low = zip_low(fours[0], fours[1]), low_end = zip_low(fours[2], fours[3]);
  const FloatVec high = zip_high(fours[0], fours[1]), high_end = zip_high(fours[2], fours[3]);
  v[0] = join_low(low, low_end);
  v[1] = join_high(low, low_end);
  v[2] = join_low(high, high_end);
  v[3] = join_high(high, high_end);
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
