// Whole numbers of a panel of quantized weights times rows, by dot products of four bytes a lane.
#pragma once

#include "base/integers.h"
#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

constexpr int kPanel = 2 * kLanes;  // weight rows
constexpr int kTogether = 4;        // numbers of a row side by side

// to (16 / kTogether, kPanel, kTogether) = sixteen numbers of kLanes of the panel's rows, fours (4, kLanes).
ANYMAMBA_INLINE void pack_sixteen(const ByteVec* fours, std::uint8_t* to) {
  for (int i = 0; i < 4; ++i, to += kTogether * kPanel) __builtin_memcpy(to, &fours[i], sizeof fours[i]);
}

// whole (R, 2 vectors) += R rows x, `stride` bytes apart, times a group of the panel.
template <int R, int bits>
ANYMAMBA_INLINE void multiply_group(const std::int8_t* x, int64_t stride, const std::uint8_t* panel, int64_t group,
                                    IntVec (&whole)[R][2]) {
  for (int64_t p = 0; p < group; p += 4 * kQuantizedTileFours, x += 4 * kQuantizedTileFours)
#pragma GCC unroll 4
    for (int i = 0; i < kQuantizedTileFours; ++i, panel += 2 * kBytes) {
      const ByteVec b0 = load_bytes(panel), b1 = load_bytes(panel + kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        whole[r][0] = dot4_row<bits>(whole[r][0], b0, x + r * stride, i);
        whole[r][1] = dot4_row<bits>(whole[r][1], b1, x + r * stride, i);
      }
    }
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
