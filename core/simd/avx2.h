// AVX2 with FMA and F16C.
#pragma once

#include "simd/x86.h"

namespace anymamba::ANYMAMBA_ISA {

// See avx512.h. Here there are 16 registers.
inline constexpr int kLanes = 8;
inline constexpr bool kFusedMultiplyAdd = true, kMultipliesPairs = false;
inline constexpr int kGemmTileRows = 6, kQuantizedTileRows = 3;
inline constexpr int kGemvVectors = 4, kInOrderVectors = 4, kQuantizedGemvVectors = 4;
constexpr int gemv_rows(int vectors) { return vectors == 2 ? 4 : 2; }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::fma_bf16_pairs, generic::join_exp2, generic::load_bf16, generic::load_some,
    generic::load_some_bf16, generic::nearest_whole, generic::scale_by_power, generic::store_some;

ANYMAMBA_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

ANYMAMBA_INLINE FloatVec fma_of(const float* a, FloatVec b, FloatVec c) {
  return fma(splat(*a), b, c);
}

// NaN is the instruction's second operand.
ANYMAMBA_INLINE FloatVec at_most(FloatVec x, float high) {
  return (FloatVec)_mm256_min_ps((__m256)splat(high), (__m256)x);
}

ANYMAMBA_INLINE FloatVec at_least(FloatVec x, float low) {
  return (FloatVec)_mm256_max_ps((__m256)splat(low), (__m256)x);
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

// Every second byte of a at a time: pairs of products of which one is 0 fit into 16 bits.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  const __m256i even = _mm256_set1_epi16(0x00ff), ones = _mm256_set1_epi16(1);
  const __m256i low = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)a, even), (__m256i)b);
  const __m256i high = _mm256_maddubs_epi16(_mm256_andnot_si256(even, (__m256i)a), (__m256i)b);
  return sum + (IntVec)_mm256_madd_epi16(low, ones) + (IntVec)_mm256_madd_epi16(high, ones);
}

ANYMAMBA_INLINE FloatVec interleave_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}

ANYMAMBA_INLINE FloatVec interleave_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

ANYMAMBA_INLINE FloatVec zip_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
}

ANYMAMBA_INLINE FloatVec zip_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
}

ANYMAMBA_INLINE FloatVec join_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
}

ANYMAMBA_INLINE FloatVec join_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
}

ANYMAMBA_INLINE FloatVec load_fours(const char* p, std::int64_t stride) {
  const auto four = [](const char* from) { return _mm_loadu_ps(reinterpret_cast<const float*>(from)); };
  return (FloatVec)_mm256_insertf128_ps(_mm256_castps128_ps256(four(p)), four(p + stride), 1);
}

ANYMAMBA_INLINE Exp2Parts split_exp2(FloatVec x) { return generic::split_exp2(at_most(x, 128.0f)); }

}  // namespace anymamba::ANYMAMBA_ISA
