// Arrays from Python, checked: shape, type and strides, before a kernel sees a pointer. No argument
// from Python makes a kernel read or write outside what it was given.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "model/model.h"

namespace nb = nanobind;

namespace anymamba::bindings {

using In = nb::ndarray<nb::ro, nb::device::cpu>;
using Out = nb::ndarray<nb::device::cpu>;
using MaybeIn = std::optional<In>;
using MaybeOut = std::optional<Out>;
using Shape = std::initializer_list<std::int64_t>;
using Limits = std::pair<float, float>;  // the least and the largest step size

constexpr std::int64_t kAny = -1;  // an extent that is not checked
constexpr std::int64_t kMostRows = 1 << 24;

[[noreturn]] inline void refuse(const std::string& message) {
  throw nb::value_error(message.c_str());
}

inline void check_limits(Limits limits) {
  if (!(limits.first <= limits.second)) refuse("dt_limit must be the least and the largest step size");
}

template <class Array>
std::string shape_of(const Array& array) {
  std::string text = "(";
  for (std::size_t i = 0; i < array.ndim(); ++i)
    text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

template <class Array>
void check_shape(const char* name, const Array& array, Shape shape) {
  bool fits = array.ndim() == shape.size();
  std::size_t axis = 0;
  for (const std::int64_t extent : shape) {
    fits = fits && (extent == kAny || static_cast<std::int64_t>(array.shape(axis)) == extent);
    ++axis;
  }
  if (fits) return;
  std::string expected = "(";
  for (const std::int64_t extent : shape)
    expected += (expected.size() > 1 ? ", " : "") + (extent == kAny ? "." : std::to_string(extent));
  refuse(std::string(name) + " has shape " + shape_of(array) + ", expected " + expected + ")");
}

template <class Array>
DType type_of(const char* name, const Array& array) {
  const auto is = [&](nb::dlpack::dtype_code code, std::uint8_t bits) {
    return array.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(code), bits, 1};
  };
  using Code = nb::dlpack::dtype_code;
  if (is(Code::Float, 32)) return DType::f32;
  if (is(Code::Float, 16)) return DType::f16;
  // NumPy knows no bfloat16: it gives the bits.
  if (is(Code::Bfloat, 16) || is(Code::UInt, 16)) return DType::bf16;
  refuse(std::string(name) + " must be float32, bfloat16 (or its bits as uint16) or float16");
}

template <class Array>
void* pointer(const Array& array) {
  return const_cast<void*>(static_cast<const void*>(array.data()));
}

// Is every extent behind the first axis laid out without gaps?
template <class Array>
bool is_contiguous(const Array& array, std::size_t from = 0) {
  for (std::size_t i = from; i < array.ndim(); ++i)
    if (array.shape(i) == 0) return true;
  std::int64_t expected = 1;
  for (std::size_t i = array.ndim(); i-- > from;) {
    if (array.shape(i) > 1 && array.stride(i) != expected) return false;
    expected *= static_cast<std::int64_t>(array.shape(i));
  }
  return true;
}

template <class Array>
Tensor3 tensor3(const char* name, const Array& array, Shape shape) {
  check_shape(name, array, shape);
  return {pointer(array), type_of(name, array), array.stride(0), array.stride(1), array.stride(2)};
}

// One step of each row, (b, e).
template <class Array>
Tensor3 one_step(const char* name, const Array& array, Shape shape) {
  check_shape(name, array, shape);
  return {pointer(array), type_of(name, array), array.stride(0), 0, array.stride(1)};
}

// Numbers of one type without gaps.
template <class Number, class Array>
Number* contiguous(const char* name, const char* type, const Array& array, Shape shape) {
  check_shape(name, array, shape);
  if (array.dtype() != nb::dtype<Number>()) refuse(std::string(name) + " must be " + type);
  if (!is_contiguous(array)) refuse(std::string(name) + " must be contiguous " + type);
  return static_cast<Number*>(pointer(array));
}

template <class Array>
float* floats(const char* name, const Array& array, Shape shape) {
  return contiguous<float>(name, "float32", array, shape);
}

template <class Array>
float* floats(const char* name, const std::optional<Array>& array, Shape shape) {
  return array ? floats(name, *array, shape) : nullptr;
}

// (b, l, g, n)
inline Projection projection(const char* name, const In& array, std::int64_t b, std::int64_t l,
                      std::int64_t g, std::int64_t n) {
  check_shape(name, array, {b, l, g, n});
  return {pointer(array),  type_of(name, array), array.stride(0),
          array.stride(1), array.stride(2),      array.stride(3)};
}

template <class Array>
Window window(const char* name, const Array& array, std::int64_t count, std::int64_t e,
              std::int64_t at_least) {
  check_shape(name, array, {count, e, kAny});
  const std::int64_t columns = static_cast<std::int64_t>(array.shape(2));
  if (columns < at_least)
    refuse(std::string(name) + " has " + std::to_string(columns) + " columns, expected " +
           std::to_string(at_least) + " or more");
  return {pointer(array),  type_of(name, array), array.stride(0),
          array.stride(1), array.stride(2),      columns};
}

template <class Array>
Matrix matrix(const char* name, const Array& array, Shape shape) {
  check_shape(name, array, shape);
  return {pointer(array), type_of(name, array), array.stride(0), array.stride(1)};
}

template <class Array>
Rows rows(const char* name, const Array& array, Shape shape) {
  check_shape(name, array, shape);
  if (array.shape(1) > 1 && array.stride(1) != 1)
    refuse(std::string(name) + " must have contiguous rows");
  return {pointer(array), type_of(name, array), array.stride(0)};
}

// A weight (n, k) whose rows are contiguous.
inline Weight dense_weight(const char* name, const In& array, std::int64_t n, std::int64_t k) {
  const Rows found = rows(name, array, {n, k});
  return {found.data, found.type, found.row_stride, {}};
}

// Small tensors of any type, without gaps.
inline Array small(const char* name, const In& array, Shape shape) {
  check_shape(name, array, shape);
  if (!is_contiguous(array)) refuse(std::string(name) + " must be contiguous");
  return {pointer(array), type_of(name, array)};
}

inline Array small(const char* name, const MaybeIn& array, Shape shape) {
  return array ? small(name, *array, shape) : Array{};
}

template <class Array>
std::int64_t extent(const Array& array, std::size_t axis) {
  if (array.ndim() <= axis) refuse("an array has shape " + shape_of(array) + ", too few axes");
  return static_cast<std::int64_t>(array.shape(axis));
}

// A copy of (count,) int64.
inline std::vector<std::int64_t> whole_numbers(const char* name, const In& array,
                                               std::int64_t count = kAny) {
  const auto* data = contiguous<std::int64_t>(name, "int64", array, {count});
  return std::vector<std::int64_t>(data, data + array.shape(0));
}

inline const std::uint16_t* bfloat16s(const std::string& name, const In& array, Shape shape) {
  const Array found = small(name.c_str(), array, shape);
  if (found.type != DType::bf16) refuse(name + " must be bfloat16");
  return static_cast<const std::uint16_t*>(found.data);
}

// A weight (n, k) of which q, scales and offsets (or nothing) are given. The bits follow from q's
// width and the group from that of the scales.
inline QuantizedWeight quantized_weight(const char* name, const In& q, const In& scales,
                                        const MaybeIn& offsets, std::int64_t n,
                                        std::int64_t k) {
  const std::string called = name;
  QuantizedWeight weight;
  weight.q = contiguous<std::uint8_t>((called + ": q").c_str(), "uint8", q, {n, kAny});
  const std::int64_t width = static_cast<std::int64_t>(q.shape(1));
  weight.bits = width == k ? 8 : 2 * width == k ? 4 : 0;
  const std::int64_t groups = extent(scales, 1);
  const std::int64_t group = groups > 0 && k % groups == 0 ? k / groups : 0;
  if (weight.bits == 0 || (group != 32 && group != 64 && group != 128))
    refuse(called + ": q of shape " + shape_of(q) + " and scales of shape " + shape_of(scales) +
           " are no " + std::to_string(k) + " columns of 8 or 4 bits in groups of 32, 64 or 128");
  weight.group = static_cast<int>(group);
  weight.scales = bfloat16s(called + ": scales", scales, {n, groups});
  if (offsets) weight.offsets = bfloat16s(called + ": minima", *offsets, {n, groups});
  return weight;
}

}  // namespace anymamba::bindings
