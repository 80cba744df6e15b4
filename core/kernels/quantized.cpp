// Rows rounded to 8 bits, and rows of quantized weights as floats.
#include "kernels/kernels.h"
#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

typedef std::int8_t SmallIntVec __attribute__((vector_size(kLanes)));

// A group of smaller numbers counts as zeros: 127 / largest would leave float32. 2^-100.
constexpr float kSmallest = 7.888609052210118e-31f;

// The whole numbers next to x * y, ties to even. The product is not rounded before, on any machine.
ANYMAMBA_INLINE IntVec nearest(FloatVec x, FloatVec y) {
  if constexpr (kFusedMultiplyAdd)  // adding kRounder rounds to a whole number
    return __builtin_convertvector(fma(x, y, splat(kRounder)) - splat(kRounder), IntVec);
  IntVec v;
  for (int i = 0; i < kLanes; ++i)
    v[i] = static_cast<std::int32_t>(
        __builtin_nearbyint(static_cast<double>(x[i]) * static_cast<double>(y[i])));
  return v;
}

// q = x / scale, rounded to nearest even, with scale = max |x| / 127.
void quantize_group(const float* x, int group, std::int8_t* q, float& scale, std::int32_t& sum) {
  FloatVec most{}, wrong{};
  for (int i = 0; i < group; i += kLanes) {
    const FloatVec v = load(x + i), magnitude = v < FloatVec{} ? -v : v;
    most = magnitude > most ? magnitude : most;
    wrong = fma(v, FloatVec{}, wrong);  // not 0 where a number is infinite or none
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const bool finite = anymamba::ANYMAMBA_ISA::sum(wrong) == 0.0f;
  const FloatVec inverse = splat(finite && largest >= kSmallest ? 127.0f / largest : 0.0f);
  IntVec total{};
  for (int i = 0; i < group; i += kLanes) {
    const IntVec whole = nearest(finite ? load(x + i) : FloatVec{}, inverse);
    const SmallIntVec small = __builtin_convertvector(whole, SmallIntVec);
    __builtin_memcpy(q + i, &small, sizeof small);
    total += whole;
  }
  sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  scale = finite ? largest / 127.0f : __builtin_nanf("");  // so are all results of the group
}

// One number of a weight row, without sign.
ANYMAMBA_INLINE int number_of(const QuantizedWeight& w, const std::uint8_t* row, int64_t p) {
  if (w.bits == 8) return row[p];
  const int64_t inside = p % w.group, half = w.group / 2;
  const std::uint8_t byte = row[p / w.group * half + inside % half];
  return inside < half ? byte & 15 : byte >> 4;
}

}  // namespace

void quantize_activations(const float* x, int64_t row_stride, const QuantizedActivations& out, int64_t first,
                          int64_t last) {
  const int64_t groups = out.k / out.group;
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < groups; ++g)
      quantize_group(x + row * row_stride + g * out.group, out.group,
                     out.q + row * out.k + g * out.group, out.scales[row * groups + g],
                     out.sums[row * groups + g]);
}

// dequantized (k) = row of the weight.
void dequantize(const QuantizedWeight& w, int64_t row, int64_t k, float* y) {
  const std::uint8_t* const q = w.q + row * (k * w.bits / 8);
  for (int64_t p = 0; p < k; ++p) {
    const int64_t at = row * (k / w.group) + p / w.group;
    const float scale = from_bf16(w.scales[at]);
    const int number = number_of(w, q, p);
    y[p] = w.offsets != nullptr ? scale * static_cast<float>(number) + from_bf16(w.offsets[at])
                               : scale * static_cast<float>(number - w.zero_point());
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
