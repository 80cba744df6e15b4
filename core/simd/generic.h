// What every instruction set has through the compiler's vector extensions. Namespace `generic` holds
// forms that an instruction set's own header takes over with `using`, or replaces by instructions.
//
// Included by that header, which defines kLanes first.
#pragma once

#include <cstdint>
#include <cstring>

#include "base/integers.h"
#include "base/types.h"

namespace anymamba::ANYMAMBA_ISA {

inline constexpr int kBytes = 4 * kLanes;  // of a vector

typedef float FloatVec __attribute__((vector_size(kBytes)));
typedef std::int32_t IntVec __attribute__((vector_size(kBytes)));
typedef std::uint32_t UintVec __attribute__((vector_size(kBytes)));
typedef std::uint8_t ByteVec __attribute__((vector_size(kBytes)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kBytes / 2)));

ANYMAMBA_INLINE FloatVec splat(float x) { return x - FloatVec{}; }

ANYMAMBA_INLINE IntVec splat_int(std::int32_t x) { return x - IntVec{}; }

ANYMAMBA_INLINE FloatVec as_floats(IntVec v) { return __builtin_convertvector(v, FloatVec); }

ANYMAMBA_INLINE FloatVec load(const float* p) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ANYMAMBA_INLINE ByteVec load_bytes(const void* p) {
  ByteVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ANYMAMBA_INLINE void store(float* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof v); }

ANYMAMBA_INLINE FloatVec select(IntVec mask, FloatVec yes, FloatVec no) { return mask ? yes : no; }

ANYMAMBA_INLINE float sum(FloatVec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// bfloat16 is the upper half of a float32; rounding is to nearest, ties to even, NaN stays NaN.
ANYMAMBA_INLINE float from_bf16(std::uint16_t h) {
  const std::uint32_t bits = static_cast<std::uint32_t>(h) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

ANYMAMBA_INLINE std::uint16_t to_bf16(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

ANYMAMBA_INLINE void store_bf16(std::uint16_t* p, FloatVec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40u;
  const HalfVec h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, HalfVec);
  __builtin_memcpy(p, &h, sizeof h);
}

// The first and the second of two bfloat16 neighbours that each lane holds as bits.
ANYMAMBA_INLINE FloatVec first_of_pairs(FloatVec v) { return (FloatVec)((UintVec)v << 16); }
ANYMAMBA_INLINE FloatVec second_of_pairs(FloatVec v) { return (FloatVec)((UintVec)v & 0xffff0000u); }

// Adding and subtracting 1.5 * 2^23 rounds to an integer, which the low bits of the sum hold.
inline constexpr float kRounder = 12582912.0f;

// x = power + fraction for a whole power and |fraction| <= 1/2. `power` is in a form of its own for
// each instruction set.
struct Exp2Parts {
  FloatVec power, fraction;
};

namespace generic {

// The first `count` floats, zeros behind them. All of them are most common; for fewer, the compiler calls a
// function.
ANYMAMBA_INLINE FloatVec load_some(const float* p, int count) {
  if (count == kLanes) return load(p);
  FloatVec v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * 4);
  return v;
}

ANYMAMBA_INLINE void store_some(float* p, FloatVec v, int count) {
  if (count == kLanes) return store(p, v);
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * 4);
}

ANYMAMBA_INLINE FloatVec load_bf16(const std::uint16_t* p) {
  HalfVec h;
  __builtin_memcpy(&h, p, sizeof h);
  const UintVec bits = __builtin_convertvector(h, UintVec) << 16;
  return (FloatVec)bits;
}

// The first `count` numbers, zeros behind them.
ANYMAMBA_INLINE FloatVec load_some_bf16(const std::uint16_t* p, int count) {
  std::uint16_t some[kLanes] = {};
  __builtin_memcpy(some, p, static_cast<std::size_t>(count) * 2);
  return load_bf16(some);
}

// sum + the products of two bfloat16 neighbours a lane, held as the bits of a float; a is the same in
// all lanes.
ANYMAMBA_INLINE FloatVec fma_bf16_pairs(const float* a, FloatVec b, FloatVec sum) {
  const FloatVec x = splat(*a);
  return sum + first_of_pairs(x) * first_of_pairs(b) + second_of_pairs(x) * second_of_pairs(b);
}

// Of x no larger than 128. The low bits of `power` are the whole number.
ANYMAMBA_INLINE Exp2Parts split_exp2(FloatVec x) {
  const FloatVec shifted = x + splat(kRounder);
  return {shifted, x - (shifted - splat(kRounder))};
}

// p * 2^power, for p = 2^fraction of x.
ANYMAMBA_INLINE FloatVec join_exp2(FloatVec x, FloatVec p, FloatVec power) {
  // From -126 to 128 the exponent's field neither runs under nor over: at 128, p is at most 1.
  const FloatVec scaled = (FloatVec)((UintVec)p + ((UintVec)power << 23));
  // By bits, which is faster than to select: 0 below, and NaN as it came.
  const IntVec in_range = x >= splat(-126.0f), is_nan = x != x;
  return (FloatVec)(((IntVec)scaled & in_range) | ((IntVec)x & is_nan));
}

ANYMAMBA_INLINE FloatVec nearest_whole(FloatVec x) {
  return (x + splat(kRounder)) - splat(kRounder);
}

// v * 2^k for whole k within +-250, subnormal and infinite results included.
ANYMAMBA_INLINE FloatVec scale_by_power(FloatVec v, FloatVec k) {
  const IntVec whole = __builtin_convertvector(k, IntVec);
  const IntVec half = whole >> 1;
  return v * (FloatVec)((half + 127) << 23) * (FloatVec)((whole - half + 127) << 23);
}

}  // namespace generic

}  // namespace anymamba::ANYMAMBA_ISA
