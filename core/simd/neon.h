// 64-bit Arm: vectors of four floats in 32 registers. Armv8.0 has fused multiplication and conversions
// of halves. Where the compiler may use them: dot products of bytes (Armv8.2, DotProd), and products
// of small matrices of bytes and of bfloat16 pairs (Armv8.6, I8MM and BF16).
#pragma once

#include <arm_neon.h>

#include "base/integers.h"

#if defined(__ARM_FEATURE_MATMUL_INT8) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define ANYMAMBA_NEON_I8MM 1
#else
#define ANYMAMBA_NEON_I8MM 0
#endif

namespace anymamba::ANYMAMBA_ISA {

// See avx512.h.
inline constexpr int kLanes = 4;
inline constexpr bool kFusedMultiplyAdd = true;
inline constexpr bool kMultipliesPairs = ANYMAMBA_NEON_I8MM;
inline constexpr bool kFactorsFromLanes = true;
inline constexpr bool kIsFasterWithNibbles = false;
inline constexpr bool kSignedBytes = !ANYMAMBA_NEON_I8MM;
inline constexpr int kGemmTileRows = 12, kGemmBlockRows = 240;
#if defined(__ARM_FEATURE_DOTPROD)
inline constexpr int kQuantizedTileRows = 8, kQuantizedTileFours = 4;
#else
inline constexpr int kQuantizedTileRows = 6, kQuantizedTileFours = 1;
#endif
inline constexpr int kGemvVectors = 6, kInOrderVectors = 8, kQuantizedGemvVectors = 8;
inline constexpr int kRowsOfOneVector = 4, kQuantizedRowsOfOneVector = 4;
constexpr int gemv_rows(int vectors) { return vectors == 2 ? 8 : 4; }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::join_exp2, generic::load_some, generic::load_some_bf16, generic::scale_by_power,
    generic::store_some;

ANYMAMBA_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
  return (FloatVec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

ANYMAMBA_INLINE FloatVec fma_of(const float* a, FloatVec b, FloatVec c) { return fma(splat(*a), b, c); }

// The instruction takes a lane of a register: one load serves four numbers.
ANYMAMBA_INLINE FloatVec fma_row(const float* a, int i, FloatVec b, FloatVec c) {
  const float32x4_t sum = (float32x4_t)c, factor = (float32x4_t)b, four = vld1q_f32(a + i / 4 * 4);
  switch (i % 4) {
    case 0: return (FloatVec)vfmaq_laneq_f32(sum, factor, four, 0);
    case 1: return (FloatVec)vfmaq_laneq_f32(sum, factor, four, 1);
    case 2: return (FloatVec)vfmaq_laneq_f32(sum, factor, four, 2);
    default: return (FloatVec)vfmaq_laneq_f32(sum, factor, four, 3);
  }
}

#if ANYMAMBA_NEON_I8MM
ANYMAMBA_INLINE FloatVec fma_bf16_pairs(const float* a, FloatVec b, FloatVec sum) {
  return (FloatVec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)splat(*a));
}

ANYMAMBA_INLINE FloatVec fma_row_bf16_pairs(const float* a, int i, FloatVec b, FloatVec sum) {
  const float32x4_t before = (float32x4_t)sum;
  const bfloat16x8_t factor = (bfloat16x8_t)b, four = (bfloat16x8_t)vld1q_f32(a + i / 4 * 4);
  switch (i % 4) {
    case 0: return (FloatVec)vbfdotq_laneq_f32(before, factor, four, 0);
    case 1: return (FloatVec)vbfdotq_laneq_f32(before, factor, four, 1);
    case 2: return (FloatVec)vbfdotq_laneq_f32(before, factor, four, 2);
    default: return (FloatVec)vbfdotq_laneq_f32(before, factor, four, 3);
  }
}
#endif

ANYMAMBA_INLINE FloatVec at_most(FloatVec x, float high) {
  return (FloatVec)vminq_f32((float32x4_t)x, vdupq_n_f32(high));
}

ANYMAMBA_INLINE FloatVec at_least(FloatVec x, float low) {
  return (FloatVec)vmaxq_f32((float32x4_t)x, vdupq_n_f32(low));
}

ANYMAMBA_INLINE FloatVec load_bf16(const std::uint16_t* p) {
  return (FloatVec)vshll_n_u16(vld1_u16(p), 16);
}

ANYMAMBA_INLINE float from_f16(std::uint16_t h) {
  __fp16 half;
  __builtin_memcpy(&half, &h, sizeof half);
  return static_cast<float>(half);
}

ANYMAMBA_INLINE std::uint16_t to_f16(float x) {
  const __fp16 half = static_cast<__fp16>(x);
  std::uint16_t h;
  __builtin_memcpy(&h, &half, sizeof h);
  return h;
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
  return (FloatVec)vcvt_f32_f16((float16x4_t)vld1_u16(p));
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
  vst1_u16(p, (uint16x4_t)vcvt_f16_f32((float32x4_t)v));
}

// The dot products take the weights' bytes with a sign, but for those of I8MM.
#if ANYMAMBA_NEON_I8MM
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)vusdotq_s32((int32x4_t)sum, (uint8x16_t)a, (int8x16_t)b);
}
#elif defined(__ARM_FEATURE_DOTPROD)
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
}
#else
// Sums of two products fit into 16 bits, for b is not -128.
ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  const int8x16_t x = (int8x16_t)a, y = (int8x16_t)b;
  const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y));
  return (IntVec)vpadalq_s16((int32x4_t)sum, pairs);
}
#endif

ANYMAMBA_INLINE IntVec dot4_of_nibbles(IntVec sum, ByteVec a, ByteVec b) { return dot4(sum, a, b); }

#if defined(__ARM_FEATURE_DOTPROD)
// As fma_row: the instruction takes a lane of four bytes.
#if ANYMAMBA_NEON_I8MM
#define ANYMAMBA_DOT_LANE(lane) (IntVec) vusdotq_laneq_s32((int32x4_t)sum, (uint8x16_t)a, sixteen, lane)
#else
#define ANYMAMBA_DOT_LANE(lane) (IntVec) vdotq_laneq_s32((int32x4_t)sum, (int8x16_t)a, sixteen, lane)
#endif
template <int bits>
ANYMAMBA_INLINE IntVec dot4_row(IntVec sum, ByteVec a, const std::int8_t* b, int i) {
  const int8x16_t sixteen = vld1q_s8(b + i / 4 * 16);
  switch (i % 4) {
    case 0: return ANYMAMBA_DOT_LANE(0);
    case 1: return ANYMAMBA_DOT_LANE(1);
    case 2: return ANYMAMBA_DOT_LANE(2);
    default: return ANYMAMBA_DOT_LANE(3);
  }
}
#undef ANYMAMBA_DOT_LANE
#endif

#if ANYMAMBA_NEON_I8MM
// Entry (i, j) of 2 x 2 sums += row i of 2 x 8 bytes a, without sign, times row j of 2 x 8 bytes b.
ANYMAMBA_INLINE IntVec multiply_matrices(IntVec sum, ByteVec a, ByteVec b) {
  return (IntVec)vusmmlaq_s32((int32x4_t)sum, (uint8x16_t)a, (int8x16_t)b);
}
#endif

ANYMAMBA_INLINE IntVec sums_of_parts(const IntVec* parts) {
  const auto pair = [=](int i) { return vpaddq_s32((int32x4_t)parts[i], (int32x4_t)parts[i + 1]); };
  return (IntVec)vpaddq_s32(pair(0), pair(2));
}

ANYMAMBA_INLINE FloatVec nearest_whole(FloatVec x) { return (FloatVec)vrndnq_f32((float32x4_t)x); }

ANYMAMBA_INLINE Exp2Parts split_exp2(FloatVec x) { return generic::split_exp2(at_most(x, 128.0f)); }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/four_lanes.h"
#include "simd/composed.h"

namespace anymamba::ANYMAMBA_ISA {

#if !ANYMAMBA_NEON_I8MM
using generic::fma_bf16_pairs, generic::fma_row_bf16_pairs;
#endif
using generic::load_twice, generic::PartVec, generic::part_of;
#if !defined(__ARM_FEATURE_DOTPROD)
using generic::dot4_row;
#endif

}  // namespace anymamba::ANYMAMBA_ISA
