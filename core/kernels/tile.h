// Moving a tile of a sequence, (steps, channels), between memory of any type and strides and a
// buffer of floats (steps, columns) that kernels compute on.
#pragma once

#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {

// Neighbouring steps of a row, in the order of the recurrence: step t of the slice is step
// first + t * direction of the row. A whole segment's slice also tells its states.
struct SegmentSlice {
  std::int64_t row = 0, first = 0, direction = 1, steps = 0;
  std::int64_t state_in = -1, state_out = -1;
};

ANYMAMBA_INLINE SegmentSlice slice_of(const Segments& segments, std::int64_t s) {
  const std::int64_t start = segments.starts[s], stop = segments.stops[s];
  return {segments.rows[s], segments.reverse ? stop - 1 : start, segments.reverse ? -1 : 1,
          stop - start,     segments.state_in[s],                segments.state_out[s]};
}

ANYMAMBA_INLINE SegmentSlice part_of(const SegmentSlice& s, std::int64_t start, std::int64_t steps) {
  return {s.row, s.first + start * s.direction, s.direction, steps};
}

// Neighbouring channels [first, first + channels), padded to `columns`, a multiple of kLanes.
struct Block {
  std::int64_t first;
  int channels, columns;
};

// Block number `index` of those of `width` channels that [first, last) is cut into.
ANYMAMBA_INLINE Block block_of(std::int64_t first, std::int64_t last, int width, std::int64_t index) {
  const std::int64_t start = first + index * width;
  const int channels = static_cast<int>(smaller(width, last - start));
  return {start, channels, static_cast<int>(round_up(channels, kLanes))};
}

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

// buffer (steps, columns) = the slice's steps of the block's channels, zeros in the other columns.
ANYMAMBA_INLINE void load_tile(float* buffer, const Tensor3& tensor, const SegmentSlice& slice,
                               const Block& block) {
  const int columns = block.columns, channels = block.channels;
  const int steps = static_cast<int>(slice.steps);
  const std::int64_t direction = slice.direction, stride = tensor.step_stride * direction;
  const std::int64_t start = slice.row * tensor.row_stride + slice.first * tensor.step_stride +
                             block.first * tensor.channel_stride;
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

ANYMAMBA_INLINE void store_tile(const float* buffer, const Tensor3& tensor, const SegmentSlice& slice,
                                const Block& block) {
  const int columns = block.columns, channels = block.channels;
  const int steps = static_cast<int>(slice.steps);
  const std::int64_t direction = slice.direction, stride = tensor.step_stride * direction;
  const std::int64_t start = slice.row * tensor.row_stride + slice.first * tensor.step_stride +
                             block.first * tensor.channel_stride;
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

// Memory that is asked for ahead, into L2, while a loop goes on: a line of cache in each turn. Many
// at once would block what else is under way.
struct Ahead {
  const char* next;
  std::int64_t stride;  // bytes

  void fetch_line() {
    __builtin_prefetch(next, 0, 2);
    next += stride;
  }
};

// Tiles that will be read or written later, as strips of at most kRows lines. Their rows are far
// apart, which hardware does not foresee.
class TilesAhead {
 public:
  static constexpr std::int64_t kRows = 32;

  void add(const Tensor3& tensor, const SegmentSlice& slice, const Block& b) {
    const bool by_step = tensor.channel_stride == 1;
    if (!tensor || slice.steps == 0 || (!by_step && tensor.step_stride != 1)) return;
    const std::int64_t size = size_of(tensor.type);
    const std::int64_t lowest = slice.direction > 0 ? slice.first : slice.first - (slice.steps - 1);
    const char* const start = static_cast<const char*>(tensor.data) +
                              (slice.row * tensor.row_stride + lowest * tensor.step_stride +
                               b.first * tensor.channel_stride) * size;
    const std::int64_t rows = by_step ? slice.steps : b.channels;
    const std::int64_t bytes = (by_step ? b.channels : slice.steps) * size;
    const std::int64_t stride = (by_step ? tensor.step_stride : tensor.channel_stride) * size;
    for (std::int64_t row = 0; row < rows; row += kRows)
      for (std::int64_t byte = 0; byte < bytes && count_ < kMost; byte += 64)
        strips_[count_++] = {start + row * stride + byte, stride};
  }

  int count() const { return count_; }
  // One of them, or behind the last one a line that is at hand.
  Ahead operator[](std::int64_t index) const {
    return index < count_ ? strips_[index] : Ahead{reinterpret_cast<const char*>(this), 0};
  }

 private:
  static constexpr int kMost = 16;
  int count_ = 0;
  Ahead strips_[kMost];
};

namespace {

// The same out of line, where a kernel moves many tiles.
inline void read_tile(float* buffer, const Tensor3& tensor, const SegmentSlice& slice,
                      const Block& block) {
  load_tile(buffer, tensor, slice, block);
}

inline void write_tile(const float* buffer, const Tensor3& tensor, const SegmentSlice& slice,
                       const Block& block) {
  store_tile(buffer, tensor, slice, block);
}

}  // namespace

}  // namespace anymamba::ANYMAMBA_ISA
