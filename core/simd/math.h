// The elementary functions, the same for every instruction set.
#pragma once

#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

// 2^x: a polynomial for 2^fraction, and the whole power added to the exponent. Nearest, not
// floor, so that a decay just below 1 comes from a small g and is rounded only once: over a long
// sequence its error counts as often as it is applied.
// NaN stays NaN, +inf gives +inf, -inf gives 0. Without AVX-512, results below 2^-126 are 0.
ANYMAMBA_INLINE FloatVec exp2_of(FloatVec x) {
  const auto [power, g] = split_exp2(x);
  FloatVec p = splat(0.00015353366f);
  p = fma(p, g, splat(0.0013398874f));
  p = fma(p, g, splat(0.009618437f));
  p = fma(p, g, splat(0.055503324f));
  p = fma(p, g, splat(0.24022648f));
  p = fma(p, g, splat(0.6931472f));
  p = fma(p, g, splat(1.0f));
  return join_exp2(x, p, power);
}

// e^x = p * 2^k, for |x| up to 120 or so.
struct Power {
  FloatVec p, k;
};

ANYMAMBA_INLINE Power power_of(FloatVec x) {
  const FloatVec t = x * splat(1.44269504088896341f);
  const FloatVec k = nearest_whole(t);
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
  return scale_by_power(e.p, e.k);
}

// Below -87 its subnormal results are 0.
ANYMAMBA_INLINE FloatVec sigmoid_of(FloatVec x) { return splat(1.0f) / (splat(1.0f) + exp_of(-x)); }

// x / (1 + e^-x). With e^-x = p 2^k this is x / (2^-k + p) * 2^-k, where nothing overflows on the
// way to results near 1e-37. Goes to -0 at -inf.
ANYMAMBA_INLINE FloatVec silu_of(FloatVec x) {
  const FloatVec c = at_least(x, -120.0f);
  const Power e = power_of(-at_most(c, 80.0f));
  return scale_by_power(c / (scale_by_power(splat(1.0f), -e.k) + e.p), -e.k);
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
