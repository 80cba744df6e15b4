// Products with quantized weights against loops over whole numbers.
#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

struct Case {
  std::int64_t m, n, k;
  int bits, group;
  bool offset;
};

struct Problem {
  Case c;
  std::vector<std::uint8_t> q;
  std::vector<std::uint16_t> scales, offsets;
  std::vector<float> x;
  QuantizedWeight weight;

  Problem(const Case& chosen, Random& random)
      : c(chosen), q(c.n * c.k * c.bits / 8), scales(c.n * c.k / c.group),
        offsets(c.offset ? scales.size() : 0), x(c.m * c.k) {
    for (auto& byte : q) byte = static_cast<std::uint8_t>(random.next() >> 40);
    for (auto& scale : scales) scale = static_cast<std::uint16_t>(0x3c00 + random.below(256));
    for (auto& offset : offsets) offset = static_cast<std::uint16_t>(0xbf00 + random.below(128));
    for (auto& number : x) number = static_cast<float>(random.number());
    weight = {c.bits, c.group, q.data(), scales.data(), c.offset ? offsets.data() : nullptr};
  }

  double number(std::int64_t i, std::int64_t p) const {
    const std::int64_t inside = p % c.group, half = c.group / 2;
    int whole = 0;
    if (c.bits == 8) whole = q[i * c.k + p];
    else {
      const int byte = q[i * c.k / 2 + p / c.group * half + inside % half];
      whole = inside < half ? byte & 15 : byte >> 4;
    }
    const std::int64_t at = i * (c.k / c.group) + p / c.group;
    const double scale = float_of(static_cast<std::uint32_t>(scales[at]) << 16);
    if (c.offset) return scale * whole + float_of(static_cast<std::uint32_t>(offsets[at]) << 16);
    return scale * (whole - (1 << (c.bits - 1)));
  }
};

void test_case(const Case& c, Random& random) {
  const Problem problem(c, random);
  const std::int64_t groups = c.k / c.group;
  std::vector<std::int8_t> q(c.m * c.k);
  std::vector<float> scales(c.m * groups);
  std::vector<std::int32_t> sums(c.m * groups);
  const QuantizedActivations rows = {c.m, c.k, c.group, q.data(), scales.data(), sums.data()};
  kernels().quantize_activations(problem.x.data(), c.k, rows, 0, c.m);
  std::vector<float> few(c.m * c.n, 1.0f), many = few, alone = few;
  const std::int64_t border = random.below(c.n + 1);
  const QuantizedGemv vectors = {problem.weight, rows, nullptr, few.data(), c.n, true};
  kernels().quantized_gemv(vectors, 0, border);
  kernels().quantized_gemv(vectors, border, c.n);
  QuantizedGemm product;
  product.m = c.m, product.n = c.n, product.k = c.k;
  product.a = problem.x.data(), product.a_row_stride = c.k;
  product.weight = problem.weight;
  product.c = many.data(), product.c_row_stride = c.n;
  product.accumulate = true;
  kernels().quantized_gemm(product);
  // One row at a time, all at once, or spread over threads: the same bits.
  for (std::int64_t r = 0; r < c.m; ++r) {
    const QuantizedActivations row = {1, c.k, c.group, rows.q + r * c.k, rows.scales + r * groups,
                                      rows.sums + r * groups};
    kernels().quantized_gemv({problem.weight, row, nullptr, alone.data() + r * c.n, c.n, true}, 0, c.n);
  }
  CHECK(few == many, "bits %d group %d, %d rows: few are not many", c.bits, c.group, int(c.m));
  CHECK(few == alone, "bits %d group %d, %d rows: few are not one by one", c.bits, c.group, int(c.m));
  for (std::int64_t r = 0; r < c.m; ++r) {
    for (std::int64_t p = 0; p < c.k; ++p) {
      const double back = double(q[r * c.k + p]) * scales[r * groups + p / c.group];
      CHECK(std::fabs(back - problem.x[r * c.k + p]) <= 0.5001 * scales[r * groups + p / c.group],
            "rounding row %d, column %d", int(r), int(p));
    }
    for (std::int64_t i = 0; i < c.n; ++i) {
      double expected = 0;
      for (std::int64_t p = 0; p < c.k; ++p)
        expected += double(q[r * c.k + p]) * scales[r * groups + p / c.group] * problem.number(i, p);
      const double tolerance = 1e-5 * std::fmax(1, std::fabs(expected)) * std::sqrt(double(c.k));
      CHECK(std::fabs(few[r * c.n + i] - 1 - expected) <= tolerance, "few: bits %d group %d: %g, expected %g",
            c.bits, c.group, few[r * c.n + i], expected);
      CHECK(std::fabs(many[r * c.n + i] - 1 - expected) <= tolerance,
            "many: bits %d group %d: %g, expected %g", c.bits, c.group, many[r * c.n + i], expected);
    }
  }
}

}  // namespace

int main() {
  Random random(3);
  Threads::set_count(3);
  for (const int bits : {8, 4})
    for (const int group : {32, 64, 128})
      for (const bool offset : {false, true})
        for (const std::int64_t groups : {1, 3, 20})
          test_case({1 + random.below(40), 1 + random.below(50), groups * group, bits, group, offset}, random);
  test_case({90, 300, 256, 4, 128, false}, random);  // over all threads
  return finish("quantized");
}
