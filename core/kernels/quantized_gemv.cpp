// Products of a few vectors with quantized weights, at the speed of reading the weights.
//
// A group's whole numbers are summed exactly, in any order; the groups' results are floats, added in the
// order of k in the lane of a weight row, whatever else is computed beside it. A single vector takes few
// rows at a time, for one stream through memory arrives faster than many:
//
//   for each kLanes weight rows
//     for each kQuantizedRowsOfOneVector of them, for each group of k
//       parts (group, row) = dot4 over the group               kLanes sums of whole numbers
//     for each group of k
//       total (kLanes) += sums of the rows' parts x the two scales
//     y (kLanes) = total
//
// For more vectors the rows go along the lanes at once, transposed on the way by words of 32 bits:
//
//   for each kLanes weight rows
//     for each group of k
//       for each four numbers of the rows
//         whole (vectors) += dot4 of them and of each vector
//       total (vectors) += whole x the two scales
//     y (vectors, kLanes) = total
#include "kernels/kernels.h"
#include "kernels/quantized_columns.h"
#include "kernels/quantized_panels.h"
#include "kernels/stream.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int64_t kPrefetchBytes = 8192;  // ahead in the stream of weights
constexpr int64_t kLine = 64;
constexpr int64_t kPartsAtOnce = 32;      // groups of kLanes rows: their parts stay in L1

// kLanes weight rows, of which `count` have results, and their scales (groups, kLanes).
struct RowBlock {
  QuantizedRows rows;
  int64_t row;
  int count;
  const float *scales, *offsets;
};

// total += a group's whole numbers, zero point not yet subtracted, times the scales.
ANYMAMBA_INLINE FloatVec add_group(const QuantizedGemv& f, const RowBlock& block, int m, int64_t g, IntVec whole,
                                   FloatVec total) {
  const int64_t at = m * (f.x.k / f.x.group) + g;
  const FloatVec scale = splat(f.x.scales[at]) * load(block.scales + g * kLanes);
  if (const std::int32_t zero_point = zero_point_of_products(f.weight); zero_point != 0)
    whole -= splat_int(zero_point * f.x.sums[at]);
  total = fma(as_floats(whole), scale, total);
  if (block.offsets == nullptr) return total;
  const FloatVec sum = splat(f.x.scales[at] * static_cast<float>(f.x.sums[at]));
  return fma(sum, load(block.offsets + g * kLanes), total);
}

// ---- Row by row --------------------------------------------------------------------------------

// By 4 in the upper half of the lanes.
ANYMAMBA_INLINE UintVec shifts_of_upper_half() {
  UintVec shifts{};
  for (int i = kLanes / 2; i < kLanes; ++i) shifts[i] = 4;
  return shifts;
}

// A group of a weight row comes in whole vectors, or where it has less, in half a vector.
template <int bits, int G>
constexpr int64_t chunks_of = G * bits / 8 < kBytes ? 1 : G * bits / 8 / kBytes;

// sum += chunk number `index` of a group of a weight row, times the group of x.
template <int bits, int G>
ANYMAMBA_INLINE IntVec add_chunk(const std::uint8_t* q, const std::int8_t* x, int64_t index, IntVec sum) {
  const std::int8_t* const first = x + index * kBytes;
  if constexpr (bits == 8) return dot4(sum, for_dot4(load_bytes(q + index * kBytes)), load_bytes(first));
  if constexpr (G >= 2 * kBytes) {
    const ByteVec v = load_bytes(q + index * kBytes);
    sum = dot4_of_nibbles(sum, low_nibbles(v), load_bytes(first));
    return dot4_of_nibbles(sum, v >> 4, load_bytes(first + G / 2));
  }
  // The lower and the upper nibbles of half a vector are a group.
  const ByteVec v = low_nibbles((ByteVec)((UintVec)load_twice(q) >> shifts_of_upper_half()));
  return dot4_of_nibbles(sum, v, load_bytes(x));
}

// R weight rows, one behind the other, group by group.
template <int bits, int G, int R>
struct RowStreams {
  static constexpr int64_t kGroupBytes = G * bits / 8;
  const std::uint8_t *q, *ahead;
  const std::int8_t* x;
  int64_t stride;

  // From group `first` on of the rows from `row` on.
  RowStreams(const QuantizedGemv& f, const RowBlock& block, int64_t row, int64_t first)
      : x(f.x.q + first * G), stride(f.x.k * bits / 8) {
    const std::uint8_t* const rows = block.rows.q + row * stride;
    q = rows + first * kGroupBytes;
    ahead = rows + first * kGroupBytes * R + kPrefetchBytes;
  }
};

// whole (R): the next group's whole numbers, each row's in kLanes parts.
template <int bits, int G, int R>
ANYMAMBA_INLINE void next_group(RowStreams<bits, G, R>& rows, IntVec (&whole)[R]) {
  constexpr int64_t bytes = RowStreams<bits, G, R>::kGroupBytes;
  // The rows are one stretch of memory: what comes behind it arrives in its order.
  for (int64_t byte = 0; byte < bytes * R; byte += kLine) __builtin_prefetch(rows.ahead + byte, 0, 2);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) whole[r] = IntVec{};
#pragma GCC unroll 8
  for (int64_t c = 0; c < chunks_of<bits, G>; ++c)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) whole[r] = add_chunk<bits, G>(rows.q + r * rows.stride, rows.x, c, whole[r]);
  rows.q += bytes, rows.ahead += bytes * R, rows.x += G;
}

// parts (groups, kLanes rows): of R rows from `row` on, and of each group from `first` on.
template <int bits, int G, int R>
ANYMAMBA_INLINE void multiply_groups(const QuantizedGemv& f, const RowBlock& block, int64_t row, int64_t first,
                                     int64_t groups, PartVec* parts) {
  RowStreams<bits, G, R> rows(f, block, row, first);
  for (int64_t g = 0; g < groups; ++g) {
    IntVec whole[R];
    next_group(rows, whole);
    for (int r = 0; r < R; ++r) parts[g * kLanes + row + r] = part_of(whole[r]);
  }
}

template <int bits, int G>
void multiply_row_by_row(const QuantizedGemv& f, const RowBlock& block, FloatVec& total) {
  alignas(64) PartVec parts[kPartsAtOnce * kLanes];
  const int64_t groups = f.x.k / G;
  if (block.count < kLanes) __builtin_memset(parts, 0, sizeof parts);
  for (int64_t first = 0; first < groups; first += kPartsAtOnce) {
    const int64_t some = smaller(kPartsAtOnce, groups - first);
    int64_t row = 0;
    for (; row + kQuantizedRowsOfOneVector <= block.count; row += kQuantizedRowsOfOneVector)
      multiply_groups<bits, G, kQuantizedRowsOfOneVector>(f, block, row, first, some, parts);
    for (; row < block.count; ++row) multiply_groups<bits, G, 1>(f, block, row, first, some, parts);
    for (int64_t g = 0; g < some; ++g)
      total = add_group(f, block, 0, first + g, sums_of_parts(parts + g * kLanes), total);
  }
}

// The same where all rows go beside each other: their parts stay in registers.
template <int bits, int G>
void multiply_rows_beside(const QuantizedGemv& f, const RowBlock& block, FloatVec& total) {
  RowStreams<bits, G, kLanes> rows(f, block, 0, 0);
  for (int64_t g = 0; g < f.x.k / G; ++g) {
    IntVec whole[kLanes];
    next_group(rows, whole);
    PartVec parts[kLanes];
    for (int r = 0; r < kLanes; ++r) parts[r] = part_of(whole[r]);
    total = add_group(f, block, 0, g, sums_of_parts(parts), total);
  }
}

template <int bits, int G>
void multiply_groups_of(const QuantizedGemv& f, const RowBlock& block, FloatVec& total) {
  if constexpr (kQuantizedRowsOfOneVector == kLanes) multiply_rows_beside<bits, G>(f, block, total);
  else multiply_row_by_row<bits, G>(f, block, total);
}

// ---- Rows along the lanes ----------------------------------------------------------------------

template <int bits, int M>
void multiply_across(const QuantizedGemv& f, const RowBlock& block, Stream stream, FloatVec* totals) {
  const int group = f.weight.group;
  const int64_t groups = f.x.k / group, stride = f.x.k * bits / 8;
  FloatVec sums[M] = {};
  for (int64_t g = 0; g < groups; ++g) {
    stream.fetch_lines(kLanes * (group * bits / 8));
    IntVec whole[M] = {};
    const std::int8_t* const x = f.x.q + g * group;
    for_each_sixteen<bits>(block.rows.q + g * group * bits / 8, stride, group, [&](int p, const ByteVec* fours) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) whole[m] = dot4_row<bits>(whole[m], fours[i], x + m * f.x.k + p, i);
    });
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[m] = add_group(f, block, m, g, whole[m], sums[m]);
  }
  for (int m = 0; m < M; ++m) totals[m] = sums[m];
}

// ---- Blocks of rows ----------------------------------------------------------------------------

template <int bits, int M>
void multiply_block(const QuantizedGemv& f, const RowBlock& block, const Stream& stream, FloatVec* totals) {
  if constexpr (M == 1) {
    if (f.weight.group == 128) return multiply_groups_of<bits, 128>(f, block, totals[0]);
    if (f.weight.group == 64) return multiply_groups_of<bits, 64>(f, block, totals[0]);
    if constexpr (kBytes <= 16) return multiply_groups_of<bits, 32>(f, block, totals[0]);
  }
  multiply_across<bits, M>(f, block, stream, totals);
}

void write_results(const QuantizedGemv& f, const RowBlock& block, const FloatVec* totals) {
  for (int64_t m = 0; m < f.x.rows; ++m) {
    float* const y = f.y + m * f.y_row_stride + block.row;
    FloatVec total = totals[m];
    if (f.bias != nullptr) total += load_some(f.bias + block.row, block.count);
    if (f.accumulate) total += load_some(y, block.count);
    store_some(y, total, block.count);
  }
}

template <int bits, int M>
void multiply_range(const QuantizedGemv& f, int64_t first, int64_t last) {
  const int64_t k = f.x.k, groups = k / f.x.group, bytes = kLanes * (k * bits / 8);
  const Scratch<float> scales(2 * kLanes * groups);
  const Scratch<char> copy((last - first) % kLanes == 0 ? 0 : copied_bytes(kLanes, k));
  for (int64_t row = first; row < last; row += kLanes) {
    RowBlock block = {rows_from(f.weight, k, row), row, static_cast<int>(smaller(kLanes, last - row)), scales,
                      nullptr};
    if (block.count < kLanes) block.rows = copy_rows(f.weight, k, row, block.count, kLanes, copy);
    load_scales(scales, kLanes, block.rows.scales, groups);
    if (block.rows.offsets != nullptr) {
      load_scales(scales + kLanes * groups, kLanes, block.rows.offsets, groups);
      block.offsets = scales + kLanes * groups;
    }
    FloatVec totals[M] = {};
    const Stream stream = row + kLanes < last ? stream_behind(block.rows.q, bytes, (last - row) * (bytes / kLanes))
                                              : Stream{};
    multiply_block<bits, M>(f, block, stream, totals);
    write_results(f, block, totals);
  }
}

template <int bits, int M>
void multiply_vectors(const QuantizedGemv& f, int64_t first, int64_t last) {
  if (f.x.rows == M) return multiply_range<bits, M>(f, first, last);
  if constexpr (M > 1) multiply_vectors<bits, M - 1>(f, first, last);
}

}  // namespace

void quantized_gemv(const QuantizedGemv& f, int64_t first, int64_t last) {
  if (f.x.rows > kQuantizedGemvVectors) {
    QuantizedGemm product;
    product.m = f.x.rows, product.n = last, product.k = f.x.k, product.weight = f.weight;
    product.c = f.y, product.c_row_stride = f.y_row_stride;
    product.bias = f.bias, product.accumulate = f.accumulate;
    return multiply_panels(product, f.x, first, last);
  }
  f.weight.bits == 8 ? multiply_vectors<8, kQuantizedGemvVectors>(f, first, last)
                     : multiply_vectors<4, kQuantizedGemvVectors>(f, first, last);
}

}  // namespace anymamba::ANYMAMBA_ISA
