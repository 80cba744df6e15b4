// AVX2 with FMA and F16C, and with AVX-VNNI where the compiler may use it.
#pragma once

#include "simd/x86.h"

// Processors with AVX-512 may have the instruction in that encoding alone: so do tests run there.
#if defined(__AVXVNNI__) || defined(ANYMAMBA_EVEX_VNNI)
#define ANYMAMBA_AVX_VNNI 1
#else
#define ANYMAMBA_AVX_VNNI 0
#endif

namespace anymamba::ANYMAMBA_ISA {

// See avx512.h. Here there are 16 registers.
inline constexpr int kLanes = 8;
inline constexpr bool kFusedMultiplyAdd = true, kMultipliesPairs = false;
inline constexpr int kGemmTileRows = 6, kGemmBlockRows = 240, kQuantizedTileFours = 1;
inline constexpr bool kFactorsFromLanes = false;
#if ANYMAMBA_AVX_VNNI
inline constexpr bool kSignedBytes = false, kIsFasterWithNibbles = false;
inline constexpr int kQuantizedTileRows = 6;
#else
inline constexpr bool kSignedBytes = true, kIsFasterWithNibbles = true;
inline constexpr int kQuantizedTileRows = 3;
#endif
inline constexpr int kGemvVectors = 4, kInOrderVectors = 4, kQuantizedGemvVectors = 4;
inline constexpr int kRowsOfOneVector = 2, kQuantizedRowsOfOneVector = 2;
constexpr int gemv_rows(int vectors) { return vectors == 2 ? 4 : 2; }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::fma_bf16_pairs, generic::join_exp2, generic::load_some,
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

// GCC 12 takes a detour over two halves when it converts by itself.
ANYMAMBA_INLINE FloatVec load_bf16(const std::uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (FloatVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}

ANYMAMBA_INLINE ByteVec load_twice(const void* p) {
  return (ByteVec)_mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

#if defined(ANYMAMBA_EVEX_VNNI)
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  asm("%{evex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "xm"(b));
  return sum;
}
#elif ANYMAMBA_AVX_VNNI
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
}
#endif

#if ANYMAMBA_AVX_VNNI
ANYMAMBA_INLINE IntVec dot4_of_nibbles(IntVec sum, ByteVec a, ByteVec b) { return dot4(sum, a, b); }
#else
// The instruction takes a without sign, which goes over to b. Sums of two products fit into 16 bits,
// for b is not -128.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)a), _mm256_sign_epi8((__m256i)b, (__m256i)a));
  return sum + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

ANYMAMBA_INLINE IntVec dot4_of_nibbles(IntVec sum, ByteVec a, ByteVec b) {
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)a, (__m256i)b);
  return sum + (IntVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

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

#include "simd/composed.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::dot4_row, generic::fma_row, generic::fma_row_bf16_pairs,
    generic::PartVec, generic::part_of, generic::sums_of_parts;

}  // namespace anymamba::ANYMAMBA_ISA
