// Products of a few vectors with weights, on one worker: what a decoding step consists of.
#pragma once

#include <algorithm>

#include "base/arena.h"
#include "base/threads.h"
#include "model/model.h"

namespace anymamba {

// The weight rows, or other memory, that a worker will read next. They are prefetched into its second
// cache while it waits for others or computes, when memory would stand idle.
class Prefetch {
 public:
  Prefetch(const float* data, std::int64_t count)
      : next_(reinterpret_cast<const char*>(data)), end_(next_ + std::min(count * 4, kMost)) {}
  Prefetch(const Weight& weight, std::int64_t k, RowRange rows) {
    const QuantizedWeight& quantized = weight.quantized;
    const bool is_quantized = quantized.bits != 0;
    const void* const data = is_quantized ? quantized.q : weight.data;
    const std::int64_t row =
        is_quantized ? k * quantized.bits / 8 : weight.row_stride * size_of(weight.type);
    next_ = static_cast<const char*>(data) + rows.first * row;
    end_ = next_ + std::min((rows.last - rows.first) * row, kMost);
  }
  void fetch_line() {
    if (next_ < end_) __builtin_prefetch(next_, 0, 2), next_ += 64;
  }

 private:
  static constexpr std::int64_t kMost = 128 << 10;
  const char *next_, *end_;
};

// How a worker's vectors are multiplied, and its room for them as weights want them: rounded to 8 bits,
// or to bfloat16.
struct VectorRounding {
  static constexpr int kSmallestGroup = 32;
  const bool bf16_products, in_order;
  std::int8_t* q;
  float* scales;
  std::int32_t* sums;
  std::uint16_t* narrow;

  // Room for b vectors (k,) of `most` numbers at most.
  VectorRounding(std::int64_t b, std::int64_t most, bool bf16_products, bool in_order, Arena& memory)
      : bf16_products(bf16_products), in_order(in_order), q(static_cast<std::int8_t*>(memory.take(b * most))),
        scales(memory.floats(b * most / kSmallestGroup)),
        sums(static_cast<std::int32_t*>(memory.take(b * most / kSmallestGroup * 4))),
        narrow(static_cast<std::uint16_t*>(memory.take(bf16_products ? b * most * 2 : 0))) {}

  // x (b, k) rounded to bfloat16, without gaps. What was rounded before is overwritten, here and below.
  const std::uint16_t* to_bf16(const float* x, std::int64_t stride, std::int64_t b, std::int64_t k) {
    for (std::int64_t row = 0; row < b; ++row)
      kernels().convert(x + row * stride, DType::f32, narrow + row * k, DType::bf16, k);
    return narrow;
  }

  QuantizedActivations quantize(const float* x, std::int64_t stride, std::int64_t b, std::int64_t k, int group) {
    const QuantizedActivations rows = {b, k, group, q, scales, sums};
    kernels().quantize_activations(x, stride, rows, 0, b);
    return rows;
  }
};

// Vectors x (b, k), and the worker's room for rounding them.
struct Vectors {
  const float* data;
  std::int64_t b, k, stride;
  VectorRounding& rounding;
};

// Where results go, (b, .), or are added.
struct Results {
  float* data;
  std::int64_t stride;
  bool accumulate = false;
};

// x weight^T, of which rows are computed in any number of calls. x is rounded once, into room that the
// next product takes.
class Product {
 public:
  Product(const Weight& weight, const Vectors& x) : weight_(weight), x_(x) {
    if (weight.quantized.bits != 0)
      quantized_x_ = x.rounding.quantize(x.data, x.stride, x.b, x.k, weight.quantized.group);
    else if (operand_type(weight, x.rounding.bf16_products) == DType::bf16)
      bf16_x_ = x.rounding.to_bf16(x.data, x.stride, x.b, x.k);
  }

  // y (b, .) = x weight^T + bias for the weight's rows [first, last).
  void write(RowRange rows, const float* bias, const Results& y) const {
    if (weight_.quantized.bits != 0)
      return kernels().quantized_gemv({weight_.quantized, quantized_x_, bias, y.data, y.stride, y.accumulate},
                                      rows.first, rows.last);
    Gemv gemv = {x_.k, weight_.data, weight_.type, weight_.row_stride, bias, x_.data, DType::f32, x_.stride,
                 y.data, y.stride, x_.b, y.accumulate, x_.rounding.in_order};
    if (bf16_x_ != nullptr) gemv.x = bf16_x_, gemv.x_type = DType::bf16, gemv.x_row_stride = x_.k;
    kernels().gemv(gemv, rows.first, rows.last);
  }

 private:
  const Weight& weight_;
  const Vectors x_;
  QuantizedActivations quantized_x_ = {};
  const std::uint16_t* bf16_x_ = nullptr;
};

}  // namespace anymamba
