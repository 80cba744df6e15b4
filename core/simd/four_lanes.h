// Lanes of vectors of four floats, moved by the compiler's extensions.
#pragma once

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

ANYMAMBA_INLINE FloatVec interleave_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}

ANYMAMBA_INLINE FloatVec interleave_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}

ANYMAMBA_INLINE FloatVec zip_low(FloatVec a, FloatVec b) { return interleave_low(a, b); }

ANYMAMBA_INLINE FloatVec zip_high(FloatVec a, FloatVec b) { return interleave_high(a, b); }

ANYMAMBA_INLINE FloatVec join_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 1, 4, 5);
}

ANYMAMBA_INLINE FloatVec join_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 3, 6, 7);
}

ANYMAMBA_INLINE FloatVec load_fours(const char* p, std::int64_t) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace anymamba::ANYMAMBA_ISA
