// Sums of products of bytes: the arithmetic of quantized weights.
#pragma once

#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

inline constexpr int kBytes = 4 * kLanes;  // of a vector

typedef std::uint8_t ByteVec __attribute__((vector_size(kBytes)));

ANYMAMBA_INLINE ByteVec load_bytes(const void* p) {
  ByteVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Lane i of sum + the products of the bytes 4 i to 4 i + 3: a without sign, b with one (held as
// bits). b must not be -128. Exact.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
#if defined(__AVX512VNNI__)
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  // Every second byte of a at a time: pairs of products of which one is 0 fit into 16 bits.
  const __m256i even = _mm256_set1_epi16(0x00ff), ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)a, even), (__m256i)b);
  const __m256i high = _mm256_maddubs_epi16(_mm256_andnot_si256(even, (__m256i)a), (__m256i)b);
  return sum + (IntVec)_mm256_madd_epi16(low, ones) + (IntVec)_mm256_madd_epi16(high, ones);
#else
  for (int i = 0; i < kLanes; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j)
      sum[i] += static_cast<int>(a[j]) * static_cast<std::int8_t>(b[j]);
  return sum;
#endif
}

ANYMAMBA_INLINE IntVec splat_int(std::int32_t x) { return x - IntVec{}; }

ANYMAMBA_INLINE FloatVec as_floats(IntVec v) { return __builtin_convertvector(v, FloatVec); }

}  // namespace anymamba::ANYMAMBA_ISA
