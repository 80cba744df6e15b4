// Conversion to float32, and the elementary functions over arrays for tests.
#include "kernels/kernels.h"
#include "simd/math.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

template <FloatVec (*f)(FloatVec)>
void apply(const float* x, float* y, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, f(load(x + i)));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store_some(y + i, f(load_some(x + i, rest)), rest);
}

}  // namespace

void to_float32(const void* x, DType type, float* y, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, read_vector(x, type, i));
  for (; i < count; ++i) y[i] = read(x, type, i);
}

void negative_exp(const void* x, DType type, float* y, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, -exp_of(read_vector(x, type, i)));
  for (; i < count; ++i) y[i] = -exp_of(splat(read(x, type, i)))[0];
}

void apply_exp(const float* x, float* y, std::int64_t count) { apply<exp_of>(x, y, count); }
void apply_exp2(const float* x, float* y, std::int64_t count) { apply<exp2_of>(x, y, count); }
void apply_silu(const float* x, float* y, std::int64_t count) { apply<silu_of>(x, y, count); }
void apply_softplus(const float* x, float* y, std::int64_t count) {
  apply<softplus_of>(x, y, count);
}

void convert(const void* x, DType from, void* y, DType to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) write_vector(y, to, i, read_vector(x, from, i));
  for (; i < count; ++i) write(y, to, i, read(x, from, i));
}

}  // namespace anymamba::ANYMAMBA_ISA
