// Products with quantized weights: one vector or a few at the speed of reading the weights, many
// rows at the speed of the byte arithmetic.
//
// A few rows (quantized_gemv) read each weight row in chunks of kBytes numbers. A group is some
// chunks, or one, or half of one: then the lanes of a chunk's sums belong to two groups.
//
//   for each block of weight rows that L2 holds
//     for each kQuantizedGemvVectors vectors of x
//       for each weight row
//         for each group of k
//           whole (vectors) = dot4 over the group's chunks      32-bit numbers, in registers
//           sums (vectors) += whole x the two scales
//
// Many rows (quantized_gemm) round all of x first, then take kPanel weight rows at a time:
//
//   for each panel (k / 4, kPanel, 4) of weight rows            a task, on any worker
//     for each kQuantizedTileRows rows of x
//       for each group of k
//         for each four steps of k
//           whole (rows, 2 vectors) += dot4 of the panel and four numbers of each row
//         total (rows, 2 vectors) += whole x the two scales
//       c (rows, kPanel) += total
#include "kernels/kernels.h"
#include "simd/lanes.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kPrefetchBytes = 4096;    // ahead in the stream of weights
constexpr int kPanel = 2 * kLanes;          // weight rows
constexpr int64_t kL2Bytes = 128 << 10;     // of weight rows that L2 holds for all vectors
constexpr int64_t kTaskProducts = 1 << 20;  // less is not worth a hand-over to another thread

// ---- Rounding rows to 8 bits -------------------------------------------------------------------

typedef std::int8_t SmallIntVec __attribute__((vector_size(kLanes)));

// A group of smaller numbers counts as zeros: 127 / largest would leave float32. 2^-100.
constexpr float kSmallest = 7.888609052210118e-31f;

// The whole numbers next to x * y, ties to even. The product is not rounded before, on any machine.
ANYMAMBA_INLINE IntVec nearest(FloatVec x, FloatVec y) {
  if constexpr (kFusedMultiplyAdd)  // adding kRounder rounds to a whole number
    return __builtin_convertvector(fma(x, y, splat(kRounder)) - splat(kRounder), IntVec);
  IntVec v;
  for (int i = 0; i < kLanes; ++i)
    v[i] = static_cast<std::int32_t>(
        __builtin_nearbyint(static_cast<double>(x[i]) * static_cast<double>(y[i])));
  return v;
}

// q = x / scale, rounded to nearest even, with scale = max |x| / 127.
void quantize_group(const float* x, int group, std::int8_t* q, float& scale, std::int32_t& sum) {
  FloatVec most{}, wrong{};
  for (int i = 0; i < group; i += kLanes) {
    const FloatVec v = load(x + i), magnitude = v < FloatVec{} ? -v : v;
    most = magnitude > most ? magnitude : most;
    wrong = fma(v, FloatVec{}, wrong);  // not 0 where a number is infinite or none
  }
  float largest = 0;
  for (int i = 0; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const bool finite = anymamba::ANYMAMBA_ISA::sum(wrong) == 0.0f;
  const FloatVec inverse = splat(finite && largest >= kSmallest ? 127.0f / largest : 0.0f);
  IntVec total{};
  for (int i = 0; i < group; i += kLanes) {
    const IntVec whole = nearest(finite ? load(x + i) : FloatVec{}, inverse);
    const SmallIntVec small = __builtin_convertvector(whole, SmallIntVec);
    __builtin_memcpy(q + i, &small, sizeof small);
    total += whole;
  }
  sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  scale = finite ? largest / 127.0f : __builtin_nanf("");  // so are all results of the group
}

// ---- Weight rows -------------------------------------------------------------------------------

ANYMAMBA_INLINE ByteVec low_nibbles(ByteVec v) { return v & (ByteVec{} + static_cast<std::uint8_t>(15)); }

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
    // The lower and the upper nibbles of one group, or of two, make a chunk.
    constexpr int half = G / 2;
    ByteVec v{};
    __builtin_memcpy(&v, row + index * (kBytes / 2), kBytes / 2);
    const ByteVec parts[2] = {low_nibbles(v), v >> 4};
    for (int at = 0; at < kBytes; at += half)
      __builtin_memcpy(reinterpret_cast<char*>(&v) + at,
                       reinterpret_cast<const char*>(&parts[at / half % 2]) + at / G * half, half);
    return v;
  }
}

// The scale of each lane of a chunk's sums, from those of the groups.
template <int G>
ANYMAMBA_INLINE FloatVec lanes_of(const float* scales, int64_t chunk) {
  if constexpr (G >= kBytes) {
    return splat(scales[chunk / (G / kBytes)]);
  } else {
    const FloatVec first = splat(scales[2 * chunk]), second = splat(scales[2 * chunk + 1]);
    IntVec in_second;
    for (int i = 0; i < kLanes; ++i) in_second[i] = i < kLanes / 2 ? 0 : -1;
    return select(in_second, second, first);
  }
}

// One number of a weight row, without sign.
ANYMAMBA_INLINE int number_of(const QuantizedWeight& w, const std::uint8_t* row, int64_t p) {
  if (w.bits == 8) return row[p];
  const int64_t inside = p % w.group, half = w.group / 2;
  const std::uint8_t byte = row[p / w.group * half + inside % half];
  return inside < half ? byte & 15 : byte >> 4;
}

int zero_point_of(const QuantizedWeight& w) { return 1 << (w.bits - 1); }

// ---- A few rows --------------------------------------------------------------------------------

// What is the same for all weight rows: the vectors' scales by group, and the parts of results that
// their groups' sums decide, to be multiplied with the weights' scales or offsets.
struct GemvInputs {
  QuantizedGemv f;
  int64_t groups, padded;           // in whole vectors, zeros behind the groups
  const float *scales, *scaled_sums;    // (m, padded)
};

constexpr int kGroupsAtOnce = 64;  // of a row's scales

// Adds to the lanes of `sums` what the groups from `first` on contribute to the products of one
// weight row with M vectors; at most `most` vectors of groups.
template <int bits, int G, int M, int most>
ANYMAMBA_INLINE void add_groups(const GemvInputs& in, const std::uint8_t* q, int64_t row, int vector,
                                int64_t first, int64_t groups, FloatVec* sums) {
  const QuantizedWeight& w = in.f.weight;
  const QuantizedActivations& x = in.f.x;
  const int64_t scales_at = row * in.groups + first, vector_at = vector * in.padded + first;
  // The products of both scales (M, groups), and what the sums of the vectors' groups contribute.
  float both[M][most * kLanes];
  for (int64_t g = 0; g < (most == 1 ? 1 : groups); g += kLanes) {
    const int count = static_cast<int>(smaller(kLanes, groups - g));
    const FloatVec scales = load_some_bf16(w.scales + scales_at + g, count);
    const FloatVec factors = w.offsets ? load_some_bf16(w.offsets + scales_at + g, count) : scales;
    for (int m = 0; m < M; ++m) {
      store(both[m] + g, scales * load(in.scales + vector_at + m * in.padded + g));
      sums[m] = fma(factors, load(in.scaled_sums + vector_at + m * in.padded + g), sums[m]);
    }
  }
  // Whole numbers chunk by chunk, up to a group; then floats.
  constexpr int64_t chunks = G >= kBytes ? G / kBytes : 1;
  constexpr int64_t groups_a_step = G >= kBytes ? 1 : kBytes / G;
  q += first * (G * bits / 8);
  int64_t g = 0;
  for (; g + groups_a_step <= groups; g += groups_a_step) {
    IntVec whole[M] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t chunk = g / groups_a_step * chunks + c;
      if (bits == 8 || c % 2 == 0) __builtin_prefetch(q + chunk * kBytes * bits / 8 + kPrefetchBytes);
      const ByteVec v = chunk_of<bits, G>(q, chunk);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        whole[m] = dot4(whole[m], v,
                        load_bytes(x.q + (vector + m) * x.k + first * G + chunk * kBytes));
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sums[m] = fma(as_floats(whole[m]), lanes_of<G>(both[m], g / groups_a_step * chunks), sums[m]);
  }
  for (; g < groups; ++g)  // a last group of half a chunk
    for (int m = 0; m < M; ++m) {
      std::int32_t whole = 0;
      for (int i = 0; i < G; ++i)
        whole += number_of(w, q, g * G + i) * x.q[(vector + m) * x.k + (first + g) * G + i];
      sums[m][0] += both[m][g] * static_cast<float>(whole);
    }
}

template <int bits, int G, int M>
void few_vectors(const GemvInputs& given, int64_t first, int64_t last, int vector) {
  const GemvInputs in = given;  // where the compiler sees that no result is written over it
  const QuantizedGemv& f = in.f;
  for (int64_t start = first; start < last; start += kLanes) {
    const int64_t rows = smaller(kLanes, last - start);
    FloatVec sums[M][kLanes];
    for (int64_t r = 0; r < rows; ++r) {
      const std::uint8_t* const q = f.weight.q + (start + r) * (f.x.k * bits / 8);
      FloatVec of_row[M] = {};
      if (in.groups <= kLanes)
        add_groups<bits, G, M, 1>(in, q, start + r, vector, 0, in.groups, of_row);
      else
        for (int64_t g = 0; g < in.groups; g += kGroupsAtOnce)
          add_groups<bits, G, M, kGroupsAtOnce / kLanes>(in, q, start + r, vector, g,
                                                    smaller(kGroupsAtOnce, in.groups - g), of_row);
      for (int m = 0; m < M; ++m) sums[m][r] = of_row[m];
    }
    for (int m = 0; m < M; ++m) {
      for (int64_t r = rows; r < kLanes; ++r) sums[m][r] = FloatVec{};
      FloatVec total = sums_of_lanes(sums[m]);
      if (f.bias != nullptr) total += load_some(f.bias + start, static_cast<int>(rows));
      store_some(f.y + (vector + m) * f.y_row_stride + start, total, static_cast<int>(rows));
    }
  }
}

template <int bits, int G, int M>
void few_vectors_of(int vectors, const GemvInputs& in, int64_t first, int64_t last, int vector) {
  if (vectors == M) return few_vectors<bits, G, M>(in, first, last, vector);
  if constexpr (M > 1) few_vectors_of<bits, G, M - 1>(vectors, in, first, last, vector);
}

// Weight rows that L2 holds go through all vectors before the next ones.
template <int bits, int G>
void gemv_of(const GemvInputs& in, int64_t first, int64_t last) {
  const int64_t m = in.f.x.rows, bytes = in.f.x.k * bits / 8;
  const int64_t block =
      m > kQuantizedGemvVectors ? round_up(larger(1, kL2Bytes / bytes), kLanes) : larger(1, last - first);
  for (int64_t start = first; start < last; start += block)
    for (int vector = 0; vector < m; vector += kQuantizedGemvVectors)
      few_vectors_of<bits, G, kQuantizedGemvVectors>(
          static_cast<int>(smaller(kQuantizedGemvVectors, m - vector)), in, start,
          smaller(start + block, last), vector);
}

}  // namespace

void quantized_gemv(const QuantizedGemv& f, int64_t first, int64_t last) {
  const int64_t groups = f.x.k / f.x.group, padded = round_up(groups, kLanes);
  Scratch<float> memory(2 * f.x.rows * padded);
  __builtin_memset(memory, 0, static_cast<std::size_t>(2 * f.x.rows * padded) * sizeof(float));
  float *const scales = memory, *const scaled_sums = scales + f.x.rows * padded;
  const float factor = f.weight.offsets != nullptr ? 1.0f : -static_cast<float>(zero_point_of(f.weight));
  for (int64_t m = 0; m < f.x.rows; ++m)
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = f.x.scales[m * groups + g];
      scales[m * padded + g] = scale;
      scaled_sums[m * padded + g] = factor * scale * static_cast<float>(f.x.sums[m * groups + g]);
    }
  const GemvInputs in = {f, groups, padded, scales, scaled_sums};
  if (f.weight.bits == 8)
    switch (f.weight.group) {
      case 32: return gemv_of<8, 32>(in, first, last);
      case 64: return gemv_of<8, 64>(in, first, last);
      default: return gemv_of<8, 128>(in, first, last);
    }
  switch (f.weight.group) {
    case 32: return gemv_of<4, 32>(in, first, last);
    case 64: return gemv_of<4, 64>(in, first, last);
    default: return gemv_of<4, 128>(in, first, last);
  }
}

void quantize_activations(const float* x, int64_t row_stride, const QuantizedActivations& out, int64_t first,
                   int64_t last) {
  const int64_t groups = out.k / out.group;
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < groups; ++g)
      quantize_group(x + row * row_stride + g * out.group, out.group,
                     out.q + row * out.k + g * out.group, out.scales[row * groups + g],
                     out.sums[row * groups + g]);
}

// dequantized (k) = row of the weight.
void dequantize(const QuantizedWeight& w, int64_t row, int64_t k, float* y) {
  const std::uint8_t* const q = w.q + row * (k * w.bits / 8);
  for (int64_t p = 0; p < k; ++p) {
    const int64_t at = row * (k / w.group) + p / w.group;
    const float scale = from_bf16(w.scales[at]);
    const int number = number_of(w, q, p);
    y[p] = w.offsets != nullptr ? scale * static_cast<float>(number) + from_bf16(w.offsets[at])
                               : scale * static_cast<float>(number - zero_point_of(w));
  }
}

// ---- Many rows ---------------------------------------------------------------------------------

namespace {

// kPanel weight rows, four numbers of each row side by side, and each group's scales.
struct Panel {
  std::uint8_t* q;          // (k / 4, kPanel, 4)
  float *scales, *offsets;   // (k / group, kPanel)
};

void pack_panel(const QuantizedGemm& p, int64_t first, int64_t rows, std::uint8_t* bytes,
                const Panel& panel) {
  const QuantizedWeight& w = p.weight;
  const int64_t groups = p.k / w.group;
  __builtin_memset(bytes, 0, static_cast<std::size_t>(kPanel * p.k));
  for (int64_t r = 0; r < rows; ++r) {
    const std::uint8_t* const q = w.q + (first + r) * (p.k * w.bits / 8);
    std::uint8_t* const to = bytes + r * p.k;
    if (w.bits == 8) {
      __builtin_memcpy(to, q, static_cast<std::size_t>(p.k));
    } else {
      const int half = w.group / 2;
      for (int64_t g = 0; g < groups; ++g)
        for (int i = 0; i < half; ++i) {
          to[g * w.group + i] = q[g * half + i] & 15;
          to[g * w.group + half + i] = q[g * half + i] >> 4;
        }
    }
  }
  // From rows (kPanel, k) to fours (k / 4, kPanel, 4): transposed in squares, fours as floats.
  for (int64_t v = 0; v < kPanel; v += kLanes) {
    int64_t at = 0;
    for (; at + kBytes <= p.k; at += kBytes) {
      FloatVec square[kLanes];
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(&square[i], bytes + (v + i) * p.k + at, sizeof square[i]);
      transpose(square);
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(panel.q + ((at / 4 + i) * kPanel + v) * 4, &square[i], sizeof square[i]);
    }
    for (; at < p.k; at += 4)
      for (int i = 0; i < kLanes; ++i)
        __builtin_memcpy(panel.q + (at / 4 * kPanel + v + i) * 4, bytes + (v + i) * p.k + at, 4);
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t at = (first + r) * groups + g;
      panel.scales[g * kPanel + r] = r < rows ? from_bf16(w.scales[at]) : 0;
      if (w.offsets != nullptr) panel.offsets[g * kPanel + r] = r < rows ? from_bf16(w.offsets[at]) : 0;
    }
}

// tile (R, kPanel) = R rows of x from `row` on, times the panel.
template <int R>
void multiply_tile(const QuantizedGemm& p, const QuantizedActivations& x, int64_t row, const Panel& panel,
              float* tile) {
  const int64_t group = p.weight.group, groups = p.k / group;
  const std::int32_t zero_point = p.weight.offsets != nullptr ? 0 : zero_point_of(p.weight);
  FloatVec total[R][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    IntVec whole[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      whole[r][0] = whole[r][1] = splat_int(-zero_point * x.sums[(row + r) * groups + g]);
    const std::uint8_t* b = panel.q + g * group * kPanel;
    const std::int8_t* a = x.q + row * p.k + g * group;
    for (int64_t i = 0; i < group; i += 4, b += 2 * kBytes, a += 4) {
      const ByteVec b0 = load_bytes(b), b1 = load_bytes(b + kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        std::int32_t four;
        __builtin_memcpy(&four, a + r * p.k, 4);
        const ByteVec v = (ByteVec)splat_int(four);
        whole[r][0] = dot4(whole[r][0], b0, v);
        whole[r][1] = dot4(whole[r][1], b1, v);
      }
    }
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

template <int R>
void multiply_tile_of(int64_t rows, const QuantizedGemm& p, const QuantizedActivations& x, int64_t row,
                 const Panel& panel, float* tile) {
  if (rows >= R) return multiply_tile<R>(p, x, row, panel, tile);
  if constexpr (R > 1) multiply_tile_of<R - 1>(rows, p, x, row, panel, tile);
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

// The columns of c that a panel decides.
void multiply_panel(const QuantizedGemm& p, const QuantizedActivations& x, int64_t column) {
  const int64_t groups = p.k / p.weight.group, columns = smaller(kPanel, p.n - column);
  Scratch<std::uint8_t> bytes(kPanel * p.k), packed(kPanel * p.k);
  Scratch<float> scales(2 * groups * kPanel);
  const Panel panel = {packed, scales, scales + groups * kPanel};
  pack_panel(p, column, columns, bytes, panel);
  alignas(64) float tile[kQuantizedTileRows * kPanel];  // of c
  for (int64_t row = 0; row < p.m; row += kQuantizedTileRows) {
    const int64_t rows = smaller(kQuantizedTileRows, p.m - row);
    multiply_tile_of<kQuantizedTileRows>(rows, p, x, row, panel, tile);
    add_tile(p, tile, row, rows, column, columns);
  }
}

}  // namespace

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
    quantize_activations(p.a, p.a_row_stride, x, task * kRowsAtOnce,
                  smaller((task + 1) * kRowsAtOnce, p.m));
  };
  const auto multiply = [&](int64_t task) { multiply_panel(p, x, task * kPanel); };
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
