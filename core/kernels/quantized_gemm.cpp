// Products of many rows with quantized weights, at the speed of the byte arithmetic. All of x is
// rounded first, then kPanel weight rows are taken at a time:
//
//   for each panel (k / 4, kPanel, 4) of weight rows            a task, on any worker
//     for each kQuantizedTileRows rows of x
//       for each group of k
//         for each four steps of k
//           whole (rows, 2 vectors) += dot4 of the panel and four numbers of each row
//                                                            or eight, where matrices are multiplied
//         total (rows, 2 vectors) += whole x the two scales
//       c (rows, kPanel) += total
#include "kernels/kernels.h"
#include "kernels/quantized_columns.h"
#include "kernels/quantized_panels.h"
#if ANYMAMBA_NEON_I8MM
#include "kernels/quantized_matrices.h"
#else
#include "kernels/quantized_dots.h"
#endif
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// A panel is multiplied with numbers of 4 bits as with those of 8, where that is as fast.
template <int bits>
constexpr int kBitsOfTiles = kIsFasterWithNibbles ? bits : 8;

constexpr int64_t kTaskProducts = 1 << 20;  // less is not worth a hand-over to another thread

// kPanel weight rows, kTogether numbers of each row side by side, and each group's scales.
struct Panel {
  std::uint8_t* q;           // (k / kTogether, kPanel, kTogether)
  float *scales, *offsets;   // (k / group, kPanel)
};

template <int bits>
void pack_panel(const QuantizedRows& rows, int64_t k, int group, const Panel& panel) {
  const int64_t groups = k / group, stride = k * bits / 8;
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    for (int64_t g = 0; g < groups; ++g) {
      std::uint8_t* const to = panel.q + (g * group * kPanel + kTogether * v);
      for_each_sixteen<bits>(rows.q + v * stride + g * group * bits / 8, stride, group,
                             [=](int p, const ByteVec* fours) { pack_sixteen(fours, to + p * kPanel); });
    }
    load_scales(panel.scales + v, kPanel, rows.scales + v * groups, groups);
    if (rows.offsets != nullptr) load_scales(panel.offsets + v, kPanel, rows.offsets + v * groups, groups);
  }
}

// tile (R, kPanel) = R rows of x from `row` on, times the panel.
template <int R, int bits>
void multiply_tile(const QuantizedGemm& p, const QuantizedActivations& x, int64_t row, const Panel& panel,
              float* tile) {
  const int64_t group = p.weight.group, groups = p.k / group;
  const std::int32_t zero_point = zero_point_of_products(p.weight);
  FloatVec total[R][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    IntVec whole[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      whole[r][0] = whole[r][1] = splat_int(-zero_point * x.sums[(row + r) * groups + g]);
    const std::uint8_t* b = panel.q + g * group * kPanel;
    const std::int8_t* a = x.q + row * p.k + g * group;
    multiply_group<R, bits>(a, p.k, b, group, whole);
    // The group's whole numbers become floats.
    const float* const scales = panel.scales + g * kPanel;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const FloatVec scale = splat(x.scales[(row + r) * groups + g]);
      for (int v = 0; v < 2; ++v)
        total[r][v] = fma(as_floats(whole[r][v]), scale * load(scales + v * kLanes), total[r][v]);
    }
    if (p.weight.offsets != nullptr)
      for (int r = 0; r < R; ++r) {
        const FloatVec scaled_sum = splat(x.scales[(row + r) * groups + g] *
                               static_cast<float>(x.sums[(row + r) * groups + g]));
        for (int v = 0; v < 2; ++v)
          total[r][v] = fma(scaled_sum, load(panel.offsets + g * kPanel + v * kLanes), total[r][v]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(tile + r * kPanel + v * kLanes, total[r][v]);
}

template <int R, int bits>
void multiply_tile_of(int64_t rows, const QuantizedGemm& p, const QuantizedActivations& x, int64_t row,
                 const Panel& panel, float* tile) {
  if (rows >= R) return multiply_tile<R, bits>(p, x, row, panel, tile);
  if constexpr (R > 1) multiply_tile_of<R - 1, bits>(rows, p, x, row, panel, tile);
}

void add_tile(const QuantizedGemm& p, const float* tile, int64_t row, int64_t rows,
              int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, columns - j));
      float* const c = p.c + (row + r) * p.c_row_stride + column + j;
      FloatVec sum = load(tile + r * kPanel + j);
      if (p.bias != nullptr) sum += load_some(p.bias + column + j, count);
      if (p.accumulate) sum += load_some(c, count);
      store_some(c, sum, count);
    }
}

// The columns [column, column + columns) of c, at most kPanel.
template <int bits>
void multiply_panel(const QuantizedGemm& p, const QuantizedActivations& x, int64_t column, int64_t columns) {
  const QuantizedWeight& w = p.weight;
  const int64_t groups = p.k / w.group;
  const Scratch<std::uint8_t> packed(kPanel * p.k);
  const Scratch<char> copy(columns < kPanel ? copied_bytes(kPanel, p.k) : 0);
  const Scratch<float> scales(2 * groups * kPanel);
  const Panel panel = {packed, scales, scales + groups * kPanel};
  const QuantizedRows rows = columns < kPanel ? copy_rows(w, p.k, column, columns, kPanel, copy)
                                              : rows_from(w, p.k, column);
  pack_panel<bits>(rows, p.k, w.group, panel);
  alignas(64) float tile[kQuantizedTileRows * kPanel];  // of c
  // Tiles of nearly equal numbers of rows: one of few does little with what it reads of the panel.
  const int64_t high = ceil_div(p.m, ceil_div(p.m, kQuantizedTileRows));
  for (int64_t row = 0; row < p.m; row += high) {
    const int64_t count = smaller(high, p.m - row);
    multiply_tile_of<kQuantizedTileRows, kBitsOfTiles<bits>>(count, p, x, row, panel, tile);
    add_tile(p, tile, row, count, column, columns);
  }
}

}  // namespace

void multiply_panels(const QuantizedGemm& p, const QuantizedActivations& x, int64_t first, int64_t last) {
  for (int64_t column = first; column < last; column += kPanel) {
    const int64_t columns = smaller(kPanel, last - column);
    p.weight.bits == 8 ? multiply_panel<8>(p, x, column, columns) : multiply_panel<4>(p, x, column, columns);
  }
}

void quantized_gemm(const QuantizedGemm& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const int64_t groups = p.k / p.weight.group;
  Scratch<std::int8_t> q(p.m * p.k);
  Scratch<float> scales(p.m * groups);
  Scratch<std::int32_t> sums(p.m * groups);
  const QuantizedActivations x = {p.m, p.k, p.weight.group, q, scales, sums};
  const bool large = p.m * p.n * p.k >= kTaskProducts;
  constexpr int64_t kRowsAtOnce = 16;
  const auto quantize = [&](int64_t task) {
    quantize_activations(p.a, p.a_row_stride, x, task * kRowsAtOnce, smaller((task + 1) * kRowsAtOnce, p.m));
  };
  const auto multiply = [&](int64_t task) {
    multiply_panels(p, x, task * kPanel, smaller((task + 1) * kPanel, p.n));
  };
  const int64_t row_blocks = ceil_div(p.m, kRowsAtOnce), panels = ceil_div(p.n, kPanel);
  if (large) {
    parallel_for(row_blocks, quantize);
    parallel_for(panels, quantized_worker_scratch(p.k), multiply);
  } else {
    for (int64_t i = 0; i < row_blocks; ++i) quantize(i);
    for (int64_t i = 0; i < panels; ++i) multiply(i);
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
