// Rows of quantized weights across each other: what a product with kLanes of them at a time reads.
#pragma once

#include "kernels/quantized.h"
#include "simd/lanes.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

ANYMAMBA_INLINE ByteVec low_nibbles(ByteVec v) { return v & (ByteVec{} + static_cast<std::uint8_t>(15)); }

// Bytes of 8-bit weights as dot4 takes them.
ANYMAMBA_INLINE ByteVec for_dot4(ByteVec v) {
  return kSignedBytes ? v ^ (ByteVec{} + static_cast<std::uint8_t>(128)) : v;
}

// What products of such bytes are too large by, for each unit of x: the zero point, less what for_dot4 takes away.
ANYMAMBA_INLINE std::int32_t zero_point_of_products(const QuantizedWeight& w) {
  return (w.offsets == nullptr ? w.zero_point() : 0) - (kSignedBytes && w.bits == 8 ? 128 : 0);
}

// Calls each(p, fours) for every sixteen numbers p.. of a group of kLanes rows, a row's in a lane: fours (4,
// kLanes). `rows` is where the group lies in the first row, `stride` bytes the way to the next.
template <int bits, class Each>
ANYMAMBA_INLINE void for_each_sixteen(const std::uint8_t* rows, int64_t stride, int group, const Each& each) {
  const int bytes = group * bits / 8;
  for (int byte = 0; byte < bytes; byte += 16) {
    FloatVec words[4];
    load_columns(words, rows + byte, stride);
    ByteVec fours[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) fours[i] = bits == 8 ? for_dot4((ByteVec)words[i]) : low_nibbles((ByteVec)words[i]);
    each(byte, fours);
    if constexpr (bits == 8) continue;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) fours[i] = (ByteVec)words[i] >> 4;
    each(byte + bytes, fours);
  }
}

// out (groups, kLanes), `out_stride` between groups = bfloat16 numbers (rows, groups) of kLanes rows.
inline void load_scales(float* out, int64_t out_stride, const std::uint16_t* rows, int64_t groups) {
  constexpr int kAtOnce = 8;  // four words of two
  std::uint16_t few[kAtOnce * (kLanes + 1)];
  if (groups < kAtOnce) {  // from a copy, behind which there is memory to read
    __builtin_memcpy(few, rows, static_cast<std::size_t>(kLanes * groups) * sizeof *few);
    rows = few;
  }
  for (int64_t g = 0; g < groups; g += kAtOnce) {
    const int64_t from = larger(0, smaller(g, groups - kAtOnce));  // the last overlap those before
    FloatVec words[4];
    load_columns(words, rows + from, 2 * groups);
    for (int i = 0; i < smaller(kAtOnce, groups); ++i)
      store(out + (from + i) * out_stride, i % 2 ? second_of_pairs(words[i / 2]) : first_of_pairs(words[i / 2]));
  }
}

// Neighbouring rows of a weight, and their scales.
struct QuantizedRows {
  const std::uint8_t* q;
  const std::uint16_t *scales, *offsets;  // offsets may be null
};

ANYMAMBA_INLINE QuantizedRows rows_from(const QuantizedWeight& w, int64_t k, int64_t row) {
  const int64_t groups = k / w.group;
  return {w.q + row * (k * w.bits / 8), w.scales + row * groups,
          w.offsets != nullptr ? w.offsets + row * groups : nullptr};
}

// What a copy of `rows` rows takes.
constexpr int64_t copied_bytes(int64_t rows, int64_t k) { return rows * (k + 2 * 2 * k / 32); }

// The same rows in `memory`, zeros behind the first `count` up to `rows`.
inline QuantizedRows copy_rows(const QuantizedWeight& w, int64_t k, int64_t row, int64_t count, int64_t rows,
                               void* memory) {
  const QuantizedRows from = rows_from(w, k, row);
  const auto bytes = static_cast<std::size_t>(k * w.bits / 8), n = static_cast<std::size_t>(rows);
  const auto scale_bytes = static_cast<std::size_t>(k / w.group * 2), some = static_cast<std::size_t>(count);
  char* to = static_cast<char*>(memory);
  const auto copy = [&](const void* part, std::size_t size) {
    char* const place = to;
    __builtin_memcpy(place, part, some * size);
    __builtin_memset(place + some * size, 0, (n - some) * size);
    to += n * size;
    return place;
  };
  QuantizedRows copied = {reinterpret_cast<std::uint8_t*>(copy(from.q, bytes)),
                          reinterpret_cast<std::uint16_t*>(copy(from.scales, scale_bytes)), nullptr};
  if (from.offsets != nullptr)
    copied.offsets = reinterpret_cast<std::uint16_t*>(copy(from.offsets, scale_bytes));
  return copied;
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
