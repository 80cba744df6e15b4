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
};

// The most scratch memory that a worker needs for a product whose c is rows of floats.
constexpr std::int64_t kGemmScratch = 1 << 20;

// Weights of shape (n, k), rows contiguous, times a few vectors: bound by reading the weights once.
// y (m, n) = x (m, k) weight^T + bias, for rows [first, last) of the weight only, 1 <= m <= 16.
// Not parallel itself: the caller gives each worker rows of its own.
struct Gemv {
  std::int64_t k = 0;
  const void* weight = nullptr;
  DType type = DType::f32;
  std::int64_t weight_row_stride = 0;
  const float* bias = nullptr;    // (n,) or null
  const float* x = nullptr;       // (m, k), x_row_stride between rows
  std::int64_t x_row_stride = 0;
  float* y = nullptr;             // (m, n), y_row_stride between rows; entry [r, i] for weight row i
  std::int64_t y_row_stride = 0;
  int m = 0;
};

}  // namespace anymamba
