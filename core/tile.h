// Moving a tile of a sequence, steps x channels, between memory of any type and strides and a
// buffer of floats that kernels compute on. A row of the buffer holds `columns` floats.
#pragma once

#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

// buffer[t * columns + c] = tensor(row, first_step + t * direction, first_channel + c), zeros for
// the channels from `channels` to `columns` (a multiple of W).
ANYMAMBA_INLINE void load_tile(float* buffer, int columns, const Tensor3& tensor, std::int64_t row,
                               std::int64_t first_step, std::int64_t direction, int steps,
                               std::int64_t first_channel, int channels) {
  const std::int64_t start = row * tensor.row_stride + first_step * tensor.step_stride +
                             first_channel * tensor.channel_stride;
  const std::int64_t stride = tensor.step_stride * direction;
  for (int t = 0; t < steps; ++t)
    for (int c = channels; c < columns; ++c) buffer[t * columns + c] = 0;
  const int vectors = tensor.channel_stride == 1 ? channels - channels % W : 0;
  with_type(tensor.type, [=](auto type) {
    const DType known = decltype(type)::value;
    for (int t = 0; t < steps; ++t)
      for (int c = 0; c < vectors; c += W)
        store(buffer + t * columns + c, read_vector(tensor.data, known, start + t * stride + c));
    // Channels outside: where time is contiguous, each of them is one run of memory.
    for (int c = vectors; c < channels; ++c)
      for (int t = 0; t < steps; ++t)
        buffer[t * columns + c] =
            read(tensor.data, known, start + t * stride + c * tensor.channel_stride);
  });
}

ANYMAMBA_INLINE void store_tile(const float* buffer, int columns, const Tensor3& tensor,
                                std::int64_t row, std::int64_t first_step, std::int64_t direction,
                                int steps, std::int64_t first_channel, int channels) {
  const std::int64_t start = row * tensor.row_stride + first_step * tensor.step_stride +
                             first_channel * tensor.channel_stride;
  const std::int64_t stride = tensor.step_stride * direction;
  const int vectors = tensor.channel_stride == 1 ? channels - channels % W : 0;
  with_type(tensor.type, [=](auto type) {
    const DType known = decltype(type)::value;
    for (int t = 0; t < steps; ++t)
      for (int c = 0; c < vectors; c += W)
        write_vector(tensor.data, known, start + t * stride + c, load(buffer + t * columns + c));
    for (int c = vectors; c < channels; ++c)
      for (int t = 0; t < steps; ++t)
        write(tensor.data, known, start + t * stride + c * tensor.channel_stride,
              buffer[t * columns + c]);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
