// Products with quantized weights: one vector or a few at the speed of reading the weights, many
// rows at the speed of the byte arithmetic.
//
// A weight row is read in chunks of kBytes numbers. A group is some chunks, or one, or half of one:
// then the lanes of a chunk's sums belong to two groups.
#include "simd/dot4.h"
#include "kernels/functions.h"
#include "base/integers.h"
#include "simd/lanes.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

using std::int64_t;

constexpr int64_t kAhead = 4096;      // bytes to fetch ahead in the stream of weights
constexpr int kVectorsAtOnce = W == 16 ? 8 : 4;  // of few rows
constexpr int kTileRows = W == 16 ? 12 : W == 8 ? 3 : 2;
constexpr int kPanel = 2 * W;         // weight rows in a panel of the product of many rows
constexpr int64_t kTaskProducts = 1 << 20;  // less is not worth a hand-over to another thread

// ---- Rounding rows to 8 bits -------------------------------------------------------------------

typedef std::int8_t SmallInts __attribute__((vector_size(W)));

// A group of smaller numbers counts as zeros: 127 / largest would leave float32. 2^-100.
constexpr float kSmallest = 7.888609052210118e-31f;

// The whole numbers next to x * y, ties to even. The product is not rounded before, on any machine.
ANYMAMBA_INLINE I nearest(F x, F y) {
#if defined(__AVX2__)
  // Adding kRounder rounds to a whole number.
  return __builtin_convertvector(fma(x, y, splat(kRounder)) - splat(kRounder), I);
#else
  I v;
  for (int i = 0; i < W; ++i)
    v[i] = static_cast<std::int32_t>(
        __builtin_nearbyint(static_cast<double>(x[i]) * static_cast<double>(y[i])));
  return v;
#endif
}

// q = x / scale, rounded to nearest even, with scale = max |x| / 127.
void quantize_group(const float* x, int group, std::int8_t* q, float& scale, std::int32_t& sum) {
  F most{}, wrong{};
  for (int i = 0; i < group; i += W) {
    const F v = load(x + i), magnitude = v < F{} ? -v : v;
    most = magnitude > most ? magnitude : most;
    wrong = fma(v, F{}, wrong);  // not 0 where a number is infinite or none
  }
  float largest = 0;
  for (int i = 0; i < W; ++i) largest = most[i] > largest ? most[i] : largest;
  const bool finite = anymamba::ANYMAMBA_ISA::sum(wrong) == 0.0f;
  const F inverse = splat(finite && largest >= kSmallest ? 127.0f / largest : 0.0f);
  I total{};
  for (int i = 0; i < group; i += W) {
    const I whole = nearest(finite ? load(x + i) : F{}, inverse);
    const SmallInts small = __builtin_convertvector(whole, SmallInts);
    __builtin_memcpy(q + i, &small, sizeof small);
    total += whole;
  }
  sum = 0;
  for (int i = 0; i < W; ++i) sum += total[i];
  scale = finite ? largest / 127.0f : __builtin_nanf("");  // so are all results of the group
}

// ---- Weight rows -------------------------------------------------------------------------------

ANYMAMBA_INLINE Bytes low_halves(Bytes v) { return v & (Bytes{} + static_cast<std::uint8_t>(15)); }

// Chunk number `index` of a weight row, as bytes in the order of k.
template <int bits, int G>
ANYMAMBA_INLINE Bytes chunk_of(const std::uint8_t* row, int64_t index) {
  if constexpr (bits == 8) {
    return load_bytes(row + index * kBytes);
  } else if constexpr (G >= 2 * kBytes) {
    constexpr int64_t chunks = G / kBytes;
    const int64_t inside = index % chunks;
    const Bytes v = load_bytes(row + index / chunks * (G / 2) + inside % (chunks / 2) * kBytes);
    return inside < chunks / 2 ? low_halves(v) : v >> 4;
  } else {
    // The lower and the upper halves of one group, or of two, make a chunk.
    constexpr int half = G / 2;
    Bytes v{};
    __builtin_memcpy(&v, row + index * (kBytes / 2), kBytes / 2);
    const Bytes parts[2] = {low_halves(v), v >> 4};
    for (int at = 0; at < kBytes; at += half)
      __builtin_memcpy(reinterpret_cast<char*>(&v) + at,
                       reinterpret_cast<const char*>(&parts[at / half % 2]) + at / G * half, half);
    return v;
  }
}

// The scale of each lane of a chunk's sums, from those of the groups.
template <int G>
ANYMAMBA_INLINE F lanes_of(const float* scales, int64_t chunk) {
  if constexpr (G >= kBytes) {
    return splat(scales[chunk / (G / kBytes)]);
  } else {
    const F first = splat(scales[2 * chunk]), second = splat(scales[2 * chunk + 1]);
    I in_second;
    for (int i = 0; i < W; ++i) in_second[i] = i < W / 2 ? 0 : -1;
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

int zero_of(const QuantizedWeight& w) { return 1 << (w.bits - 1); }

// ---- A few rows --------------------------------------------------------------------------------

// What is the same for all weight rows: the vectors' scales by group, and the parts of results that
// their groups' sums decide, to be multiplied with the weights' scales or minima.
struct Few {
  FewQuantizedRows f;
  int64_t groups, padded;           // in whole vectors, zeros behind the groups
  const float *scales, *offsets;    // (m, padded)
};

constexpr int kGroupsAtOnce = 64;  // of a row's scales

// Adds to the lanes of `sums` what the groups from `first` on contribute to the products of one
// weight row with M vectors; at most `most` vectors of groups.
template <int bits, int G, int M, int most>
ANYMAMBA_INLINE void add_groups(const Few& few, const std::uint8_t* q, int64_t row, int vector,
                                int64_t first, int64_t groups, F* sums) {
  const QuantizedWeight& w = few.f.weight;
  const QuantizedRows& x = few.f.x;
  const int64_t scales_at = row * few.groups + first, vector_at = vector * few.padded + first;
  float both[M][most * W];
  for (int64_t g = 0; g < (most == 1 ? 1 : groups); g += W) {
    const int count = static_cast<int>(smaller(W, groups - g));
    const F scales = load_some_bf16(w.scales + scales_at + g, count);
    const F factors = w.minima ? load_some_bf16(w.minima + scales_at + g, count) : scales;
    for (int m = 0; m < M; ++m) {
      store(both[m] + g, scales * load(few.scales + vector_at + m * few.padded + g));
      sums[m] = fma(factors, load(few.offsets + vector_at + m * few.padded + g), sums[m]);
    }
  }
  constexpr int64_t chunks = G >= kBytes ? G / kBytes : 1;  // summed as whole numbers
  constexpr int64_t groups_a_step = G >= kBytes ? 1 : kBytes / G;
  q += first * (G * bits / 8);
  int64_t g = 0;
  for (; g + groups_a_step <= groups; g += groups_a_step) {
    I whole[M] = {};
#pragma GCC unroll 8
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t chunk = g / groups_a_step * chunks + c;
      if (bits == 8 || c % 2 == 0) __builtin_prefetch(q + chunk * kBytes * bits / 8 + kAhead);
      const Bytes v = chunk_of<bits, G>(q, chunk);
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
void few_vectors(const Few& given, int64_t first, int64_t last, int vector) {
  const Few few = given;  // where the compiler sees that no result is written over it
  const FewQuantizedRows& f = few.f;
  for (int64_t start = first; start < last; start += W) {
    const int64_t rows = smaller(W, last - start);
    F sums[M][W];
    for (int64_t r = 0; r < rows; ++r) {
      const std::uint8_t* const q = f.weight.q + (start + r) * (f.x.k * bits / 8);
      F of_row[M] = {};
      if (few.groups <= W)
        add_groups<bits, G, M, 1>(few, q, start + r, vector, 0, few.groups, of_row);
      else
        for (int64_t g = 0; g < few.groups; g += kGroupsAtOnce)
          add_groups<bits, G, M, kGroupsAtOnce / W>(few, q, start + r, vector, g,
                                                    smaller(kGroupsAtOnce, few.groups - g), of_row);
      for (int m = 0; m < M; ++m) sums[m][r] = of_row[m];
    }
    for (int m = 0; m < M; ++m) {
      for (int64_t r = rows; r < W; ++r) sums[m][r] = F{};
      F total = sums_of_lanes(sums[m]);
      if (f.bias != nullptr) total += load_some(f.bias + start, static_cast<int>(rows));
      store_some(f.y + (vector + m) * f.y_row_stride + start, total, static_cast<int>(rows));
    }
  }
}

template <int bits, int G, int M>
void few_vectors_of(int vectors, const Few& few, int64_t first, int64_t last, int vector) {
  if (vectors == M) return few_vectors<bits, G, M>(few, first, last, vector);
  if constexpr (M > 1) few_vectors_of<bits, G, M - 1>(vectors, few, first, last, vector);
}

// Weight rows that L2 holds go through all vectors before the next ones.
template <int bits, int G>
void few_rows_of(const Few& few, int64_t first, int64_t last) {
  const int64_t m = few.f.x.rows, bytes = few.f.x.k * bits / 8;
  const int64_t block =
      m > kVectorsAtOnce ? round_up(larger(1, (128 << 10) / bytes), W) : larger(1, last - first);
  for (int64_t start = first; start < last; start += block)
    for (int vector = 0; vector < m; vector += kVectorsAtOnce)
      few_vectors_of<bits, G, kVectorsAtOnce>(
          static_cast<int>(smaller(kVectorsAtOnce, m - vector)), few, start,
          smaller(start + block, last), vector);
}

}  // namespace

void few_quantized_rows(const FewQuantizedRows& f, int64_t first, int64_t last) {
  const int64_t groups = f.x.k / f.x.group, padded = round_up(groups, W);
  Scratch<float> memory(2 * f.x.rows * padded);
  __builtin_memset(memory, 0, static_cast<std::size_t>(2 * f.x.rows * padded) * sizeof(float));
  float *const scales = memory, *const offsets = scales + f.x.rows * padded;
  const float factor = f.weight.minima != nullptr ? 1.0f : -static_cast<float>(zero_of(f.weight));
  for (int64_t m = 0; m < f.x.rows; ++m)
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = f.x.scales[m * groups + g];
      scales[m * padded + g] = scale;
      offsets[m * padded + g] = factor * scale * static_cast<float>(f.x.sums[m * groups + g]);
    }
  const Few few = {f, groups, padded, scales, offsets};
  if (f.weight.bits == 8)
    switch (f.weight.group) {
      case 32: return few_rows_of<8, 32>(few, first, last);
      case 64: return few_rows_of<8, 64>(few, first, last);
      default: return few_rows_of<8, 128>(few, first, last);
    }
  switch (f.weight.group) {
    case 32: return few_rows_of<4, 32>(few, first, last);
    case 64: return few_rows_of<4, 64>(few, first, last);
    default: return few_rows_of<4, 128>(few, first, last);
  }
}

void quantize_rows(const float* x, int64_t row_stride, const QuantizedRows& out, int64_t first,
                   int64_t last) {
  const int64_t groups = out.k / out.group;
  for (int64_t row = first; row < last; ++row)
    for (int64_t g = 0; g < groups; ++g)
      quantize_group(x + row * row_stride + g * out.group, out.group,
                     out.q + row * out.k + g * out.group, out.scales[row * groups + g],
                     out.sums[row * groups + g]);
}

// dequantized (k) = row of the weight.
void widen_quantized(const QuantizedWeight& w, int64_t row, int64_t k, float* y) {
  const std::uint8_t* const q = w.q + row * (k * w.bits / 8);
  for (int64_t p = 0; p < k; ++p) {
    const int64_t at = row * (k / w.group) + p / w.group;
    const float scale = from_bf16(w.scales[at]);
    const int number = number_of(w, q, p);
    y[p] = w.minima != nullptr ? scale * static_cast<float>(number) + from_bf16(w.minima[at])
                               : scale * static_cast<float>(number - zero_of(w));
  }
}

// ---- Many rows ---------------------------------------------------------------------------------

namespace {

// kPanel weight rows, for tiles: k / 4 rows of kPanel fours of bytes, and each group's scales.
struct Panel {
  std::uint8_t* q;          // (k / 4, kPanel, 4)
  float *scales, *minima;   // (k / group, kPanel)
};

void pack_panel(const QuantizedProduct& p, int64_t first, int64_t rows, std::uint8_t* bytes,
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
  for (int64_t v = 0; v < kPanel; v += W) {
    int64_t at = 0;
    for (; at + kBytes <= p.k; at += kBytes) {
      F square[W];  // fours of bytes, moved as floats
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(&square[i], bytes + (v + i) * p.k + at, sizeof square[i]);
      transpose(square);
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(panel.q + ((at / 4 + i) * kPanel + v) * 4, &square[i], sizeof square[i]);
    }
    for (; at < p.k; at += 4)
      for (int i = 0; i < W; ++i)
        __builtin_memcpy(panel.q + (at / 4 * kPanel + v + i) * 4, bytes + (v + i) * p.k + at, 4);
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t r = 0; r < kPanel; ++r) {
      const int64_t at = (first + r) * groups + g;
      panel.scales[g * kPanel + r] = r < rows ? from_bf16(w.scales[at]) : 0;
      if (w.minima != nullptr) panel.minima[g * kPanel + r] = r < rows ? from_bf16(w.minima[at]) : 0;
    }
}

// tile (R, kPanel) = R rows of x from `row` on, times the panel.
template <int R>
void run_tile(const QuantizedProduct& p, const QuantizedRows& x, int64_t row, const Panel& panel,
              float* tile) {
  const int64_t group = p.weight.group, groups = p.k / group;
  const std::int32_t zero = p.weight.minima != nullptr ? 0 : zero_of(p.weight);
  F total[R][2] = {};
  for (int64_t g = 0; g < groups; ++g) {
    I whole[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      whole[r][0] = whole[r][1] = splat_int(-zero * x.sums[(row + r) * groups + g]);
    const std::uint8_t* b = panel.q + g * group * kPanel;
    const std::int8_t* a = x.q + row * p.k + g * group;
    for (int64_t i = 0; i < group; i += 4, b += 2 * kBytes, a += 4) {
      const Bytes b0 = load_bytes(b), b1 = load_bytes(b + kBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        std::int32_t four;
        __builtin_memcpy(&four, a + r * p.k, 4);
        const Bytes v = (Bytes)splat_int(four);
        whole[r][0] = dot4(whole[r][0], b0, v);
        whole[r][1] = dot4(whole[r][1], b1, v);
      }
    }
    const float* const scales = panel.scales + g * kPanel;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F scale = splat(x.scales[(row + r) * groups + g]);
      for (int v = 0; v < 2; ++v)
        total[r][v] = fma(as_floats(whole[r][v]), scale * load(scales + v * W), total[r][v]);
    }
    if (p.weight.minima != nullptr)
      for (int r = 0; r < R; ++r) {
        const F offset = splat(x.scales[(row + r) * groups + g] *
                               static_cast<float>(x.sums[(row + r) * groups + g]));
        for (int v = 0; v < 2; ++v)
          total[r][v] = fma(offset, load(panel.minima + g * kPanel + v * W), total[r][v]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < 2; ++v) store(tile + r * kPanel + v * W, total[r][v]);
}

template <int R>
void run_tile_of(int64_t rows, const QuantizedProduct& p, const QuantizedRows& x, int64_t row,
                 const Panel& panel, float* tile) {
  if (rows >= R) return run_tile<R>(p, x, row, panel, tile);
  if constexpr (R > 1) run_tile_of<R - 1>(rows, p, x, row, panel, tile);
}

void add_tile(const QuantizedProduct& p, const float* tile, int64_t row, int64_t rows,
              int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; j += W) {
      const int count = static_cast<int>(smaller(W, columns - j));
      float* const c = p.c + (row + r) * p.c_row_stride + column + j;
      F sum = load(tile + r * kPanel + j);
      if (p.bias != nullptr) sum += load_some(p.bias + column + j, count);
      if (p.accumulate) sum += load_some(c, count);
      store_some(c, sum, count);
    }
}

// What run_panel takes.
int64_t panel_scratch(const QuantizedProduct& p) {
  return 2 * Scratch<std::uint8_t>::in_arena(kPanel * p.k) +
         Scratch<float>::in_arena(2 * (p.k / p.weight.group) * kPanel);
}

// The columns of c that a panel decides.
void run_panel(const QuantizedProduct& p, const QuantizedRows& x, int64_t column) {
  const int64_t groups = p.k / p.weight.group, columns = smaller(kPanel, p.n - column);
  Scratch<std::uint8_t> bytes(kPanel * p.k), packed(kPanel * p.k);
  Scratch<float> scales(2 * groups * kPanel);
  const Panel panel = {packed, scales, scales + groups * kPanel};
  pack_panel(p, column, columns, bytes, panel);
  alignas(64) float tile[kTileRows * kPanel];
  for (int64_t row = 0; row < p.m; row += kTileRows) {
    const int64_t rows = smaller(kTileRows, p.m - row);
    run_tile_of<kTileRows>(rows, p, x, row, panel, tile);
    add_tile(p, tile, row, rows, column, columns);
  }
}

}  // namespace

void quantized_product(const QuantizedProduct& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const int64_t groups = p.k / p.weight.group;
  Scratch<std::int8_t> q(p.m * p.k);
  Scratch<float> scales(p.m * groups);
  Scratch<std::int32_t> sums(p.m * groups);
  const QuantizedRows x = {p.m, p.k, p.weight.group, q, scales, sums};
  const bool large = p.m * p.n * p.k >= kTaskProducts;
  constexpr int64_t kRowsAtOnce = 16;
  const auto quantize = [&](int64_t task) {
    quantize_rows(p.a, p.a_row_stride, x, task * kRowsAtOnce,
                  smaller((task + 1) * kRowsAtOnce, p.m));
  };
  const auto multiply = [&](int64_t task) { run_panel(p, x, task * kPanel); };
  const int64_t stretches = ceil_div(p.m, kRowsAtOnce), panels = ceil_div(p.n, kPanel);
  if (large) {
    parallel_for(stretches, quantize);
    parallel_for(panels, panel_scratch(p), multiply);
  } else {
    for (int64_t i = 0; i < stretches; ++i) quantize(i);
    for (int64_t i = 0; i < panels; ++i) multiply(i);
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
