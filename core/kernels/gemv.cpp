// Weights times a few vectors: bound by reading the weights once.
//
// However the rows are cut, and with however many vectors beside it, a row's sum is made in the
// same way: over k a whole vector at a time, then over the lanes in pairs.
#include "kernels/kernels.h"
#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

// Weight rows go gemv_rows(M) at a time for M vectors, which takes as many accumulators as there are
// registers. One vector takes the rows one after the other: a single stream through memory arrives
// a tenth faster than eight beside each other (benchmarks/decode.py).
constexpr int64_t kChunkBytes = 128 << 10;  // of weights, in L2
// How far ahead a single stream is prefetched: into L2, which can wait for more lines at a time than
// L1 can.
constexpr int64_t kPrefetchBytes = 8192;
constexpr int64_t kLine = 64;

// What is left of row times vector from column p on, and the row's bias.
template <DType type>
ANYMAMBA_INLINE float rest_of_row(const Gemv& gemv, int64_t row, int vector, int64_t p) {
  float sum = 0;
  for (; p < gemv.k; ++p)
    sum += read(gemv.weight, type, row * gemv.weight_row_stride + p) *
           gemv.x[vector * gemv.x_row_stride + p];
  return gemv.bias != nullptr ? sum + gemv.bias[row] : sum;
}

// The products of one vector with the rows first.. up to last.
template <DType type>
void one_vector(const Gemv& gemv, int64_t first, int64_t last) {
  constexpr int64_t size = type == DType::f32 ? 4 : 2;
  const int64_t stride = gemv.weight_row_stride * size, whole = gemv.k - gemv.k % kLanes;
  for (int64_t row = first; row < last; row += kLanes) {
    const char* weight = static_cast<const char*>(gemv.weight) + row * stride;
    const int64_t rows = smaller(kLanes, last - row);
    FloatVec sums[kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      FloatVec sum{};
      int64_t p = 0;
      for (; p + 2 * kLanes <= whole; p += 2 * kLanes) {
        const char* from = weight + r * stride + p * size;
        for (int64_t byte = 0; byte < 2 * kLanes * size; byte += kLine)
          __builtin_prefetch(from + byte + kPrefetchBytes, 0, 2);
        sum = fma(read_vector(from, type, 0), load(gemv.x + p), sum);
        sum = fma(read_vector(from, type, kLanes), load(gemv.x + p + kLanes), sum);
      }
      if (p < whole)
        sum = fma(read_vector(weight + r * stride + p * size, type, 0), load(gemv.x + p), sum);
      sums[r] = sum;
    }
    float totals[kLanes];
    store(totals, sums_of_lanes(sums));
    for (int64_t r = 0; r < rows; ++r)
      gemv.y[row + r] = totals[r] + rest_of_row<type>(gemv, row + r, 0, whole);
  }
}

// y (M vectors, R rows) from weight rows row.. and x rows vector..; rows `ahead` bytes further on
// are prefetched meanwhile.
template <DType type, int R, int M>
void dot_products(const Gemv& gemv, int64_t row, int vector, int64_t ahead) {
  constexpr int64_t size = type == DType::f32 ? 4 : 2;
  const char* weight = static_cast<const char*>(gemv.weight) + row * gemv.weight_row_stride * size;
  const int64_t stride = gemv.weight_row_stride * size;
  const float* x = gemv.x + vector * gemv.x_row_stride;
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
      gemv.y[(vector + m) * gemv.y_row_stride + row + r] =
          totals[r * M + m] + rest_of_row<type>(gemv, row + r, vector + m, p);
}

template <DType type, int R, int M>
void dot_products_of(int vectors, const Gemv& gemv, int64_t row, int vector, int64_t ahead) {
  if (vectors == M) return dot_products<type, R, M>(gemv, row, vector, ahead);
  if constexpr (M > 1) dot_products_of<type, R, M - 1>(vectors, gemv, row, vector, ahead);
}

// Vectors in groups of at most M. Each group goes over a chunk of weight rows that L2 holds, so
// that the group's part of x stays in L1 and memory is read once.
template <DType type, int M>
void gemv_of(const Gemv& gemv, int64_t first, int64_t last) {
  constexpr int R = gemv_rows(M);
  const int64_t row_bytes = gemv.weight_row_stride * (type == DType::f32 ? 4 : 2);
  const int64_t chunk =
      gemv.m > M ? larger(1, kChunkBytes / larger(1, R * row_bytes)) * R : last - first;
  for (int64_t start = first; start < last; start += chunk) {
    const int64_t stop = smaller(start + chunk, last);
    for (int vector = 0; vector < gemv.m; vector += M) {
      const int vectors = gemv.m - vector < M ? gemv.m - vector : M;
      int64_t row = start;
      for (; row + R <= stop; row += R) {
        const int64_t ahead = row + 2 * R <= last ? R * row_bytes : 0;
        dot_products_of<type, R, M>(vectors, gemv, row, vector, ahead);
      }
      for (; row < stop; ++row) dot_products_of<type, 1, M>(vectors, gemv, row, vector, 0);
    }
  }
}

template <DType type, int M>
void gemv_in_groups(int group, const Gemv& gemv, int64_t first, int64_t last) {
  if constexpr (M == 1) {
    if (group == 1) one_vector<type>(gemv, first, last);
  } else {
    if (group == M) return gemv_of<type, M>(gemv, first, last);
    gemv_in_groups<type, M - 1>(group, gemv, first, last);
  }
}

}  // namespace

void gemv(const Gemv& gemv, int64_t first, int64_t last) {
  const int groups = static_cast<int>(ceil_div(gemv.m, kGemvVectors));
  const int group = static_cast<int>(ceil_div(gemv.m, groups > 0 ? groups : 1));
  constexpr int M = kGemvVectors;
  switch (gemv.type) {
    case DType::f32: return gemv_in_groups<DType::f32, M>(group, gemv, first, last);
    case DType::bf16: return gemv_in_groups<DType::bf16, M>(group, gemv, first, last);
    case DType::f16: return gemv_in_groups<DType::f16, M>(group, gemv, first, last);
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
