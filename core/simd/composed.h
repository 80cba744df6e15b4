// Operations made of an instruction set's own: namespace `generic` holds forms that its header takes over
// with `using`, or replaces by instructions. Included behind what they are made of.
#pragma once

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

// dot4 for weights of 8 or 4 bits.
template <int bits>
ANYMAMBA_INLINE IntVec dot4_of(IntVec sum, ByteVec a, ByteVec b) {
  return bits == 4 ? dot4_of_nibbles(sum, a, b) : dot4(sum, a, b);
}

namespace generic {

// The same with four bytes in all lanes: four number i of those from b on, of which a multiple of 16 can
// be read.
template <int bits>
ANYMAMBA_INLINE IntVec dot4_row(IntVec sum, ByteVec a, const std::int8_t* b, int i) {
  std::int32_t four;
  __builtin_memcpy(&four, b + 4 * i, 4);
  return dot4_of<bits>(sum, a, (ByteVec)splat_int(four));
}

// Half a vector, in its lower and its upper half.
ANYMAMBA_INLINE ByteVec load_twice(const void* p) {
  ByteVec v;
  __builtin_memcpy(&v, p, kBytes / 2);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + kBytes / 2, p, kBytes / 2);
  return v;
}

// Number i of those from a on, of which a multiple of four can be read, times b, plus c.
ANYMAMBA_INLINE FloatVec fma_row(const float* a, int i, FloatVec b, FloatVec c) { return fma_of(a + i, b, c); }

ANYMAMBA_INLINE FloatVec fma_row_bf16_pairs(const float* a, int i, FloatVec b, FloatVec sum) {
  return fma_bf16_pairs(a + i, b, sum);
}

// Numbers whose sum is that of a vector's lanes.
typedef IntVec PartVec;
ANYMAMBA_INLINE PartVec part_of(IntVec v) { return v; }

// Lane i is the sum of parts[i]. Exact.
ANYMAMBA_INLINE IntVec sums_of_parts(const PartVec* parts) {
  IntVec v[kLanes];
#pragma GCC unroll 8
  for (int i = 0; i < kLanes; ++i) v[i] = parts[i];
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) {
      const FloatVec a = (FloatVec)v[i], b = (FloatVec)v[i + left];
      v[i] = (IntVec)interleave_low(a, b) + (IntVec)interleave_high(a, b);
    }
  return v[0];
}

}  // namespace generic

}  // namespace anymamba::ANYMAMBA_ISA
