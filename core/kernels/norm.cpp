// RMSNorm over rows, with a gate or the residual addition before it, forward and backward; forward
// with a gate behind it.
//
//   s = x silu(gate) + residual        normed = s r weight silu(gate_after),  r = 1 / sqrt(mean(s^2) + eps)
//
// Each row passes through a buffer of floats, so that any type is read and written once, and the
// outputs may lie where the inputs did.
#include "kernels/norm.h"

#include "kernels/kernels.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr std::int64_t kRows = 16;   // rows of a work item
constexpr std::int64_t kParts = 16;  // sums over rows are taken in at most this many parts

// Rows are padded with zeros to whole vectors in buffers, which leaves sums as they are.
std::int64_t padded(std::int64_t d) { return round_up(d, kLanes); }

// buffer (padded(d),) = one row, zeros behind it.
void load_row(float* buffer, const Rows& rows, std::int64_t row, std::int64_t d) {
  const std::int64_t start = row * rows.row_stride;
  with_type(rows.type, [=](auto type) {
    const DType known = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) store(buffer + i, read_vector(rows.data, known, start + i));
    for (; i < d; ++i) buffer[i] = read(rows.data, known, start + i);
    for (; i < padded(d); ++i) buffer[i] = 0;
  });
}

void add_row(float* buffer, const Rows& rows, std::int64_t row, std::int64_t d) {
  const std::int64_t start = row * rows.row_stride;
  with_type(rows.type, [=](auto type) {
    const DType known = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes)
      store(buffer + i, load(buffer + i) + read_vector(rows.data, known, start + i));
    for (; i < d; ++i) buffer[i] += read(rows.data, known, start + i);
  });
}

// Calls f(i, count) for each vector of a row: of kLanes numbers, and a last one of less.
template <class Function>
ANYMAMBA_INLINE void for_vectors(std::int64_t d, const Function& f) {
  std::int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) f(i, kLanes);
  if (i < d) f(i, static_cast<int>(d - i));
}

// `count` numbers of a row from number i on, zeros behind them.
ANYMAMBA_INLINE FloatVec read_part(const Rows& rows, DType type, std::int64_t row, std::int64_t i, int count) {
  const std::int64_t at = row * rows.row_stride + i;
  if (count == kLanes) return read_vector(rows.data, type, at);
  float some[kLanes] = {};
  for (int j = 0; j < count; ++j) some[j] = read(rows.data, type, at + j);
  return load(some);
}

// buffer *= silu(gate).
void gate_row(float* buffer, const Rows& gate, std::int64_t row, std::int64_t d) {
  with_type(gate.type, [=](auto type) {
    for_vectors(d, [=](std::int64_t i, int count) {
      store(buffer + i, load(buffer + i) * silu_of(read_part(gate, decltype(type)::value, row, i, count)));
    });
  });
}

// From the gradient g of x silu(gate) to that of x, in its place, and that of the gate.
void ungate_row(float* g, const Rows& x, const Rows& gate, const Rows& dgate, std::int64_t row, std::int64_t d) {
  with_type(gate.type, [=](auto type) {
    const DType known = decltype(type)::value;
    for_vectors(d, [=](std::int64_t i, int count) {
      const FloatVec z = read_part(gate, known, row, i, count), ds = load(g + i);
      store(g + i, ds * silu_of(z));
      const FloatVec dz = ds * silu_slope_of(z) * read_part(x, x.type, row, i, count);
      const std::int64_t to = row * dgate.row_stride + i;
      if (count == kLanes) return write_vector(dgate.data, dgate.type, to, dz);
      for (int j = 0; j < count; ++j) write(dgate.data, dgate.type, to + j, dz[j]);
    });
  });
}

void store_row(const float* buffer, const Rows& rows, std::int64_t row, std::int64_t d) {
  const std::int64_t start = row * rows.row_stride;
  with_type(rows.type, [=](auto type) {
    const DType known = decltype(type)::value;
    std::int64_t i = 0;
    for (; i + kLanes <= d; i += kLanes) write_vector(rows.data, known, start + i, load(buffer + i));
    for (; i < d; ++i) write(rows.data, known, start + i, buffer[i]);
  });
}

// sum_i a_i b_i over whole vectors, in four interleaved parts.
float dot(const float* a, const float* b, std::int64_t count) {
  FloatVec s0{}, s1{}, s2{}, s3{};
  std::int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    s0 = fma(load(a + i), load(b + i), s0);
    s1 = fma(load(a + i + kLanes), load(b + i + kLanes), s1);
    s2 = fma(load(a + i + 2 * kLanes), load(b + i + 2 * kLanes), s2);
    s3 = fma(load(a + i + 3 * kLanes), load(b + i + 3 * kLanes), s3);
  }
  for (; i < count; i += kLanes) s0 = fma(load(a + i), load(b + i), s0);
  return sum((s0 + s1) + (s2 + s3));
}

// s (padded(d),) is overwritten; weight (padded(d),).
void norm_row(const Norm& norm, const NormResult& result, float* s, const float* weight,
              std::int64_t row) {
  const std::int64_t d = norm.d, whole = padded(d);
  load_row(s, norm.x, row, d);
  if (norm.gate.data != nullptr) gate_row(s, norm.gate, row, d);
  if (norm.residual.data != nullptr) add_row(s, norm.residual, row, d);
  if (result.total.data != nullptr) store_row(s, result.total, row, d);
  const float scale =
      1.0f / __builtin_sqrtf(dot(s, s, whole) / static_cast<float>(d) + norm.eps);
  if (result.scale != nullptr) result.scale[row] = scale;
  for (std::int64_t i = 0; i < whole; i += kLanes)
    store(s + i, load(s + i) * splat(scale) * load(weight + i));
  if (norm.gate_after.data != nullptr) gate_row(s, norm.gate_after, row, d);
  store_row(s, result.normed, row, d);
}

// With g = dnormed * weight:  ds = r (g - s r^2 mean(g s)) + dtotal;  sums (padded(d),) of
// dweight += dnormed s r.
void backward_row(const Norm& norm, const NormGradients& gradients, float* s, float* g,
              const float* weight, float* sums, std::int64_t row) {
  const std::int64_t d = norm.d, whole = padded(d);
  const float r = gradients.scale[row];
  load_row(s, gradients.sum, row, d);
  if (norm.gate.data != nullptr) gate_row(s, norm.gate, row, d);
  load_row(g, gradients.normed, row, d);
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    const FloatVec dnormed = load(g + i);
    store(sums + i, fma(dnormed, load(s + i) * splat(r), load(sums + i)));
    store(g + i, dnormed * load(weight + i));
  }
  // r s stays of order one where s alone may be far from it.
  const float mean = dot(g, s, whole) * r / static_cast<float>(d);
  for (std::int64_t i = 0; i < whole; i += kLanes)
    store(g + i, splat(r) * (load(g + i) - load(s + i) * splat(r) * splat(mean)));
  if (gradients.total.data != nullptr) add_row(g, gradients.total, row, d);
  if (norm.gate.data != nullptr) ungate_row(g, gradients.sum, norm.gate, gradients.gate, row, d);
  store_row(g, gradients.x, row, d);
}

}  // namespace

void norm(const Norm& norm, const NormResult& result) {
  const std::int64_t whole = padded(norm.d);
  if (norm.d == 0) return;
  const std::int64_t items = ceil_div(norm.rows, kRows);
  parallel_for(items, norm_worker_scratch(norm.d), [&](std::int64_t item) {
    const Scratch<float> s(whole), weight(whole);
    load_row(weight, {const_cast<float*>(norm.weight), DType::f32, 0}, 0, norm.d);
    for (std::int64_t row = item * kRows; row < smaller((item + 1) * kRows, norm.rows); ++row)
      norm_row(norm, result, s, weight, row);
  });
}

void norm_backward(const Norm& norm, const NormGradients& gradients) {
  const std::int64_t d = norm.d, whole = padded(d), blocks = ceil_div(norm.rows, kRows);
  const std::int64_t parts = smaller(blocks, kParts);
  const Scratch<float> sums(parts * whole);
  // Each part sums over its rows block by block, sums (parts, padded(d)).
  const std::int64_t bytes = 4 * Scratch<float>::in_arena(whole);
  parallel_for(d == 0 ? 0 : parts, bytes, [&](std::int64_t part) {
    float* const total = sums + part * whole;
    const Scratch<float> s(whole), g(whole), weight(whole), own(whole);
    load_row(weight, {const_cast<float*>(norm.weight), DType::f32, 0}, 0, d);
    for (std::int64_t i = 0; i < whole; ++i) total[i] = 0;
    for (std::int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      for (std::int64_t i = 0; i < whole; ++i) own[i] = 0;
      for (std::int64_t row = block * kRows; row < smaller((block + 1) * kRows, norm.rows); ++row)
        backward_row(norm, gradients, s, g, weight, own, row);
      for (std::int64_t i = 0; i < whole; ++i) total[i] += own[i];
    }
  });
  for (std::int64_t i = 0; i < d; ++i) {
    float total = 0;
    for (std::int64_t part = 0; part < parts; ++part) total += sums[part * whole + i];
    gradients.weight[i] = total;
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
