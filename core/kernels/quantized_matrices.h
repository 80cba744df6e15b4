// Whole numbers of a panel of quantized weights times rows, by products of 2 x 8 by 8 x 2 bytes.
#pragma once

#include "base/integers.h"
#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

constexpr int kPanel = 2 * kLanes;  // weight rows
constexpr int kTogether = 8;        // numbers of a row side by side
static_assert(kLanes == 4);         // a vector holds 2 x 2 sums

// to (16 / kTogether, kPanel, kTogether) = sixteen numbers of kLanes of the panel's rows, fours (4, kLanes).
ANYMAMBA_INLINE void pack_sixteen(const ByteVec* fours, std::uint8_t* to) {
  for (int i = 0; i < 4; i += 2, to += kTogether * kPanel) {
    const FloatVec first = (FloatVec)fours[i], second = (FloatVec)fours[i + 1];
    store(reinterpret_cast<float*>(to), interleave_low(first, second));
    store(reinterpret_cast<float*>(to + kBytes), interleave_high(first, second));
  }
}

// whole (R, 2 vectors) += R rows x, `stride` bytes apart, times a group of the panel. The number of bits makes
// no difference here, as it does in quantized_dots.h.
template <int R, int bits>
ANYMAMBA_INLINE void multiply_group(const std::int8_t* x, int64_t stride, const std::uint8_t* panel, int64_t group,
                                    IntVec (&whole)[R][2]) {
  constexpr int kPairs = (R + 1) / 2, kVectors = kPanel / 2;  // of rows; of the panel, for eight steps of k
  IntVec sums[kPairs][kVectors] = {};
  for (int64_t p = 0; p < group; p += 16) {
    int64x2_t rows[kPairs][2];  // eight bytes of each of two rows, and the next eight
#pragma GCC unroll 8
    for (int i = 0; i < kPairs; ++i) {
      const std::int8_t* const row = x + 2 * i * stride + p;
      const int64x2_t first = (int64x2_t)load_bytes(row);
      const int64x2_t second = (int64x2_t)load_bytes(2 * i + 1 < R ? row + stride : row);
      rows[i][0] = vzip1q_s64(first, second);
      rows[i][1] = vzip2q_s64(first, second);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half, panel += kVectors * kBytes)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const ByteVec columns = load_bytes(panel + v * kBytes);
#pragma GCC unroll 8
        for (int i = 0; i < kPairs; ++i) sums[i][v] = multiply_matrices(sums[i][v], columns, (ByteVec)rows[i][half]);
      }
  }
  // Two columns of the panel and two rows lie in a vector: the even lanes are of the first row.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int32x4_t low = (int32x4_t)sums[r / 2][2 * v], high = (int32x4_t)sums[r / 2][2 * v + 1];
      whole[r][v] += (IntVec)(r % 2 == 0 ? vuzp1q_s32(low, high) : vuzp2q_s32(low, high));
    }
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
