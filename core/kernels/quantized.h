// Products with weights of 8 or 4 bits, which are whole numbers in groups along k:
//
//   weight[i, p] = scales[i, g] * (q[i, p] - zero_point)    or    scales[i, g] * q[i, p] + offsets[i, g]
//
// with g = p / group and zero_point = 2^(bits - 1). The rows that they are multiplied with are rounded to
// 8 bits in the same groups, so that within a group all arithmetic is in whole numbers, and exact. The
// groups' results are added in the order of k: a row's do not depend on the rows beside it.
#pragma once

#include "base/types.h"

namespace anymamba {

// A weight of shape (n, k). Rows of q follow one another without gaps. Of 4 bits, byte i of a group
// holds number i in its lower half and number i + group / 2 in its upper half.
struct QuantizedWeight {
  int bits = 0;                            // 8 or 4; 0: not quantized
  int group = 0;                           // 32, 64 or 128; divides k
  const std::uint8_t* q = nullptr;         // (n, k * bits / 8)
  const std::uint16_t* scales = nullptr;   // (n, k / group), bfloat16
  const std::uint16_t* offsets = nullptr;  // the same, or null

  std::int32_t zero_point() const { return 1 << (bits - 1); }
};

// Rows rounded to 8 bits: x[r, p] = scales[r, g] * q[r, p], with q from -127 to 127.
struct QuantizedActivations {
  std::int64_t rows = 0, k = 0;
  int group = 0;
  std::int8_t* q = nullptr;        // (rows, k)
  float* scales = nullptr;         // (rows, k / group)
  std::int32_t* sums = nullptr;    // (rows, k / group): of q
};

// y (m, n) = x (m, k) weight^T + bias for the weight's rows [first, last), m >= 1. Not parallel itself,
// as gemv. The numbers are those of QuantizedGemm, bit for bit.
struct QuantizedGemv {
  QuantizedWeight weight;
  QuantizedActivations x;
  const float* bias = nullptr;     // (n,) or null
  float* y = nullptr;              // (m, n), y_row_stride between rows
  std::int64_t y_row_stride = 0;
  bool accumulate = false;         // adds to the old y
};

// The scratch memory of a product with a quantized weight of k columns: of a worker, and of the
// caller for m rows. At most, whatever the group.
constexpr std::int64_t quantized_worker_scratch(std::int64_t k) {
  return 2 * 32 * k + 3 * 8 * k + 1024;
}
constexpr std::int64_t quantized_caller_scratch(std::int64_t m, std::int64_t k) {
  return m * k + 2 * 4 * m * (k / 32) + 256;
}

// c (m, n) = a (m, k) weight^T, plus bias (n,) where given, plus the old c where `accumulate`.
// Parallel. Rows of a and c are contiguous, with strides between them.
struct QuantizedGemm {
  std::int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  std::int64_t a_row_stride = 0;
  QuantizedWeight weight;
  float* c = nullptr;
  std::int64_t c_row_stride = 0;
  const float* bias = nullptr;
  bool accumulate = false;
};

}  // namespace anymamba
