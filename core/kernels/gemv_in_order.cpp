// Weights times a few vectors, summed in the order of summation.h.
//
// kLanes weight rows go along a vector's lanes. Memory has them along k, so that words of 32 bits,
// of one number or two, are transposed on the way:
//
//   for each kLanes weight rows                  two such blocks for a single vector of x
//     for each cut of k
//       for each four words of the rows
//         columns (4, kLanes) = the words, transposed
//         sums (vectors) += a number of each vector x its column
//       y (vectors, kLanes) += sums
//
// While a block is in the second cache, the next one arrives there, as one stream through memory.
#include "kernels/gemv_in_order.h"

#include "kernels/gemm_packing.h"
#include "kernels/kernels.h"
#include "kernels/stream.h"
#include "kernels/summation.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Weight rows by their bytes.
struct WeightRows {
  const char* data;
  int64_t stride;
};

// Number p of vector m, and where it lies, for M vectors. Vectors are four to a base, so that the
// compiler needs few registers for them.
template <int M>
struct Vectors {
  const float* bases[(M + 3) / 4];
  int64_t stride;

  Vectors(const float* x, int64_t row_stride) : stride(row_stride) {
    for (int i = 0; i < (M + 3) / 4; ++i) bases[i] = x + 4 * i * row_stride;
  }
  const float* at(int m, int64_t p) const { return bases[m / 4] + m % 4 * stride + p; }
};

// sums += a number of each vector x one of each row. The word holds one number, or a pair that is
// multiplied at once.
template <int M, bool pairs>
ANYMAMBA_INLINE void add_column(const Vectors<M>& x, int64_t p, FloatVec column, FloatVec (&sums)[M]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    sums[m] = pairs ? fma_bf16_pairs(x.at(m, p), column, sums[m]) : fma_of(x.at(m, p), column, sums[m]);
}

// The same for number i of those from p on, which come by the four.
template <int M, bool pairs>
ANYMAMBA_INLINE void add_column_of_fours(const Vectors<M>& x, int64_t p, int i, FloatVec column, FloatVec (&sums)[M]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
    sums[m] = pairs ? fma_row_bf16_pairs(x.at(m, p), i, column, sums[m]) : fma_row(x.at(m, p), i, column, sums[m]);
}

// The same for words of the weight's type: word i of each row from number p on.
template <DType type, int M, bool pairs>
ANYMAMBA_INLINE void add_words(const Vectors<M>& x, int64_t p, int i, FloatVec words, FloatVec (&sums)[M]) {
  if constexpr (type != DType::bf16 || pairs) return add_column_of_fours<M, pairs>(x, p, i, words, sums);
  add_column_of_fours<M, false>(x, p, 2 * i, first_of_pairs(words), sums);
  add_column_of_fours<M, false>(x, p, 2 * i + 1, second_of_pairs(words), sums);
}

// The numbers from column p on that do not fill four words.
template <DType type, int M, bool pairs>
ANYMAMBA_INLINE void add_rest(const WeightRows& rows, const Vectors<M>& x, int64_t p, int64_t end,
                              FloatVec (&sums)[M]) {
  constexpr int64_t size = type == DType::f32 || pairs ? 4 : 2;
  for (; p < end; ++p) {
    FloatVec column;
    for (int i = 0; i < kLanes; ++i)
      column[i] = read(rows.data + i * rows.stride + p * size, pairs ? DType::f32 : type, 0);
    add_column<M, pairs>(x, p, column, sums);
  }
}

// sums (B, M): the cut's part of B blocks of kLanes rows times M vectors. With pairs, k counts them.
template <DType type, int B, int M, bool pairs>
ANYMAMBA_INLINE void add_cut(const WeightRows& rows, const Vectors<M>& x, const Cut& cut, Stream& stream,
                             FloatVec (&sums)[B][M]) {
  constexpr int64_t numbers = type == DType::bf16 && !pairs ? 2 : 1;  // of a word
  const int64_t end = cut.p + cut.depth, block = kLanes * rows.stride;
  int64_t p = cut.p;
  if constexpr (type == DType::f16) {
    for (; p + kLanes <= end; p += kLanes) {
      stream.fetch_lines(B * kLanes * kLanes * 2);
      for (int b = 0; b < B; ++b) {
        FloatVec columns[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          columns[i] = read_vector(rows.data + b * block + i * rows.stride + p * 2, type, 0);
        transpose(columns);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) add_column_of_fours<M, false>(x, p, i, columns[i], sums[b]);
      }
    }
  } else {
    for (; p + 4 * numbers <= end; p += 4 * numbers) {
      stream.fetch_lines(B * kLanes * 16);
#pragma GCC unroll 2
      for (int b = 0; b < B; ++b) {
        FloatVec words[4];
        load_columns(words, rows.data + b * block + 4 * (p / numbers), rows.stride);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add_words<type, M, pairs>(x, p, i, words[i], sums[b]);
      }
    }
  }
  for (int b = 0; b < B; ++b)
    add_rest<type, M, pairs>({rows.data + b * block, rows.stride}, x, p, end, sums[b]);
}

// y of some neighbouring rows, at most kLanes.
struct Results {
  const Gemv& gemv;
  int64_t row;
  int count;

  void add(int vector, const Cut& cut, FloatVec sum) const {
    float* const y = gemv.y + vector * gemv.y_row_stride + row;
    if (cut.p == 0 && gemv.bias != nullptr) sum += load_some(gemv.bias + row, count);
    if (cut.p > 0 || gemv.accumulate) sum += load_some(y, count);
    store_some(y, sum, count);
  }
};

// B blocks of kLanes rows, of which the last may have fewer results: `rows` has them all.
template <DType type, int B, int M, bool pairs>
void multiply_rows(const Gemv& gemv, int64_t row, int64_t count, const WeightRows& rows, Stream stream) {
  const int64_t k = pairs ? gemv.k / 2 : gemv.k, step = depth_step_of(k);
  const Vectors<M> x(static_cast<const float*>(gemv.x), pairs ? gemv.x_row_stride / 2 : gemv.x_row_stride);
  int64_t p = 0;
  do {
    const Cut cut = {p, smaller(step, k - p)};
    FloatVec sums[B][M] = {};
    add_cut<type, B, M, pairs>(rows, x, cut, stream, sums);
    for (int b = 0; b < B; ++b) {
      const Results results = {gemv, row + b * kLanes, static_cast<int>(smaller(kLanes, count - b * kLanes))};
      for (int m = 0; m < M; ++m) results.add(m, cut, sums[b][m]);
    }
    p += step;
  } while (p < k);
}

// Rows that do not fill a vector: from a copy of them, zeros behind.
template <DType type, int M, bool pairs>
void multiply_copy(const Gemv& gemv, int64_t row, int64_t count) {
  const int64_t size = size_of(type), bytes = gemv.k * size;
  const Scratch<char> copy(kLanes * bytes);
  __builtin_memset(copy, 0, static_cast<std::size_t>(kLanes * bytes));
  for (int64_t i = 0; i < count; ++i)
    __builtin_memcpy(copy + i * bytes,
                     static_cast<const char*>(gemv.weight) + (row + i) * gemv.weight_row_stride * size,
                     static_cast<std::size_t>(bytes));
  multiply_rows<type, 1, M, pairs>(gemv, row, count, {copy, bytes}, {});
}

template <DType type, int M, bool pairs>
void multiply_range(const Gemv& gemv, int64_t first, int64_t last) {
  constexpr int B = M <= 4 && 2 * M <= kInOrderVectors ? 2 : 1;
  const int64_t stride = gemv.weight_row_stride * size_of(type);
  const char* const weight = static_cast<const char*>(gemv.weight);
  int64_t row = first;
  for (; row + B * kLanes <= last; row += B * kLanes) {
    const Stream stream = stream_behind(weight + row * stride, B * kLanes * stride, (last - row) * stride);
    multiply_rows<type, B, M, pairs>(gemv, row, B * kLanes, {weight + row * stride, stride}, stream);
  }
  for (; row < last; row += kLanes) {
    const int64_t count = smaller(kLanes, last - row);
    if (count == kLanes)
      multiply_rows<type, 1, M, pairs>(gemv, row, count, {weight + row * stride, stride}, {});
    else
      multiply_copy<type, M, pairs>(gemv, row, count);
  }
}

template <DType type, bool pairs, int M>
void multiply_vectors(const Gemv& gemv, int64_t first, int64_t last) {
  if (gemv.m == M) return multiply_range<type, M, pairs>(gemv, first, last);
  if constexpr (M > 1) multiply_vectors<type, pairs, M - 1>(gemv, first, last);
}

}  // namespace

void gemv_in_order(const Gemv& gemv, int64_t first, int64_t last) {
  if constexpr (kMultipliesPairs)
    if (gemv.x_type == DType::bf16) return multiply_vectors<DType::bf16, true, kInOrderVectors>(gemv, first, last);
  with_type(gemv.type, [&](auto type) {
    multiply_vectors<decltype(type)::value, false, kInOrderVectors>(gemv, first, last);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
