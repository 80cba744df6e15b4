// Moving a tile of a sequence, steps x channels, between memory of any type and strides and a
// buffer of floats that kernels compute on. A row of the buffer holds `columns` floats.
#pragma once

#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {

// How many steps of a tile are read or written in vectors: along channels if those are neighbours
// in memory, and in squares of kLanes steps and kLanes channels if instead steps are neighbours.
ANYMAMBA_INLINE int steps_in_rows(const Tensor3& tensor, int steps) {
  return tensor.channel_stride == 1 ? steps : 0;
}

ANYMAMBA_INLINE int steps_in_squares(const Tensor3& tensor, int steps) {
  return tensor.channel_stride != 1 && tensor.step_stride == 1 ? steps - steps % kLanes : 0;
}

// kLanes steps of kLanes channels, `from` being the place of the first. Against time, the steps are read
// from the last on and stored in opposite order.
ANYMAMBA_INLINE void load_transposed(float* buffer, int columns, const Tensor3& tensor, DType type,
                                     std::int64_t from, std::int64_t direction) {
  FloatVec m[kLanes];
  const std::int64_t lowest = direction < 0 ? from - (kLanes - 1) : from;
  for (int i = 0; i < kLanes; ++i)
    m[i] = read_vector(tensor.data, type, lowest + i * tensor.channel_stride);
  transpose(m);
  for (int i = 0; i < kLanes; ++i) store(buffer + (direction < 0 ? kLanes - 1 - i : i) * columns, m[i]);
}

ANYMAMBA_INLINE void store_transposed(const float* buffer, int columns, const Tensor3& tensor,
                                      DType type, std::int64_t to, std::int64_t direction) {
  FloatVec m[kLanes];
  const std::int64_t lowest = direction < 0 ? to - (kLanes - 1) : to;
  for (int i = 0; i < kLanes; ++i) m[i] = load(buffer + (direction < 0 ? kLanes - 1 - i : i) * columns);
  transpose(m);
  for (int i = 0; i < kLanes; ++i)
    write_vector(tensor.data, type, lowest + i * tensor.channel_stride, m[i]);
}

// buffer[t * columns + c] = tensor(row, first_step + t * direction, first_channel + c), zeros for
// the channels from `channels` to `columns` (a multiple of kLanes).
ANYMAMBA_INLINE void load_tile(float* buffer, int columns, const Tensor3& tensor, std::int64_t row,
                               std::int64_t first_step, std::int64_t direction, int steps,
                               std::int64_t first_channel, int channels) {
  const std::int64_t start = row * tensor.row_stride + first_step * tensor.step_stride +
                             first_channel * tensor.channel_stride;
  const std::int64_t stride = tensor.step_stride * direction;
  for (int t = 0; t < steps; ++t)
    for (int c = channels; c < columns; ++c) buffer[t * columns + c] = 0;
  const int whole = channels - channels % kLanes;
  const int rows = steps_in_rows(tensor, steps), squares = steps_in_squares(tensor, steps);
  with_type(tensor.type, [=](auto type) {
    const DType known = decltype(type)::value;
    auto at = [=](int t, int c) { return start + t * stride + c * tensor.channel_stride; };
    for (int t = 0; t < rows; ++t)
      for (int c = 0; c < whole; c += kLanes)
        store(buffer + t * columns + c, read_vector(tensor.data, known, at(t, c)));
    for (int t = 0; t < squares; t += kLanes)
      for (int c = 0; c < whole; c += kLanes)
        load_transposed(buffer + t * columns + c, columns, tensor, known, at(t, c), direction);
    for (int c = rows + squares < steps ? 0 : whole; c < channels; ++c)
      for (int t = c < whole ? rows + squares : 0; t < steps; ++t)
        buffer[t * columns + c] = read(tensor.data, known, at(t, c));
  });
}

ANYMAMBA_INLINE void store_tile(const float* buffer, int columns, const Tensor3& tensor,
                                std::int64_t row, std::int64_t first_step, std::int64_t direction,
                                int steps, std::int64_t first_channel, int channels) {
  const std::int64_t start = row * tensor.row_stride + first_step * tensor.step_stride +
                             first_channel * tensor.channel_stride;
  const std::int64_t stride = tensor.step_stride * direction;
  const int whole = channels - channels % kLanes;
  const int rows = steps_in_rows(tensor, steps), squares = steps_in_squares(tensor, steps);
  with_type(tensor.type, [=](auto type) {
    const DType known = decltype(type)::value;
    auto at = [=](int t, int c) { return start + t * stride + c * tensor.channel_stride; };
    for (int t = 0; t < rows; ++t)
      for (int c = 0; c < whole; c += kLanes)
        write_vector(tensor.data, known, at(t, c), load(buffer + t * columns + c));
    for (int t = 0; t < squares; t += kLanes)
      for (int c = 0; c < whole; c += kLanes)
        store_transposed(buffer + t * columns + c, columns, tensor, known, at(t, c), direction);
    for (int c = rows + squares < steps ? 0 : whole; c < channels; ++c)
      for (int t = c < whole ? rows + squares : 0; t < steps; ++t)
        write(tensor.data, known, at(t, c), buffer[t * columns + c]);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
