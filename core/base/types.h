// What the kernels are given: pointers with types, shapes and strides. No ownership, no framework.
#pragma once

#include <cstdint>

namespace anymamba {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

constexpr std::int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// A tensor (rows, steps, channels) in memory; strides count elements and may be negative, which is
// how a sequence runs from its end. `data` is null where an optional tensor is absent.
struct Tensor3 {
  void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0;
  std::int64_t step_stride = 0;
  std::int64_t channel_stride = 0;

  explicit operator bool() const { return data != nullptr; }
};

// The sequences inside the rows of a packed batch, each with a recurrence of its own. Segment s is the
// steps [starts[s], stops[s]) of row rows[s]; it begins from state state_in[s] and leaves state
// state_out[s], where -1 means zeros, or not kept. With `reverse` it runs from its end.
struct Segments {
  std::int64_t count = 0;
  const std::int64_t* rows = nullptr;
  const std::int64_t* starts = nullptr;
  const std::int64_t* stops = nullptr;
  const std::int64_t* state_in = nullptr;
  const std::int64_t* state_out = nullptr;
  bool reverse = false;
};

// Where a row's state is among the slots of memory that has them: a table says it, or without one
// row i has slot i.
inline std::int64_t slot_in(const std::int64_t* slot_of, std::int64_t row) {
  return slot_of != nullptr ? slot_of[row] : row;
}

}  // namespace anymamba
