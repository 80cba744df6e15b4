// Matrix products against a loop in double.
#include "tests/check.h"

namespace {

using namespace anymamba;
using namespace anymamba::test;

const char* const kNames[] = {"f32", "bf16", "f16"};

Random random_numbers(1);

// A matrix in memory that ends with its last number, so that a sanitizer sees a read beyond;
// `offset` numbers lie in front of the first.
enum class MatrixLayout { rows, columns, padded, spread };
constexpr MatrixLayout kMatrixLayouts[] = {MatrixLayout::rows, MatrixLayout::columns,
                                           MatrixLayout::padded, MatrixLayout::spread};

struct Stored {
  int64_t rows, columns, offset, row_stride, column_stride;
  Memory memory;

  Stored(int64_t rows, int64_t columns, DType type, MatrixLayout layout, int64_t offset = 0)
      : rows(rows), columns(columns), offset(offset) {
    row_stride = layout == MatrixLayout::rows      ? columns
                 : layout == MatrixLayout::columns ? 1
                 : layout == MatrixLayout::padded  ? columns + 5
                                                   : 3 * columns + 2;
    column_stride = layout == MatrixLayout::columns ? rows : layout == MatrixLayout::spread ? 3 : 1;
    // One number where there is none, for a pointer that offsets may be added to.
    const bool empty = rows == 0 || columns == 0;
    memory = Memory(type, 1 + (empty ? offset : index(rows - 1, columns - 1)));
    for (std::size_t i = 0; i < memory.size(); ++i) memory.set(i, random_numbers.number());
  }

  Matrix view() const { return {data(), memory.type(), row_stride, column_stride}; }
  void* data() const { return static_cast<char*>(memory.data()) + offset * size_of(memory.type()); }
  float* floats() const { return static_cast<float*>(data()); }
  int64_t index(int64_t i, int64_t j) const { return offset + i * row_stride + j * column_stride; }
  double at(int64_t i, int64_t j) const { return memory.get(index(i, j)); }
  // All of them by rows. To convert them inside a reference's loops took most of a sanitized run.
  std::vector<double> values() const {
    std::vector<double> found;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) found.push_back(at(i, j));
    return found;
  }
  void set(int64_t i, int64_t j, double x) { memory.set(index(i, j), x); }
};

struct Options {
  DType a = DType::f32, b = DType::f32, c = DType::f32;
  MatrixLayout a_layout = MatrixLayout::rows, b_layout = MatrixLayout::columns;
  MatrixLayout c_layout = MatrixLayout::rows;
  bool bias = false, accumulate = false;
  int64_t offset = 0;
};

std::string describe(int64_t m, int64_t n, int64_t k, const Options& o) {
  char text[200];
  std::snprintf(text, sizeof text,
                "m %d n %d k %d, %s %s %s, layouts %d %d %d, bias %d, accumulate %d, offset %d",
                int(m), int(n), int(k), kNames[int(o.a)], kNames[int(o.b)], kNames[int(o.c)],
                int(o.a_layout), int(o.b_layout), int(o.c_layout), o.bias, o.accumulate,
                int(o.offset));
  return text;
}

void check_gemm(int64_t m, int64_t n, int64_t k, const Options& o = {}) {
  const std::string what = describe(m, n, k, o);
  const Stored a(m, k, o.a, o.a_layout, o.offset), b(k, n, o.b, o.b_layout, o.offset);
  const Stored bias(1, n, DType::f32, MatrixLayout::rows, o.offset);
  Stored c(m, n, o.c, o.c_layout, o.offset);
  const Memory old = c.memory;
  std::vector<double> expected(m * n);
  double largest = 1;
  const std::vector<double> a_mk = a.values(), b_kn = b.values();
  std::vector<double> row(n);
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

  Memory first;
  for (const int threads : {1, 3}) {
    Threads::set_count(threads);
    c.memory = old;
    kernels().gemm({m, n, k, a.view(), b.view(), c.view(), o.bias ? bias.floats() : nullptr,
                    o.accumulate});
    if (threads == 1) first = c.memory;
    CHECK(c.memory == first, "%d threads, %s", threads, what.c_str());
  }

  double error = 0;
  Memory around = old;  // what lies between the entries of c is not ours
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const double e = std::fabs(c.at(i, j) - expected[i * n + j]);
      if (!(e <= error)) error = e;
      around.set_bits(c.index(i, j), c.memory.bits(c.index(i, j)));
    }
  // float32 sums err by their rounding, a half-precision result by that of storing it.
  const double tolerance = (o.c == DType::f32 ? 1e-5 : 2e-2) * largest;
  CHECK(error <= tolerance, "error %g of %g: %s", error, tolerance, what.c_str());
  CHECK(around == c.memory, "written outside of c: %s", what.c_str());
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
          o.b_layout = MatrixLayout::rows, o.a_layout = MatrixLayout::columns;
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
    o.c_layout = MatrixLayout::columns, o.c = DType::f32;
    check_gemm(m, 33, 19, o);
    check_gemm(33, m, 390, o);
    o.c_layout = MatrixLayout::rows, o.c = DType::f16;
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
      o.a_layout = MatrixLayout::columns, o.b_layout = MatrixLayout::rows;
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
        for (const MatrixLayout a_layout : kMatrixLayouts)
          for (const MatrixLayout b_layout : kMatrixLayouts)
            for (const MatrixLayout c_layout : kMatrixLayouts) {
              // Every pair of types and layouts, in a third of all combinations.
              const int flags = ++count;
              if ((int(a) + int(b) + int(c) + int(a_layout) + int(b_layout) + int(c_layout)) % 3)
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
    for (const std::uint32_t mantissa : {0u, 1u})  // infinity, NaN
      for (const DType type : kTypes) {
        const int64_t n = 37, k = 35;
        Stored a(m, k, type, MatrixLayout::rows), b(k, n, type, MatrixLayout::columns);
        Stored c(m, n, DType::f32, MatrixLayout::rows);
        for (int64_t p = 0; p < k; ++p)
          for (int64_t j = 0; j < n; ++j) b.set(p, j, 0.5);
        const std::uint32_t bad = format_of(type).infinity() + mantissa;
        a.memory.set_bits(a.index(m - 1, k - 1), bad);
        b.memory.set_bits(b.index(1, n - 1), bad);
        a.set(0, 1, 1), a.set(m - 1, 1, 1);
        kernels().gemm({m, n, k, a.view(), b.view(), c.view(), nullptr, false});
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j)
            CHECK(std::isfinite(c.at(i, j)) == (i != m - 1 && j != n - 1) ||
                      (j == n - 1 && a.at(i, 1) == 0),
                  "m %d, %s, at %d %d: %g", int(m), kNames[int(type)], int(i), int(j),
                  c.at(i, j));
      }
}

// The same product by gemm, of which the bits are the same if sums are in order.
void check_order(Gemv gemv, int64_t n, const Stored& y) {
  gemv.in_order = true;
  kernels().gemv(gemv, 0, n / 3);
  kernels().gemv(gemv, n / 3, n);
  for (const int64_t rows : {gemv.m, int64_t{40}}) {  // that many more
    const Stored x(rows, gemv.k, DType::f32, MatrixLayout::rows);
    Stored c(rows, n, DType::f32, MatrixLayout::rows);
    for (int64_t i = 0; i < gemv.m; ++i)
      std::memcpy(const_cast<float*>(x.floats()) + i * x.row_stride,
                  static_cast<const float*>(gemv.x) + i * gemv.x_row_stride, gemv.k * sizeof(float));
    Gemm gemm = {rows, n, gemv.k, x.view(), {const_cast<void*>(gemv.weight), gemv.type, 1, gemv.weight_row_stride},
                 c.view(), gemv.bias};
    gemm.in_order = true;
    kernels().gemm(gemm);
    for (int64_t i = 0; i < gemv.m; ++i)
      for (int64_t j = 0; j < n; ++j)
        CHECK(c.at(i, j) == y.at(i, j), "m %d n %d k %d %s beside %d rows, at %d %d: %g, not %g", int(gemv.m),
              int(n), int(gemv.k), kNames[int(gemv.type)], int(rows), int(i), int(j), y.at(i, j), c.at(i, j));
  }
}

void check_gemv(int m, int64_t n, int64_t k, DType type, bool padded, bool bias) {
  const MatrixLayout layout = padded ? MatrixLayout::padded : MatrixLayout::rows;
  const Stored weight(n, k, type, layout, padded), x(m, k, DType::f32, layout, padded ? 2 : 0);
  const Stored biases(1, n, DType::f32, MatrixLayout::rows);
  Stored y(m, n, DType::f32, layout, padded);
  Gemv gemv;
  gemv.k = k, gemv.weight = weight.data(), gemv.type = type;
  gemv.weight_row_stride = weight.row_stride;
  gemv.bias = bias ? biases.floats() : nullptr;
  gemv.x = x.floats(), gemv.x_row_stride = x.row_stride;
  gemv.y = y.floats(), gemv.y_row_stride = y.row_stride;
  gemv.m = m;
  check_order(gemv, n, y);

  const std::vector<double> x_mk = x.values(), weight_nk = weight.values();
  std::vector<double> product(m * n);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double& sum = product[i * n + j] = bias ? biases.at(0, j) : 0.0;
      for (int64_t p = 0; p < k; ++p) sum += x_mk[i * k + p] * weight_nk[j * k + p];
    }

  for (int64_t first = 0; first <= n; first += 5) {
    gemv.in_order = first % 2 != 0;
    const int64_t last = first + (n - first) * 2 / 3 + (first == 0 ? (n + 2) / 3 : 0);
    const int64_t end = last < n ? last : n;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) y.set(i, j, 77);
    kernels().gemv(gemv, first, end);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const double expected = j < first || j >= end ? 77 : product[i * n + j];
        const double error = std::fabs(y.at(i, j) - expected);
        CHECK(error <= 1e-5 * std::fmax(10.0, std::fabs(expected)),
              "gemv m %d n %d k %d %s, rows %d to %d, at %d %d: %g, not %g", m, int(n), int(k),
              kNames[int(type)], int(first), int(end), int(i), int(j), y.at(i, j), expected);
      }
  }
}

void test_gemv() {
  for (int m = 1; m <= 16; ++m)
    for (const DType type : kTypes)
      for (const int64_t k : {0, 1, 15, 16, 17, 33, 100, 256, 777})
        for (const int64_t n : {0, 1, 3, 8, 9, 17, 26})
          check_gemv(m, n, k, type, (m + n + k) % 2 != 0, (m + k) % 3 == 0);
}

// Several products at once: one has the pool, the others run on their own threads.
void test_nested() {
  Threads::set_count(4);
  const int64_t m = 60, n = 200, k = 300;
  Stored a(m, k, DType::f32, MatrixLayout::rows), b(k, n, DType::bf16, MatrixLayout::columns);
  std::vector<Stored> results;
  for (int i = 0; i < 5; ++i) results.emplace_back(m, n, DType::f32, MatrixLayout::rows);
  parallel_for(5, [&](int64_t i) {
    kernels().gemm({m, n, k, a.view(), b.view(), results[i].view(), nullptr, false});
  });
  for (const Stored& c : results)
    CHECK(c.memory == results[0].memory, "nested products");
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
