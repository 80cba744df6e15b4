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
constexpr int kRowPadding = 16;  // floats: keeps packed rows from falling into the same cache sets

// One factor, (outer, k): `stride` lies between rows of the left and columns of the right operand,
// `depth_stride` between steps of k.
struct Operand {
  const void* data;
  DType type;
  int64_t stride, depth_stride;
};

// Left rows as the micro-kernel reads them: number p of row i is
// data[i * stride + p * depth_stride].
struct LeftPanel {
  const float* data;
  int64_t stride, depth_stride;
};

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

// Panels of kTileRows rows that are neighbours in memory. A few steps of k at a time go through all
// panels, so that each line of cache is read once, however far apart the steps lie: at a power of
// two they share few sets.
template <DType type>
void interleave_neighbours(const Operand& left, int64_t start, int64_t rows, int64_t depth,
                           float* packed) {
  constexpr int64_t kSteps = 8;
  for (int64_t first = 0; first < depth; first += kSteps) {
    const int64_t last = smaller(depth, first + kSteps);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      float* to = packed + i * depth + first * kTileRows;
      int64_t from = start + i + first * left.depth_stride;
      const bool whole = i + kTileRows <= rows;
      for (int64_t p = first; p < last; ++p, to += kTileRows, from += left.depth_stride)
        if (whole) read_neighbours<type>(to, left.data, from, kTileRows);
        else read_neighbours<type>(to, left.data, from, rows - i);
    }
  }
}

// Rows of the left operand along k become rows of floats; otherwise panels of kTileRows rows are
// interleaved, number p of each row in the panel beside the next row's.
template <DType type>
LeftPanel pack_left(const Operand& left, int64_t first_row, int64_t rows, int64_t first_depth,
                    int64_t depth, float* packed) {
  const int64_t start = first_row * left.stride + first_depth * left.depth_stride;
  if (left.depth_stride == 1) {
    const int64_t stride = round_up(depth, 16) + kRowPadding, size = size_of(type);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t from = start + i * left.stride;
      float* to = packed + i * stride;
      const int64_t ahead = i + 4 < rows ? 4 * left.stride : 0;
      int64_t p = 0;
      for (; p + kLanes <= depth; p += kLanes) {
        __builtin_prefetch(static_cast<const char*>(left.data) + (from + ahead + p) * size);
        store(to + p, read_vector(left.data, type, from + p));
      }
      for (; p < depth; ++p) to[p] = read(left.data, type, from + p);
    }
    return {packed, stride, 1};
  }
  if (left.stride == 1) {
    interleave_neighbours<type>(left, start, rows, depth, packed);
    return {packed, 1, kTileRows};
  }
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t from = start + i * left.stride, count = smaller(kTileRows, rows - i);
    float* to = packed + i * depth;
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t r = 0; r < count; ++r)
        to[p * kTileRows + r] = read(left.data, type, from + p * left.depth_stride + r * left.stride);
  }
  return {packed, 1, kTileRows};
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
      int64_t p = 0;
      for (; p + kLanes <= depth; p += kLanes) {
        FloatVec v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = read_vector(right.data, type, from + i * right.stride + p);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(panel + (p + i) * width + j, v[i]);
      }
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
