// Weights times a few vectors: bound by reading the weights once, as they lie in memory.
//
// However the rows are cut, and with as many vectors beside it as the registers hold, a row's sum is
// made in the same way: over k a whole vector at a time, then over the lanes in pairs. That is not the
// order of summation.h, in which transposed rows take up to a fifth longer.
#include "kernels/gemm_packing.h"
#include "kernels/gemv_in_order.h"
#include "kernels/kernels.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

static_assert(kGemvVectors <= kInOrderVectors);

// Weight rows go gemv_rows(M) at a time for M vectors, which takes as many accumulators as there are
// registers. One vector takes as few rows at a time as keep the arithmetic busy: a single stream through
// memory arrives a tenth faster than eight beside each other (benchmarks/decode.py).
//
// How far ahead a single stream is prefetched: into L2, which can wait for more lines at a time than
// L1 can.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kLine = 64;

const float* x_of(const Gemv& gemv) { return static_cast<const float*>(gemv.x); }

// What is left of row times vector from column p on, and the row's bias.
template <DType type>
ANYMAMBA_INLINE float rest_of_row(const Gemv& gemv, int64_t row, int vector, int64_t p) {
  float sum = 0;
  for (; p < gemv.k; ++p)
    sum += read(gemv.weight, type, row * gemv.weight_row_stride + p) *
           x_of(gemv)[vector * gemv.x_row_stride + p];
  return gemv.bias != nullptr ? sum + gemv.bias[row] : sum;
}

ANYMAMBA_INLINE void write_result(const Gemv& gemv, int64_t row, int vector, float result) {
  float& y = gemv.y[vector * gemv.y_row_stride + row];
  y = gemv.accumulate ? y + result : result;
}

// sums (R) = R rows, `stride` bytes apart, times x, `whole` numbers of each, in lanes.
template <DType type, int R>
ANYMAMBA_INLINE void add_rows(const char* weight, int64_t stride, const float* x, int64_t whole, FloatVec* results) {
  constexpr int64_t size = type == DType::f32 ? 4 : 2;
  FloatVec sums[R] = {};
  int64_t p = 0;
  for (; p + 2 * kLanes <= whole; p += 2 * kLanes) {
    const FloatVec first = load(x + p), second = load(x + p + kLanes);
    // R rows are one stretch of memory: what comes behind it arrives in its order.
    for (int64_t byte = 0; byte < 2 * kLanes * size * R; byte += kLine)
      __builtin_prefetch(weight + p * size * R + byte + kPrefetchBytes, 0, 2);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const char* const from = weight + r * stride + p * size;
      sums[r] = fma(read_vector(from, type, 0), first, sums[r]);
      sums[r] = fma(read_vector(from, type, kLanes), second, sums[r]);
    }
  }
  if (p < whole)
    for (int r = 0; r < R; ++r)
      sums[r] = fma(read_vector(weight + r * stride + p * size, type, 0), load(x + p), sums[r]);
  for (int r = 0; r < R; ++r) results[r] = sums[r];
}

// The products of one vector with the rows first.. up to last.
template <DType type>
void one_vector(const Gemv& gemv, int64_t first, int64_t last) {
  constexpr int64_t size = type == DType::f32 ? 4 : 2;
  const int64_t stride = gemv.weight_row_stride * size, whole = gemv.k - gemv.k % kLanes;
  const float* const x = x_of(gemv);
  for (int64_t row = first; row < last; row += kLanes) {
    const char* weight = static_cast<const char*>(gemv.weight) + row * stride;
    const int64_t rows = smaller(kLanes, last - row);
    FloatVec sums[kLanes] = {};
    int64_t r = 0;
    for (; r + kRowsOfOneVector <= rows; r += kRowsOfOneVector)
      add_rows<type, kRowsOfOneVector>(weight + r * stride, stride, x, whole, sums + r);
    for (; r < rows; ++r) add_rows<type, 1>(weight + r * stride, stride, x, whole, sums + r);
    float totals[kLanes];
    store(totals, sums_of_lanes(sums));
    for (int64_t r = 0; r < rows; ++r)
      write_result(gemv, row + r, 0, totals[r] + rest_of_row<type>(gemv, row + r, 0, whole));
  }
}

// y (M vectors, R rows) from weight rows row..; rows `ahead` bytes further on are prefetched meanwhile.
template <DType type, int R, int M>
void dot_products(const Gemv& gemv, int64_t row, int64_t ahead) {
  constexpr int64_t size = type == DType::f32 ? 4 : 2;
  const char* weight = static_cast<const char*>(gemv.weight) + row * gemv.weight_row_stride * size;
  const int64_t stride = gemv.weight_row_stride * size;
  const float* x = x_of(gemv);
  FloatVec sums[R][M] = {};
  int64_t p = 0;
  for (; p + kLanes <= gemv.k; p += kLanes) {
    FloatVec v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = load(x + m * gemv.x_row_stride + p);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const char* from = weight + r * stride + p * size;
      __builtin_prefetch(from + ahead);
      const FloatVec w = read_vector(from, type, 0);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sums[r][m] = fma(w, v[m], sums[r][m]);
    }
  }
  // Sums over lanes, kLanes of the R * M accumulators at a time; entry (r, m) at r * M + m.
  constexpr int kGroups = (R * M + kLanes - 1) / kLanes;
  float totals[kGroups * kLanes];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    FloatVec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      v[i] = g * kLanes + i < R * M ? sums[(g * kLanes + i) / M][(g * kLanes + i) % M] : FloatVec{};
    store(totals + g * kLanes, sums_of_lanes(v));
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r)
      write_result(gemv, row + r, m, totals[r * M + m] + rest_of_row<type>(gemv, row + r, m, p));
}

template <DType type, int M>
void gemv_of(const Gemv& gemv, int64_t first, int64_t last) {
  if constexpr (M == 1) return one_vector<type>(gemv, first, last);
  constexpr int R = gemv_rows(M);
  const int64_t row_bytes = gemv.weight_row_stride * size_of(type);
  int64_t row = first;
  for (; row + R <= last; row += R) dot_products<type, R, M>(gemv, row, row + 2 * R <= last ? R * row_bytes : 0);
  for (; row < last; ++row) dot_products<type, 1, M>(gemv, row, 0);
}

template <DType type, int M>
void gemv_of_vectors(const Gemv& gemv, int64_t first, int64_t last) {
  if (gemv.m == M) return gemv_of<type, M>(gemv, first, last);
  if constexpr (M > 1) gemv_of_vectors<type, M - 1>(gemv, first, last);
}

// More vectors than registers: as a product of matrices.
void multiply_many(const Gemv& gemv, int64_t first, int64_t last) {
  const char* const weight =
      static_cast<const char*>(gemv.weight) + first * gemv.weight_row_stride * size_of(gemv.type);
  Gemm gemm = {gemv.m, last - first, gemv.k,
               {const_cast<void*>(gemv.x), gemv.x_type, gemv.x_row_stride, 1},
               {const_cast<char*>(weight), gemv.type, 1, gemv.weight_row_stride},
               {gemv.y + first, DType::f32, gemv.y_row_stride, 1},
               gemv.bias != nullptr ? gemv.bias + first : nullptr, gemv.accumulate};
  gemm.alone = true;
  ANYMAMBA_ISA::gemm(gemm);
}

void multiply(const Gemv& gemv, int64_t first, int64_t last) {
  if (gemv.in_order || gemv.m > kGemvVectors) return gemv_in_order(gemv, first, last);
  with_type(gemv.type, [&](auto type) {
    gemv_of_vectors<decltype(type)::value, kGemvVectors>(gemv, first, last);
  });
}

// bfloat16 vectors that are not multiplied in pairs become floats.
void multiply_as_floats(Gemv gemv, int64_t first, int64_t last) {
  const Scratch<float> x(gemv.m * gemv.k);
  for (int64_t i = 0; i < gemv.m; ++i)
    to_float32(static_cast<const std::uint16_t*>(gemv.x) + i * gemv.x_row_stride, gemv.x_type, x + i * gemv.k,
               gemv.k);
  gemv.x = x, gemv.x_type = DType::f32, gemv.x_row_stride = gemv.k;
  multiply(gemv, first, last);
}

}  // namespace

void gemv(const Gemv& gemv, int64_t first, int64_t last) {
  if (first >= last) return;
  if (gemv.m > kInOrderVectors) return multiply_many(gemv, first, last);
  if (gemv.x_type == DType::f32) return multiply(gemv, first, last);
  const bool in_order = gemv.in_order || gemv.m > kGemvVectors;
  const Operand x = {gemv.x, gemv.x_type, gemv.x_row_stride, 1};
  if (in_order && multiplies_pairs(x, {gemv.weight, gemv.type, gemv.weight_row_stride, 1}, gemv.k))
    return gemv_in_order(gemv, first, last);
  multiply_as_floats(gemv, first, last);
}

}  // namespace anymamba::ANYMAMBA_ISA
