// AVX-512 with F, BW, DQ, VL and VNNI, and with BF16 where the compiler may use it.
#pragma once

#include "simd/x86.h"

namespace anymamba::ANYMAMBA_ISA {

inline constexpr int kLanes = 16;  // floats a vector

// Whether a multiplication and an addition are rounded once.
inline constexpr bool kFusedMultiplyAdd = true;

// Whether products of bfloat16 pairs, with sums in float32, are one instruction.
#if defined(__AVX512BF16__)
inline constexpr bool kMultipliesPairs = true;
#else
inline constexpr bool kMultipliesPairs = false;
#endif

// Tiles: as many accumulators as the 32 registers leave room for beside the operands.
inline constexpr int kGemmTileRows = 14, kQuantizedTileRows = 12;  // times two vectors
inline constexpr int kGemvVectors = 6, kQuantizedGemvVectors = 8;
constexpr int gemv_rows(int vectors) { return vectors == 2 ? 8 : vectors <= 4 ? 6 : 4; }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

ANYMAMBA_INLINE __mmask16 mask_of(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

ANYMAMBA_INLINE FloatVec load_some(const float* p, int count) {
  return (FloatVec)_mm512_maskz_loadu_ps(mask_of(count), p);
}

ANYMAMBA_INLINE void store_some(float* p, FloatVec v, int count) {
  _mm512_mask_storeu_ps(p, mask_of(count), (__m512)v);
}

// Spelled out, because the compiler contracts a * b + c only where the product has no other use.
ANYMAMBA_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

#if defined(__AVX512BF16__)
ANYMAMBA_INLINE FloatVec fma_bf16_pairs(FloatVec a, FloatVec b, FloatVec sum) {
  return (FloatVec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
using generic::fma_bf16_pairs;
#endif

// x where that is not above `high`. NaN stays NaN, which is the instruction's second operand.
ANYMAMBA_INLINE FloatVec at_most(FloatVec x, float high) {
  return (FloatVec)_mm512_min_ps((__m512)splat(high), (__m512)x);
}

ANYMAMBA_INLINE FloatVec at_least(FloatVec x, float low) {
  return (FloatVec)_mm512_max_ps((__m512)splat(low), (__m512)x);
}

// With the intrinsics' masked forms, for GCC 12 takes a detour over two halves when it converts by
// itself, and warns of the unmasked forms' undefined operand.
ANYMAMBA_INLINE FloatVec bf16_to_float32(__m256i halves) {
  return (FloatVec)((UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
}

ANYMAMBA_INLINE FloatVec load_bf16(const std::uint16_t* p) {
  return bf16_to_float32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

ANYMAMBA_INLINE FloatVec load_some_bf16(const std::uint16_t* p, int count) {
  return bf16_to_float32(_mm256_maskz_loadu_epi16(mask_of(count), p));
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
  return (FloatVec)_mm512_maskz_cvtph_ps(
      0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}

// Lane i of sum + the products of the bytes 4 i to 4 i + 3: a without sign, b with one (held as
// bits). b must not be -128. Exact.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

// The lower, and the upper, halves of a and b with their lanes taken in turn.
ANYMAMBA_INLINE FloatVec interleave_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

ANYMAMBA_INLINE FloatVec interleave_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// The instruction leaves 0 of an infinity, so that the power is the infinity then.
ANYMAMBA_INLINE Exp2Parts split_exp2(FloatVec x) {
  const FloatVec fraction =
      (FloatVec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return {x - fraction, fraction};
}

ANYMAMBA_INLINE FloatVec scale_by_power(FloatVec v, FloatVec k) {
  return (FloatVec)_mm512_scalef_ps((__m512)v, (__m512)k);
}

ANYMAMBA_INLINE FloatVec join_exp2(FloatVec, FloatVec p, FloatVec power) {
  return scale_by_power(p, power);
}

ANYMAMBA_INLINE FloatVec nearest_whole(FloatVec x) {
  return (FloatVec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

}  // namespace anymamba::ANYMAMBA_ISA
