// Products of a few vectors with quantized weights, at the speed of reading the weights.
//
// A group's whole numbers are summed exactly, in any order; the groups' results are floats, added in the
// order of k in the lane of a weight row, whatever else is computed beside it. A single vector takes the
// rows one after the other, for one stream through memory arrives faster than many:
//
//   for each kLanes weight rows
//     for each row, for each group of k
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

constexpr int64_t kPrefetchBytes = 4096;  // ahead in the stream of weights
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
  if (block.offsets == nullptr) whole -= splat_int(f.weight.zero_point() * f.x.sums[at]);
  total = fma(as_floats(whole), scale, total);
  if (block.offsets == nullptr) return total;
  const FloatVec sum = splat(f.x.scales[at] * static_cast<float>(f.x.sums[at]));
  return fma(sum, load(block.offsets + g * kLanes), total);
}

// ---- Row by row --------------------------------------------------------------------------------

// Chunk number `index` of a weight row, as bytes in the order of k.
template <int bits, int G>
ANYMAMBA_INLINE ByteVec chunk_of(const std::uint8_t* row, int64_t index) {
  if constexpr (bits == 8) {
    return load_bytes(row + index * kBytes);
  } else if constexpr (G >= 2 * kBytes) {
    constexpr int64_t chunks = G / kBytes;
    const int64_t inside = index % chunks;
    const ByteVec v = load_bytes(row + index / chunks * (G / 2) + inside % (chunks / 2) * kBytes);
    return inside < chunks / 2 ? low_nibbles(v) : v >> 4;
  } else {
    // The lower and the upper nibbles of half a vector are a group.
    ByteVec v{};
    __builtin_memcpy(&v, row + index * (kBytes / 2), kBytes / 2);
    const ByteVec upper = v >> 4;
    v = low_nibbles(v);
    __builtin_memcpy(reinterpret_cast<char*>(&v) + kBytes / 2, &upper, kBytes / 2);
    return v;
  }
}

// parts (groups, kLanes rows), of each group from `first` on the whole numbers' sums in kLanes parts.
template <int bits, int G>
ANYMAMBA_INLINE void multiply_groups(const QuantizedGemv& f, const RowBlock& block, int64_t first, int64_t groups,
                                     IntVec* parts) {
  constexpr int64_t chunks = G / kBytes;
  const int64_t stride = f.x.k * bits / 8, count = block.count;
  const std::int8_t* const x = f.x.q + first * G;
  const std::uint8_t* q = block.rows.q + first * (G * bits / 8);
  for (int64_t r = 0; r < count; ++r, q += stride)
    for (int64_t g = 0; g < groups; ++g) {
      IntVec whole{};
#pragma GCC unroll 8
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t chunk = g * chunks + c;
        if (bits == 8 || c % 2 == 0) __builtin_prefetch(q + chunk * kBytes * bits / 8 + kPrefetchBytes, 0, 2);
        whole = dot4(whole, chunk_of<bits, G>(q, chunk), load_bytes(x + chunk * kBytes));
      }
      parts[g * kLanes + r] = whole;
    }
}

template <int bits, int G>
void multiply_row_by_row(const QuantizedGemv& f, const RowBlock& block, FloatVec& total) {
  alignas(64) IntVec parts[kPartsAtOnce * kLanes];
  const int64_t groups = f.x.k / G;
  if (block.count < kLanes) __builtin_memset(parts, 0, sizeof parts);
  for (int64_t first = 0; first < groups; first += kPartsAtOnce) {
    const int64_t some = smaller(kPartsAtOnce, groups - first);
    multiply_groups<bits, G>(f, block, first, some, parts);
    for (int64_t g = 0; g < some; ++g)
      total = add_group(f, block, 0, first + g, sums_of_rows(parts + g * kLanes), total);
  }
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
    for_each_four<bits>(block.rows.q + g * group * bits / 8, stride, group, [&](int p, ByteVec fours) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        std::int32_t four;
        __builtin_memcpy(&four, x + m * f.x.k + p, 4);
        whole[m] = dot4(whole[m], fours, (ByteVec)splat_int(four));
      }
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
    if (f.weight.group == 128) return multiply_row_by_row<bits, 128>(f, block, totals[0]);
    if (f.weight.group == 64) return multiply_row_by_row<bits, 64>(f, block, totals[0]);
    if constexpr (kBytes <= 32) return multiply_row_by_row<bits, 32>(f, block, totals[0]);
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
