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

// Whether dot4 takes weights with a sign, and whether numbers of 4 bits make it faster.
inline constexpr bool kSignedBytes = false, kIsFasterWithNibbles = false;

// Whether an operation takes one of four neighbours from a register, which it is best loaded to.
inline constexpr bool kFactorsFromLanes = false;

// Tiles: as many accumulators as the 32 registers leave room for beside the operands.
inline constexpr int kGemmTileRows = 14, kQuantizedTileRows = 12;  // times two vectors
inline constexpr int kGemmBlockRows = 560;       // of the left operand, which stay in the second cache
inline constexpr int kQuantizedTileFours = 1;    // of k in one turn of the loop
inline constexpr int kGemvVectors = 6, kInOrderVectors = 8, kQuantizedGemvVectors = 8;
// Weight rows that go beside each other for a single vector: as few as keep the arithmetic busy.
inline constexpr int kRowsOfOneVector = 1, kQuantizedRowsOfOneVector = 2;
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

// a b + c, where the instruction itself reads the number a from memory. The compiler would broadcast
// it to a register first, for all its uses: more instructions, which then are the limit.
ANYMAMBA_INLINE FloatVec fma_of(const float* a, FloatVec b, FloatVec c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}

#if defined(__AVX512BF16__)
ANYMAMBA_INLINE FloatVec fma_bf16_pairs(const float* a, FloatVec b, FloatVec sum) {
  asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  return sum;
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

// Half a vector, in its lower and its upper half.
ANYMAMBA_INLINE ByteVec load_twice(const void* p) {
  return (ByteVec)_mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}

// Lane i of sum + the products of the bytes 4 i to 4 i + 3: a with a sign if kSignedBytes, b always. b
// must not be -128. Exact.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}

// The same for a from 0 to 15.
ANYMAMBA_INLINE IntVec dot4_of_nibbles(IntVec sum, ByteVec a, ByteVec b) { return dot4(sum, a, b); }

// Numbers whose sum is that of a vector's lanes. Half a vector is stored in half the time, and two ports
// shuffle halves where one shuffles whole vectors.
typedef std::int32_t PartVec __attribute__((vector_size(kBytes / 2)));
ANYMAMBA_INLINE PartVec part_of(IntVec v) {
  return (PartVec)_mm256_add_epi32(_mm512_castsi512_si256((__m512i)v), _mm512_extracti64x4_epi64((__m512i)v, 1));
}

// Lane i is the sum of parts[i]. Exact.
ANYMAMBA_INLINE IntVec sums_of_parts(const PartVec* parts) {
  const auto row = [=](int i) { return (__m256i)parts[i]; };
  const auto four = [=](int i) {  // in each quarter the parts of rows i to i + 3
    const __m256i a = row(i), b = row(i + 1), c = row(i + 2), d = row(i + 3);
    const __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    const __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
  };
  const auto eight = [=](int i) {
    const __m256i low = four(i), high = four(i + 4);
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20),
                            _mm256_permute2x128_si256(low, high, 0x31));
  };
  return (IntVec)_mm512_inserti64x4(_mm512_castsi256_si512(eight(0)), eight(8), 1);
}

// The lower, and the upper, halves of a and b with their lanes taken in turn.
ANYMAMBA_INLINE FloatVec interleave_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

ANYMAMBA_INLINE FloatVec interleave_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Of each four lanes of a and of b: the first two of both in turn, the last two in turn; the first two
// of a and then those of b, the last two.
ANYMAMBA_INLINE FloatVec zip_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
}

ANYMAMBA_INLINE FloatVec zip_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
}

ANYMAMBA_INLINE FloatVec join_low(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
}

ANYMAMBA_INLINE FloatVec join_high(FloatVec a, FloatVec b) {
  return __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}

// Four words of 32 bits each from places `stride` bytes apart.
ANYMAMBA_INLINE FloatVec load_fours(const char* p, std::int64_t stride) {
  const auto four = [](const char* from) { return _mm_loadu_ps(reinterpret_cast<const float*>(from)); };
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four(p)), four(p + stride), 1);
  const __m256 high =
      _mm256_insertf128_ps(_mm256_castps128_ps256(four(p + 2 * stride)), four(p + 3 * stride), 1);
  return (FloatVec)_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
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

#include "simd/composed.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::dot4_row, generic::fma_row, generic::fma_row_bf16_pairs;

}  // namespace anymamba::ANYMAMBA_ISA
