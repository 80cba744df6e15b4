// Vectors of float for one instruction set, through the compiler's vector extensions.
//
// This header is compiled once for each instruction set (ANYMAMBA_ISA is avx512, avx2 or
// portable), each in a namespace of its own, so that no inline function built for one is ever
// linked into another. Kernels must not use templates of the standard library for that reason.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12 warns of the deliberately undefined registers inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "base/types.h"

#ifndef ANYMAMBA_ISA
#error "compile with -DANYMAMBA_ISA=avx512, avx2 or portable"
#endif

namespace anymamba::ANYMAMBA_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;  // floats a vector
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float FloatVec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

#define ANYMAMBA_INLINE static inline __attribute__((always_inline))

ANYMAMBA_INLINE FloatVec splat(float x) { return x - FloatVec{}; }

ANYMAMBA_INLINE FloatVec load(const float* p) {
  FloatVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

ANYMAMBA_INLINE void store(float* p, FloatVec v) { __builtin_memcpy(p, &v, sizeof v); }

// The first `count` floats, zeros behind them.
ANYMAMBA_INLINE FloatVec load_some(const float* p, int count) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
#else
  FloatVec v{};
  __builtin_memcpy(&v, p, static_cast<std::size_t>(count) * 4);
  return v;
#endif
}

ANYMAMBA_INLINE void store_some(float* p, FloatVec v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
#else
  __builtin_memcpy(p, &v, static_cast<std::size_t>(count) * 4);
#endif
}

// One rounding where the instruction set has it. Spelled out, because the compiler contracts
// a * b + c only where the product has no other use.
ANYMAMBA_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

ANYMAMBA_INLINE FloatVec select(IntVec mask, FloatVec yes, FloatVec no) { return mask ? yes : no; }

// x where that is not above `high`. NaN stays NaN, which is the instruction's second operand.
ANYMAMBA_INLINE FloatVec at_most(FloatVec x, float high) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_min_ps((__m512)splat(high), (__m512)x);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_min_ps((__m256)splat(high), (__m256)x);
#else
  return x > splat(high) ? splat(high) : x;
#endif
}

ANYMAMBA_INLINE FloatVec at_least(FloatVec x, float low) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_max_ps((__m512)splat(low), (__m512)x);
#elif defined(__AVX2__)
  return (FloatVec)_mm256_max_ps((__m256)splat(low), (__m256)x);
#else
  return x < splat(low) ? splat(low) : x;
#endif
}

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

// IEEE half precision in integer arithmetic, for machines without conversion instructions.
ANYMAMBA_INLINE float from_f16_bits(std::uint16_t h) {
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

ANYMAMBA_INLINE std::uint16_t to_f16_bits(float x) {
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

#if defined(__AVX2__)
ANYMAMBA_INLINE float from_f16(std::uint16_t h) { return _cvtsh_ss(h); }
ANYMAMBA_INLINE std::uint16_t to_f16(float x) {
  return static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
#else
ANYMAMBA_INLINE float from_f16(std::uint16_t h) { return from_f16_bits(h); }
ANYMAMBA_INLINE std::uint16_t to_f16(float x) { return to_f16_bits(x); }
#endif

// With the intrinsics' masked forms, for GCC 12 takes a detour over two halves when it widens by
// itself, and warns of the unmasked forms' undefined operand.
ANYMAMBA_INLINE FloatVec load_bf16(const std::uint16_t* p) {
#if defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatVec)((UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
#else
  HalfVec h;
  __builtin_memcpy(&h, p, sizeof h);
  const UintVec bits = __builtin_convertvector(h, UintVec) << 16;
  return (FloatVec)bits;
#endif
}

// The first `count` numbers, zeros behind them.
ANYMAMBA_INLINE FloatVec load_some_bf16(const std::uint16_t* p, int count) {
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1u);
  const __m256i halves = _mm256_maskz_loadu_epi16(mask, p);
  return (FloatVec)((UintVec)_mm512_maskz_cvtepu16_epi32(0xffff, halves) << 16);
#else
  std::uint16_t some[kLanes] = {};
  __builtin_memcpy(some, p, static_cast<std::size_t>(count) * 2);
  return load_bf16(some);
#endif
}

ANYMAMBA_INLINE void store_bf16(std::uint16_t* p, FloatVec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec quiet = (bits >> 16) | 0x40u;
  const HalfVec h = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, HalfVec);
  __builtin_memcpy(p, &h, sizeof h);
}

ANYMAMBA_INLINE FloatVec load_f16(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  FloatVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = from_f16(p[i]);
  return v;
#endif
}

ANYMAMBA_INLINE void store_f16(std::uint16_t* p, FloatVec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_f16(v[i]);
#endif
}

// One number of a tensor, as float.
ANYMAMBA_INLINE float read(const void* p, DType type, std::int64_t index) {
  switch (type) {
    case DType::f32: return static_cast<const float*>(p)[index];
    case DType::bf16: return from_bf16(static_cast<const std::uint16_t*>(p)[index]);
    case DType::f16: break;
  }
  return from_f16(static_cast<const std::uint16_t*>(p)[index]);
}

ANYMAMBA_INLINE void write(void* p, DType type, std::int64_t index, float x) {
  switch (type) {
    case DType::f32: static_cast<float*>(p)[index] = x; return;
    case DType::bf16: static_cast<std::uint16_t*>(p)[index] = to_bf16(x); return;
    case DType::f16: break;
  }
  static_cast<std::uint16_t*>(p)[index] = to_f16(x);
}

// kLanes neighbouring numbers as floats.
ANYMAMBA_INLINE FloatVec read_vector(const void* p, DType type, std::int64_t index) {
  switch (type) {
    case DType::f32: return load(static_cast<const float*>(p) + index);
    case DType::bf16: return load_bf16(static_cast<const std::uint16_t*>(p) + index);
    case DType::f16: break;
  }
  return load_f16(static_cast<const std::uint16_t*>(p) + index);
}

ANYMAMBA_INLINE void write_vector(void* p, DType type, std::int64_t index, FloatVec v) {
  switch (type) {
    case DType::f32: store(static_cast<float*>(p) + index, v); return;
    case DType::bf16: store_bf16(static_cast<std::uint16_t*>(p) + index, v); return;
    case DType::f16: break;
  }
  store_f16(static_cast<std::uint16_t*>(p) + index, v);
}

// Calls f with the type as a constant, f(Constant<DType, type>{}), so that loops inside f know it.
template <class T, T V>
struct Constant {
  static constexpr T value = V;
};

template <class Function>
ANYMAMBA_INLINE void with_type(DType type, const Function& f) {
  switch (type) {
    case DType::f32: f(Constant<DType, DType::f32>{}); return;
    case DType::bf16: f(Constant<DType, DType::bf16>{}); return;
    case DType::f16: f(Constant<DType, DType::f16>{}); return;
  }
}

// Adding and subtracting 1.5 * 2^23 rounds to an integer, which the low bits of the sum hold.
inline constexpr float kRounder = 12582912.0f;

// 2^x: x = k + g with |g| <= 1/2, a polynomial for 2^g, and k added to the exponent. Nearest, not
// floor, so that a decay just below 1 comes from a small g and is rounded only once: over a long
// sequence its error counts as often as it is applied.
// NaN stays NaN, +inf gives +inf, -inf gives 0. Without AVX-512, results below 2^-126 are 0.
ANYMAMBA_INLINE FloatVec exp2_of(FloatVec x) {
#if defined(__AVX512F__)
  // The instruction leaves 0 of an infinity, so that k is the infinity then.
  const FloatVec g = (FloatVec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const FloatVec k = x - g;
#else
  const FloatVec c = at_most(x, 128.0f);
  const FloatVec shifted = c + splat(kRounder);
  const FloatVec g = c - (shifted - splat(kRounder));
#endif
  FloatVec p = splat(0.00015353366f);
  p = fma(p, g, splat(0.0013398874f));
  p = fma(p, g, splat(0.009618437f));
  p = fma(p, g, splat(0.055503324f));
  p = fma(p, g, splat(0.24022648f));
  p = fma(p, g, splat(0.6931472f));
  p = fma(p, g, splat(1.0f));
#if defined(__AVX512F__)
  return (FloatVec)_mm512_scalef_ps((__m512)p, (__m512)k);
#else
  // From -126 to 128 the exponent's field neither runs under nor over: at 128, p is at most 1.
  const FloatVec scaled = (FloatVec)((UintVec)p + ((UintVec)shifted << 23));
  // By bits, which is faster than to select: 0 below, and NaN as it came.
  const IntVec in_range = x >= splat(-126.0f), is_nan = x != x;
  return (FloatVec)(((IntVec)scaled & in_range) | ((IntVec)x & is_nan));
#endif
}

// v * 2^k for whole k within +-250, subnormal and infinite results included.
ANYMAMBA_INLINE FloatVec scale_of(FloatVec v, FloatVec k) {
#if defined(__AVX512F__)
  return (FloatVec)_mm512_scalef_ps((__m512)v, (__m512)k);
#else
  const IntVec whole = __builtin_convertvector(k, IntVec);
  const IntVec half = whole >> 1;
  return v * (FloatVec)((half + 127) << 23) * (FloatVec)((whole - half + 127) << 23);
#endif
}

// e^x = p * 2^k, for |x| up to 120 or so.
struct Power {
  FloatVec p, k;
};

ANYMAMBA_INLINE Power power_of(FloatVec x) {
  const FloatVec t = x * splat(1.44269504088896341f);
#if defined(__AVX512F__)
  const FloatVec k = (FloatVec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const FloatVec k = (t + splat(kRounder)) - splat(kRounder);
#endif
  // log(2) in two parts: the first has 10 bits, so that its product with k is exact.
  const FloatVec f = fma(-k, splat(-2.12194440e-4f), fma(-k, splat(0.693359375f), x));
  FloatVec p = splat(0.001381461f);
  p = fma(p, f, splat(0.00836871f));
  p = fma(p, f, splat(0.04166839f));
  p = fma(p, f, splat(0.16666521f));
  p = fma(p, f, splat(0.49999994f));
  p = fma(p, f, splat(1.0f));
  p = fma(p, f, splat(1.0f));
  return {p, k};
}

// x, not below `low` and not above `high`. NaN stays NaN.
ANYMAMBA_INLINE FloatVec clamp(FloatVec x, float low, float high) {
  return at_most(at_least(x, low), high);
}

inline constexpr float kLog2e = 1.44269504088896341f;

// e^x over the whole range, subnormal results included.
ANYMAMBA_INLINE FloatVec exp_of(FloatVec x) {
  const Power e = power_of(clamp(x, -110.0f, 90.0f));
  return scale_of(e.p, e.k);
}

// Below -87 its subnormal results are 0.
ANYMAMBA_INLINE FloatVec sigmoid_of(FloatVec x) { return splat(1.0f) / (splat(1.0f) + exp_of(-x)); }

// x / (1 + e^-x). With e^-x = p 2^k this is x / (2^-k + p) * 2^-k, where nothing overflows on the
// way to results near 1e-37. Goes to -0 at -inf.
ANYMAMBA_INLINE FloatVec silu_of(FloatVec x) {
  const FloatVec c = at_least(x, -120.0f);
  const Power e = power_of(-at_most(c, 80.0f));
  return scale_of(c / (scale_of(splat(1.0f), -e.k) + e.p), -e.k);
}

// The derivative of silu, s (1 + x (1 - s)) with s = sigmoid(x); 1 - s without cancellation.
ANYMAMBA_INLINE FloatVec silu_slope_of(FloatVec x) {
  const FloatVec c = clamp(x, -120.0f, 120.0f);
  const FloatVec e = exp_of(c < FloatVec{} ? c : -c);
  const FloatVec large = splat(1.0f) / (splat(1.0f) + e), small = e * large;
  const IntVec negative = c < FloatVec{};
  return select(negative, small, large) * fma(c, select(negative, large, small), splat(1.0f));
}

// log(1 + y) for y in [0, 1]: 2 s + s^3 P(s^2) with s = y / (2 + y). As 2 s is y - s y, the error
// of s enters only through the smaller part.
ANYMAMBA_INLINE FloatVec log1p_of(FloatVec y) {
  const FloatVec s = y / (splat(2.0f) + y), q = s * s;
  FloatVec p = splat(0.2802446f);
  p = fma(p, q, splat(0.27999142f));
  p = fma(p, q, splat(0.400217f));
  p = fma(p, q, splat(0.6666641f));
  return fma(-s, fma(-q, p, y), y);
}

// log(1 + e^x) = max(x, 0) + log1p(e^-|x|).
ANYMAMBA_INLINE FloatVec softplus_of(FloatVec x) {
  const FloatVec magnitude = x < FloatVec{} ? -x : x;
  return log1p_of(exp_of(-magnitude)) + (x > FloatVec{} ? x : FloatVec{});
}

}  // namespace anymamba::ANYMAMBA_ISA
