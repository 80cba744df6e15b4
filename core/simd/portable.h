// Any processor: vectors of four floats and nothing but the compiler's extensions.
#pragma once

namespace anymamba::ANYMAMBA_ISA {

// See avx512.h.
inline constexpr int kLanes = 4;
inline constexpr bool kFusedMultiplyAdd = false, kMultipliesPairs = false;
inline constexpr bool kFactorsFromLanes = false;
inline constexpr bool kIsFasterWithNibbles = false;
inline constexpr bool kSignedBytes = false;
inline constexpr int kGemmTileRows = 4, kGemmBlockRows = 160, kQuantizedTileRows = 2, kQuantizedTileFours = 1;
inline constexpr int kGemvVectors = 4, kInOrderVectors = 4, kQuantizedGemvVectors = 4;
inline constexpr int kRowsOfOneVector = 1, kQuantizedRowsOfOneVector = 1;
constexpr int gemv_rows(int vectors) { return vectors == 2 ? 4 : 2; }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/generic.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::fma_bf16_pairs, generic::join_exp2, generic::load_bf16, generic::load_some,
    generic::load_some_bf16, generic::nearest_whole, generic::scale_by_power, generic::store_some;

ANYMAMBA_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return a * b + c; }

ANYMAMBA_INLINE FloatVec fma_of(const float* a, FloatVec b, FloatVec c) {
  return fma(splat(*a), b, c);
}

ANYMAMBA_INLINE FloatVec at_most(FloatVec x, float high) {
  return x > splat(high) ? splat(high) : x;
}

ANYMAMBA_INLINE FloatVec at_least(FloatVec x, float low) { return x < splat(low) ? splat(low) : x; }

// IEEE half precision in integer arithmetic.
ANYMAMBA_INLINE float from_f16(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  std::uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    float x = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    __builtin_memcpy(&bits, &x, 4);
    bits |= sign;
  }
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

ANYMAMBA_INLINE std::uint16_t to_f16(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u)
    return static_cast<std::uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x47800000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // a subnormal half: let float addition do the rounding
    float magnitude;
    __builtin_memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::uint32_t rounded;
    __builtin_memcpy(&rounded, &magnitude, 4);
    return static_cast<std::uint16_t>(sign | (rounded - 0x3f000000u));
  }
  const std::uint32_t rounded = bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | (rounded >> 13));
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
  FloatVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(p[i]);
  return v;
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
}

ANYMAMBA_INLINE IntVec dot4(IntVec sum, ByteVec a, ByteVec b) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 4 * i; j < 4 * i + 4; ++j)
      sum[i] += static_cast<int>(a[j]) * static_cast<std::int8_t>(b[j]);
  return sum;
}

// The same for a from 0 to 15.
ANYMAMBA_INLINE IntVec dot4_of_nibbles(IntVec sum, ByteVec a, ByteVec b) { return dot4(sum, a, b); }

ANYMAMBA_INLINE Exp2Parts split_exp2(FloatVec x) { return generic::split_exp2(at_most(x, 128.0f)); }

}  // namespace anymamba::ANYMAMBA_ISA

#include "simd/four_lanes.h"
#include "simd/composed.h"

namespace anymamba::ANYMAMBA_ISA {

using generic::dot4_row, generic::load_twice, generic::fma_row, generic::fma_row_bf16_pairs,
    generic::PartVec, generic::part_of, generic::sums_of_parts;

}  // namespace anymamba::ANYMAMBA_ISA
