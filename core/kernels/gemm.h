// Matrix products. Inputs of any storage type become float32 as they are read; sums are
// float32.
#pragma once

#include "base/types.h"

namespace anymamba {

// A matrix of any strides (in elements).
struct Matrix {
  void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0, column_stride = 0;
};

// c (m, n) = a (m, k) times b (k, n), plus bias (n,) where given, plus the old c where `accumulate`.
// Parallel. Any m, n, k, zero included. A torch weight of shape (n, k) is b with swapped strides.
struct Gemm {
  std::int64_t m = 0, n = 0, k = 0;
  Matrix a, b, c;
  const float* bias = nullptr;
  bool accumulate = false;
  bool alone = false;  // on the calling thread, as a part of its work
  // A row's sums are the same whatever the number of rows; few rows take up to a fifth longer.
  bool in_order = false;
};

// The most scratch memory that a worker needs for a product whose c is rows of floats.
constexpr std::int64_t kGemmScratch = 1 << 20;

// The most scratch memory that a worker needs for m vectors (k,) times weights: a copy of a vector's
// lanes of weight rows, vectors as floats, and for more than a few vectors that of a product.
constexpr std::int64_t gemv_scratch(std::int64_t m, std::int64_t k) {
  return 16 * 4 * k + 8 * 4 * k + (m > 4 ? kGemmScratch : 0) + 256;
}

// Weights of shape (n, k), rows contiguous, times some vectors: y (m, n) = x (m, k) weight^T + bias,
// plus the old y where `accumulate`, for rows [first, last) of the weight only. Not parallel itself:
// the caller gives each worker rows of its own, and gemv_scratch. The numbers are those that Gemm gives,
// bit for bit, for as many rows and with the same `in_order`.
struct Gemv {
  std::int64_t k = 0;
  const void* weight = nullptr;
  DType type = DType::f32;
  std::int64_t weight_row_stride = 0;
  const float* bias = nullptr;    // (n,) or null
  const void* x = nullptr;        // (m, k), x_row_stride between rows
  DType x_type = DType::f32;      // or bf16
  std::int64_t x_row_stride = 0;
  float* y = nullptr;             // (m, n), y_row_stride between rows; entry [r, i] for weight row i
  std::int64_t y_row_stride = 0;
  std::int64_t m = 0;
  bool accumulate = false;
  bool in_order = false;
};

}  // namespace anymamba
