// Matrix products against a loop in double.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "tests/check.h"

namespace {

using namespace anymamba;
using namespace anymamba::test;
using std::int64_t;

const char* const kNames[] = {"f32", "bf16", "f16"};

std::uint32_t seed = 1;
float random_number() {  // in [-1, 1), with 11 bits: enough for half precision to be tested too
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(seed >> 21) / 1024.0f - 1.0f;
}

// Storage types, written from their definitions and not with the kernels' own conversions.
double value_of(const void* data, DType type, int64_t index) {
  if (type == DType::f32) return static_cast<const float*>(data)[index];
  const std::uint16_t h = static_cast<const std::uint16_t*>(data)[index];
  if (type == DType::bf16) return float_of(static_cast<std::uint32_t>(h) << 16);
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  double x = exponent == 0    ? std::ldexp(mantissa, -24)
             : exponent == 31 ? (mantissa ? NAN : INFINITY)
                              : std::ldexp(1024 + mantissa, exponent - 25);
  return h & 0x8000 ? -x : x;
}

void set_value(void* data, DType type, int64_t index, float x) {
  if (type == DType::f32) {
    static_cast<float*>(data)[index] = x;
    return;
  }
  std::uint16_t h;
  const std::uint32_t bits = bits_of(x);
  if (type == DType::bf16) {
    h = static_cast<std::uint16_t>(bits >> 16);  // cut off: any value will do
  } else if (!(std::fabs(x) < 65504)) {
    h = static_cast<std::uint16_t>((x != x ? 0x7e00 : 0x7c00) | (bits >> 16 & 0x8000));
  } else if (std::fabs(x) < 6.2e-5f) {
    h = static_cast<std::uint16_t>(std::lrint(std::fabs(x) * 16777216.0) | (bits >> 16 & 0x8000));
  } else {
    h = static_cast<std::uint16_t>(((bits >> 13) - (112u << 10)) & 0x7fff) | (bits >> 16 & 0x8000);
  }
  static_cast<std::uint16_t*>(data)[index] = h;
}

// A matrix in a heap block that ends with its last number, so that a sanitizer sees a read beyond;
// `offset` numbers lie in front of the first.
enum class Layout { rows, columns, padded, spread };
constexpr Layout kLayouts[] = {Layout::rows, Layout::columns, Layout::padded, Layout::spread};

struct Stored {
  Matrix matrix;
  int64_t numbers, bytes;
  std::unique_ptr<char[]> block;

  Stored(int64_t rows, int64_t columns, DType type, Layout layout, int64_t offset = 0) {
    matrix.type = type;
    matrix.row_stride = layout == Layout::rows      ? columns
                        : layout == Layout::columns ? 1
                        : layout == Layout::padded  ? columns + 5
                                                    : 3 * columns + 2;
    matrix.column_stride = layout == Layout::columns ? rows : layout == Layout::spread ? 3 : 1;
    numbers = offset;
    if (rows > 0 && columns > 0) numbers += index(rows - 1, columns - 1) + 1;
    bytes = numbers * size_of(type);
    block.reset(new char[static_cast<std::size_t>(bytes)]);
    for (int64_t i = 0; i < numbers; ++i) set_value(block.get(), type, i, random_number());
    matrix.data = block.get() + offset * size_of(type);
  }

  int64_t index(int64_t i, int64_t j) const {
    return i * matrix.row_stride + j * matrix.column_stride;
  }
  double at(int64_t i, int64_t j) const { return value_of(matrix.data, matrix.type, index(i, j)); }
  // All of them by rows. To convert them inside a reference's loops took most of a sanitized run.
  std::vector<double> values(int64_t rows, int64_t columns) const {
    std::vector<double> found;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) found.push_back(at(i, j));
    return found;
  }
  void set(int64_t i, int64_t j, float x) { set_value(matrix.data, matrix.type, index(i, j), x); }
};

struct Options {
  DType a = DType::f32, b = DType::f32, c = DType::f32;
  Layout a_layout = Layout::rows, b_layout = Layout::columns, c_layout = Layout::rows;
  bool bias = false, accumulate = false;
  int64_t offset = 0;
};

std::string describe(int64_t m, int64_t n, int64_t k, const Options& o) {
  char text[200];
  std::snprintf(text, sizeof text,
                "m %lld n %lld k %lld, %s %s %s, layouts %d %d %d, bias %d, accumulate %d, offset "
                "%lld",
                static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
                kNames[static_cast<int>(o.a)], kNames[static_cast<int>(o.b)],
                kNames[static_cast<int>(o.c)], static_cast<int>(o.a_layout),
                static_cast<int>(o.b_layout), static_cast<int>(o.c_layout), o.bias, o.accumulate,
                static_cast<long long>(o.offset));
  return text;
}

void check_gemm(int64_t m, int64_t n, int64_t k, const Options& o = {}) {
  const std::string what = describe(m, n, k, o);
  Stored a(m, k, o.a, o.a_layout, o.offset), b(k, n, o.b, o.b_layout, o.offset);
  Stored c(m, n, o.c, o.c_layout, o.offset);
  Stored bias(1, n, DType::f32, Layout::rows, o.offset);
  std::vector<char> old(c.block.get(), c.block.get() + c.bytes);
  std::vector<double> expected(static_cast<std::size_t>(m * n));
  double largest = 1;
  const std::vector<double> a_mk = a.values(m, k), b_kn = b.values(k, n);
  std::vector<double> row(static_cast<std::size_t>(n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j)
      row[j] = (o.bias ? bias.at(0, j) : 0.0) + (o.accumulate ? c.at(i, j) : 0.0);
    for (int64_t p = 0; p < k; ++p) {
      const double x = a_mk[i * k + p];
      for (int64_t j = 0; j < n; ++j) row[j] += x * b_kn[p * n + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      expected[i * n + j] = row[j];
      largest = std::fmax(largest, std::fabs(row[j]));
    }
  }

  std::vector<char> first;
  for (const int threads : {1, 3}) {
    Threads::set_count(threads);
    std::copy(old.begin(), old.end(), c.block.get());
    const auto* bias_data = static_cast<const float*>(bias.matrix.data);
    kernels().gemm({m, n, k, a.matrix, b.matrix, c.matrix, o.bias ? bias_data : nullptr,
                       o.accumulate});
    const std::vector<char> result(c.block.get(), c.block.get() + c.bytes);
    if (threads == 1) first = result;
    CHECK(result == first, "%d threads, %s", threads, what.c_str());
  }

  double error = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double e = std::fabs(c.at(i, j) - expected[i * n + j]);
      if (!(e <= error)) error = e;
    }
  // float32 sums err by their rounding, a half-precision result by that of storing it.
  const double tolerance = (o.c == DType::f32 ? 1e-5 : 2e-2) * largest;
  CHECK(error <= tolerance, "error %g of %g: %s", error, tolerance, what.c_str());

  // What lies between the entries of c is not ours.
  std::vector<bool> ours(static_cast<std::size_t>(c.numbers));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) ours[o.offset + c.index(i, j)] = true;
  const std::size_t size = size_of(o.c);
  for (int64_t i = 0; i < c.numbers; ++i)
    if (!ours[i])
      CHECK(std::memcmp(c.block.get() + i * size, old.data() + i * size, size) == 0,
            "written at %lld: %s", static_cast<long long>(i), what.c_str());
}

void test_sizes() {
  const int64_t sizes[] = {0, 1, 2, 3, 7, 16, 17, 33};
  for (const int64_t m : sizes)
    for (const int64_t n : sizes)
      for (const int64_t k : sizes)
        for (const int flags : {0, 1, 2, 3}) {
          Options o;
          o.bias = flags & 1, o.accumulate = flags & 2;
          check_gemm(m, n, k, o);
          o.b_layout = Layout::rows, o.a_layout = Layout::columns;
          check_gemm(m, n, k, o);
        }
}

// One off the sizes of tiles (14 x 32, 6 x 16, 4 x 8), cuts of k (384) and blocks (560, 240, 160,
// 512).
void test_borders() {
  for (const int64_t m : {4, 5, 6, 13, 14, 15, 16, 17, 28, 29, 47, 63, 64, 65})
    for (const int64_t n : {8, 15, 16, 31, 32, 33, 48, 63, 64, 65}) check_gemm(m, n, 40);
  for (const int64_t k : {15, 16, 17, 255, 257, 383, 384, 385, 700, 767, 768, 769})
    for (const int64_t m : {1, 5, 20, 70}) {
      Options o;
      o.bias = true;
      check_gemm(m, 35, k, o);
      o.c = DType::bf16;
      check_gemm(m, 35, k, o);
    }
  Options o;
  for (const int64_t m : {159, 160, 161, 239, 241, 511, 513, 559, 560, 561, 1130}) {
    check_gemm(m, 33, 19);
    check_gemm(20, m, 19);
    o.c_layout = Layout::columns, o.c = DType::f32;
    check_gemm(m, 33, 19, o);
    check_gemm(33, m, 390, o);
    o.c_layout = Layout::rows, o.c = DType::f16;
    check_gemm(m, 33, 19, o);
    check_gemm(40, m, 390, o);
  }
  check_gemm(520, 530, 400, o);
  check_gemm(600, 500, 400);
}

// a transposed, as in the gradient of a weight: its panels hold rows that are neighbours, whole ones
// and the last, for a gemv steps of k at a time.
void test_transposed_left() {
  int count = 0;
  for (const int64_t m : {17, 27, 28, 29, 41, 159, 161, 239, 241, 559, 561, 575})
    for (const int64_t k : {1, 7, 8, 9, 23, 385}) {
      Options o;
      o.a = static_cast<DType>(++count % 3);
      o.a_layout = Layout::columns, o.b_layout = Layout::rows;
      o.offset = count % 2;
      check_gemm(m, 33, k, o);
      o.a = DType::f32, o.accumulate = true;
      check_gemm(m, 20, k, o);
    }
}

void test_types_and_strides() {
  int count = 0;
  for (const DType a : kTypes)
    for (const DType b : kTypes)
      for (const DType c : kTypes)
        for (const Layout a_layout : kLayouts)
          for (const Layout b_layout : kLayouts)
            for (const Layout c_layout : kLayouts) {
              // Every pair of types and layouts, in a third of all combinations.
              const int flags = ++count;
              if ((static_cast<int>(a) + static_cast<int>(b) + static_cast<int>(c) +
                   static_cast<int>(a_layout) + static_cast<int>(b_layout) +
                   static_cast<int>(c_layout)) % 3 != 0)
                continue;
              const Options o = {a, b, c, a_layout, b_layout, c_layout,
                                 (flags & 1) != 0, (flags & 2) != 0, flags % 5};
              check_gemm(19, 37, 21, o);
              if (flags % 3 == 0) check_gemm(3, 37, 45, o);
              if (flags % 7 == 0) check_gemm(45, 70, 400, o);
            }
}

// A number that is not finite reaches its row or column of c, and no other.
void test_not_finite() {
  for (const int64_t m : {2, 20, 45})
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")})
      for (const DType type : kTypes) {
        const int64_t n = 37, k = 35;
        Stored a(m, k, type, Layout::rows), b(k, n, type, Layout::columns);
        Stored c(m, n, DType::f32, Layout::rows);
        for (int64_t p = 0; p < k; ++p)
          for (int64_t j = 0; j < n; ++j) b.set(p, j, 0.5f);
        a.set(m - 1, k - 1, bad);
        b.set(1, n - 1, bad);
        a.set(0, 1, 1.0f), a.set(m - 1, 1, 1.0f);
        kernels().gemm({m, n, k, a.matrix, b.matrix, c.matrix, nullptr, false});
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j)
            CHECK(std::isfinite(c.at(i, j)) == (i != m - 1 && j != n - 1) ||
                      (j == n - 1 && a.at(i, 1) == 0),
                  "m %lld, %s, at %lld %lld: %g", static_cast<long long>(m),
                  kNames[static_cast<int>(type)], static_cast<long long>(i),
                  static_cast<long long>(j), c.at(i, j));
      }
}

void check_gemv(int m, int64_t n, int64_t k, DType type, int64_t padding, bool bias) {
  Stored weight(n, k + padding, type, Layout::rows, padding % 3);
  Stored x(m, k, DType::f32, padding ? Layout::padded : Layout::rows, padding % 5);
  Stored y(m, n, DType::f32, padding ? Layout::padded : Layout::rows, padding % 2);
  Stored biases(1, n, DType::f32, Layout::rows);
  if (padding && n > 0) {  // the last row ends without padding: nothing may be read behind it
    const int64_t size = size_of(type);
    const int64_t numbers = weight.numbers - padding;
    std::unique_ptr<char[]> shorter(new char[static_cast<std::size_t>(numbers * size)]);
    std::memcpy(shorter.get(), weight.block.get(), static_cast<std::size_t>(numbers * size));
    weight.block = std::move(shorter);
    weight.matrix.data = weight.block.get() + padding % 3 * size;
  }
  Gemv gemv;
  gemv.k = k, gemv.weight = weight.matrix.data, gemv.type = type;
  gemv.weight_row_stride = weight.matrix.row_stride;
  gemv.bias = bias ? static_cast<const float*>(biases.matrix.data) : nullptr;
  gemv.x = static_cast<const float*>(x.matrix.data), gemv.x_row_stride = x.matrix.row_stride;
  gemv.y = static_cast<float*>(y.matrix.data), gemv.y_row_stride = y.matrix.row_stride;
  gemv.m = m;

  const std::vector<double> x_mk = x.values(m, k), weight_nk = weight.values(n, k);
  std::vector<double> product(static_cast<std::size_t>(m * n));
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double& sum = product[i * n + j] = bias ? biases.at(0, j) : 0.0;
      for (int64_t p = 0; p < k; ++p) sum += x_mk[i * k + p] * weight_nk[j * k + p];
    }

  for (int64_t first = 0; first <= n; first += 5) {
    const int64_t last = first + (n - first) * 2 / 3 + (first == 0 ? (n + 2) / 3 : 0);
    const int64_t end = last < n ? last : n;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) y.set(i, j, 77.0f);
    kernels().gemv(gemv, first, end);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const double expected = j < first || j >= end ? 77 : product[i * n + j];
        const double error = std::fabs(y.at(i, j) - expected);
        CHECK(error <= 1e-5 * std::fmax(10.0, std::fabs(expected)),
              "gemv m %d n %lld k %lld %s, rows %lld to %lld, at %lld %lld: %g, not %g", m,
              static_cast<long long>(n), static_cast<long long>(k), kNames[static_cast<int>(type)],
              static_cast<long long>(first), static_cast<long long>(end), static_cast<long long>(i),
              static_cast<long long>(j), y.at(i, j), expected);
      }
  }
}

void test_gemv() {
  for (int m = 1; m <= 16; ++m)
    for (const DType type : kTypes)
      for (const int64_t k : {0, 1, 15, 16, 17, 33, 100, 256})
        for (const int64_t n : {0, 1, 3, 8, 9, 17, 26})
          check_gemv(m, n, k, type, (m + n + k) % 2 * 7, (m + k) % 3 == 0);
}

// Several products at once: one has the pool, the others run on their own threads.
void test_nested() {
  Threads::set_count(4);
  const int64_t m = 60, n = 200, k = 300;
  Stored a(m, k, DType::f32, Layout::rows), b(k, n, DType::bf16, Layout::columns);
  std::vector<Stored> results;
  for (int i = 0; i < 5; ++i) results.emplace_back(m, n, DType::f32, Layout::rows);
  parallel_for(5, [&](int64_t i) {
    kernels().gemm({m, n, k, a.matrix, b.matrix, results[i].matrix, nullptr, false});
  });
  for (const Stored& c : results)
    CHECK(std::memcmp(c.block.get(), results[0].block.get(), c.bytes) == 0, "nested products");
}

}  // namespace

int main() {
  test_sizes();
  test_borders();
  test_transposed_left();
  test_types_and_strides();
  test_not_finite();
  test_gemv();
  test_nested();
  return finish("gemm");
}
