// The operands of a product, and their packing into panels of floats.
#pragma once

#include "base/types.h"
#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

// A tile of c is kTileRows x kTileVectors vectors.
constexpr int kTileRows = kGemmTileRows;
constexpr int kTileVectors = 2;
constexpr int kTileColumns = kTileVectors * kLanes;
static_assert(kTileRows <= kLanes || kTileRows % kLanes == 0);  // squares of kLanes transposed have a tile's rows

// One factor, (outer, k): `stride` lies between rows of the left and columns of the right operand,
// `depth_stride` between steps of k.
struct Operand {
  const void* data;
  DType type;
  int64_t stride, depth_stride;
};

// Two bfloat16 neighbours along k as one number of 32 bits, where the processor multiplies such
// pairs: half as many of them, moved and packed as floats are. Only the sums know the difference.
inline bool multiplies_pairs(const Operand& left, const Operand& right, int64_t depth) {
  const auto in_pairs = [](const Operand& o) {
    return o.type == DType::bf16 && o.depth_stride == 1 && o.stride % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(o.data) % 4 == 0;
  };
  return kMultipliesPairs && in_pairs(left) && in_pairs(right) && depth % 2 == 0;
}

// `count` neighbours from number `from` on, as floats. A count that the compiler knows becomes a few
// moves.
template <DType type>
ANYMAMBA_INLINE void read_neighbours(float* to, const void* data, int64_t from, int64_t count) {
  if constexpr (type == DType::f32)
    __builtin_memcpy(to, static_cast<const float*>(data) + from,
                     static_cast<std::size_t>(count) * sizeof(float));
  else
    for (int64_t r = 0; r < count; ++r) to[r] = read(data, type, from + r);
}

// What a panel of left rows takes, and how many rows each has at most, so that the last is not much
// smaller than the others: a tile of few rows does little with what it reads of the right operand.
constexpr int64_t panel_floats(int64_t depth) { return kTileRows * depth; }

ANYMAMBA_INLINE int64_t rows_of_tiles(int64_t rows) {
  return ceil_div(rows, larger(1, ceil_div(rows, kTileRows)));
}

// Panels of `high` rows that are neighbours in memory. A few steps of k at a time go through all
// panels, so that each line of cache is read once, however far apart the steps lie: at a power of
// two they share few sets.
template <DType type>
void interleave_neighbours(const Operand& left, int64_t start, int64_t rows, int64_t high, int64_t depth,
                           float* packed) {
  constexpr int64_t kSteps = 8;
  for (int64_t first = 0; first < depth; first += kSteps) {
    const int64_t last = smaller(depth, first + kSteps);
    for (int64_t i = 0; i < rows; i += high) {
      float* to = packed + i / high * panel_floats(depth) + first * kTileRows;
      int64_t from = start + i + first * left.depth_stride;
      const int64_t count = smaller(high, rows - i);
      for (int64_t p = first; p < last; ++p, to += kTileRows, from += left.depth_stride)
        if (count == kTileRows) read_neighbours<type>(to, left.data, from, kTileRows);
        else read_neighbours<type>(to, left.data, from, count);
    }
  }
}

// Calls each(p, v) for steps of k as long as they come in squares or fours, v holding the numbers of
// kLanes rows along k, of which there are `count`, at step p. Returns how many steps those are.
template <DType type, class Each>
ANYMAMBA_INLINE int64_t for_each_step(const Operand& rows, int64_t start, int64_t count, int64_t depth,
                                      const Each& each) {
  int64_t p = 0;
  if (type == DType::f32 && count >= kLanes)
    for (; p + 4 <= depth; p += 4) {
      FloatVec v[4];
      load_columns(v, static_cast<const float*>(rows.data) + start + p, 4 * rows.stride);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) each(p + i, v[i]);
    }
  const auto* const halves = static_cast<const std::uint16_t*>(rows.data) + start;
  if (type == DType::bf16 && count >= kLanes)  // two numbers a word
    for (; p + 8 <= depth; p += 8) {
      FloatVec words[4];
      load_columns(words, halves + p, 2 * rows.stride);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        each(p + 2 * i, first_of_pairs(words[i]));
        each(p + 2 * i + 1, second_of_pairs(words[i]));
      }
    }
  for (; p + kLanes <= depth; p += kLanes) {
    FloatVec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      v[i] = read_vector(rows.data, type, start + smaller(i, count - 1) * rows.stride + p);
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) each(p + i, v[i]);
  }
  return p;
}

// One panel of the first of `count` rows that go along k. Where a vector has more rows than the panel,
// they are overwritten by the next step's; the last has the rows alone.
template <DType type>
void interleave_rows(const Operand& left, int64_t start, int64_t count, int64_t depth, float* to) {
  for (int64_t r = 0; r < smaller(kTileRows, count); r += kLanes, start += kLanes * left.stride, to += kLanes) {
    int64_t p = for_each_step<type>(left, start, count - r, depth, [=](int64_t step, const FloatVec& v) {
      if (kTileRows % kLanes == 0 || step + 1 < depth) store(to + step * kTileRows, v);
      else store_some(to + step * kTileRows, v, kTileRows);
    });
    const int64_t rows = smaller(smaller(kLanes, kTileRows), count - r);
    for (; p < depth; ++p)
      for (int64_t i = 0; i < rows; ++i) to[p * kTileRows + i] = read(left.data, type, start + i * left.stride + p);
  }
}

// packed: panels of `high` rows, (depth, kTileRows), a row's number beside the next row's. What a
// panel lacks of kTileRows rows means nothing.
template <DType type>
void pack_left(const Operand& left, int64_t first_row, int64_t rows, int64_t high, int64_t first_depth,
               int64_t depth, float* packed) {
  const int64_t start = first_row * left.stride + first_depth * left.depth_stride;
  if (left.stride == 1 && left.depth_stride != 1)
    return interleave_neighbours<type>(left, start, rows, high, depth, packed);
  for (int64_t i = 0; i < rows; i += high) {
    const int64_t from = start + i * left.stride, count = smaller(high, rows - i);
    float* const to = packed + i / high * panel_floats(depth);
    if (left.depth_stride == 1) {
      interleave_rows<type>(left, from, rows - i, depth, to);
      continue;
    }
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t r = 0; r < count; ++r)
        to[p * kTileRows + r] = read(left.data, type, from + p * left.depth_stride + r * left.stride);
  }
}

// panel (depth, width) = right (first_depth.., first_column..), zeros behind the last column.
template <DType type>
void pack_right(const Operand& right, int64_t first_column, int64_t columns, int64_t first_depth,
                int64_t depth, int64_t width, float* panel) {
  const int64_t start = first_column * right.stride + first_depth * right.depth_stride;
  int64_t j = 0;
  if (right.stride == 1) {
    const int64_t whole = columns / kLanes * kLanes;
    for (int64_t p = 0; p < depth; ++p)
      for (j = 0; j < whole; j += kLanes)
        store(panel + p * width + j, read_vector(right.data, type, start + p * right.depth_stride + j));
    j = whole;
  } else if (right.depth_stride == 1) {
    for (; j + kLanes <= columns; j += kLanes) {
      const int64_t from = start + j * right.stride;
      int64_t p = for_each_step<type>(
          right, from, kLanes, depth,
          [=](int64_t step, const FloatVec& v) { store(panel + step * width + j, v); });
      for (; p < depth; ++p)
        for (int i = 0; i < kLanes; ++i)
          panel[p * width + j + i] = read(right.data, type, from + i * right.stride + p);
    }
  }
  for (; j < width; ++j)
    for (int64_t p = 0; p < depth; ++p)
      panel[p * width + j] =
          j < columns ? read(right.data, type, start + p * right.depth_stride + j * right.stride) : 0.0f;
}

// The functions for a pair of types.
struct Packing {
  decltype(&pack_left<DType::f32>) left;
  decltype(&pack_right<DType::f32>) right;
};

inline Packing packing_of(DType left, DType right) {
  Packing packing = {};
  with_type(left, [&](auto type) { packing.left = pack_left<decltype(type)::value>; });
  with_type(right, [&](auto type) { packing.right = pack_right<decltype(type)::value>; });
  return packing;
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
