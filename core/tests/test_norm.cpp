// RMSNorm against loops in double, forward and backward.
#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

struct Matrix {
  int64_t rows, d, stride;
  Memory memory;

  Matrix(DType type, int64_t rows, int64_t d, int64_t gap)
      : rows(rows), d(d), stride(d + gap), memory(type, rows * stride + 1) {}
  bool operator==(const Matrix&) const = default;
  Rows view() const { return {memory.data(), memory.type(), stride}; }
  int64_t index(int64_t row, int64_t i) const { return row * stride + i; }
  double get(int64_t row, int64_t i) const { return memory.get(index(row, i)); }
  void fill(double size, Random& random) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < d; ++i) memory.set(index(row, i), size * random.number());
  }
};

struct Case {
  int64_t rows, d, gap;
  DType x_type, residual_type, normed_type, total_type;
  bool residual, total, gate;
  double size;  // of the numbers
  float eps;
};

struct Problem {
  Case c;
  char name[200];
  Matrix x, residual, gate, dnormed, dtotal;
  std::vector<float> weight;

  Problem(const Case& chosen, Random& random)
      : c(chosen),
        x(c.x_type, c.rows, c.d, c.gap),
        residual(c.residual_type, c.rows, c.d, c.gap + 1),
        gate(c.total_type, c.rows, c.d, 1),
        dnormed(c.normed_type, c.rows, c.d, c.gap),
        dtotal(c.total_type, c.rows, c.d, 0) {
    std::snprintf(name, sizeof name, "rows %d d %d types %d%d%d%d%s%s size %g", int(c.rows),
                  int(c.d), int(c.x_type), int(c.residual_type), int(c.normed_type),
                  int(c.total_type), c.residual ? " residual" : "", c.total ? " total" : "", c.size);
    x.fill(c.size, random);
    residual.fill(c.size, random);
    gate.fill(4, random);
    dnormed.fill(1, random);
    dtotal.fill(1, random);
    for (int64_t i = 0; i < c.d; ++i) weight.push_back(static_cast<float>(random.number()));
  }
  Norm norm() const {
    Norm norm;
    norm.rows = c.rows, norm.d = c.d;
    norm.x = x.view();
    if (c.residual) norm.residual = residual.view();
    norm.weight = weight.data();
    norm.eps = c.eps;
    if (c.gate) norm.gate_after = gate.view();
    return norm;
  }
};

struct Result {
  Matrix normed, total;
  std::vector<float> scale;
  bool operator==(const Result&) const = default;
};

Result run_forward(const Problem& problem) {
  const Case& c = problem.c;
  Result r{Matrix(c.normed_type, c.rows, c.d, c.gap), Matrix(c.total_type, c.rows, c.d, 2),
           std::vector<float>(c.rows + 1, -77.0f)};
  kernels().norm(problem.norm(), {r.normed.view(), c.total ? r.total.view() : Rows{}, r.scale.data()});
  return r;
}

struct Gradients {
  Matrix x;
  std::vector<float> weight;
  bool operator==(const Gradients&) const = default;
};

Gradients run_backward(const Problem& problem, const Result& forward) {
  const Case& c = problem.c;
  Gradients d{Matrix(c.x_type, c.rows, c.d, c.gap),
              std::vector<float>(c.d + 1, -77.0f)};
  NormGradients g;
  g.normed = problem.dnormed.view();
  if (c.total) g.total = problem.dtotal.view();
  g.sum = forward.total.view();
  g.scale = forward.scale.data();
  g.x = d.x.view();
  g.weight = d.weight.data();
  kernels().norm_backward(problem.norm(), g);
  return d;
}

void check_forward(const Problem& problem, const Result& r) {
  const Case& c = problem.c;
  Matrix written(c.normed_type, c.rows, c.d, c.gap);  // and nothing beside it
  for (int64_t row = 0; row < c.rows; ++row) {
    std::vector<double> sum;
    double squares = 0;
    for (int64_t i = 0; i < c.d; ++i) {
      sum.push_back(problem.x.get(row, i) + (c.residual ? problem.residual.get(row, i) : 0));
      squares += sum.back() * sum.back();
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(c.d) + c.eps);
    const double found = r.scale[row];
    CHECK(std::fabs(found / scale - 1) < 2e-6, "%s: scale %g, not %g", problem.name, found, scale);
    for (int64_t i = 0; i < c.d; ++i) {
      const double s = sum[i];
      const double z = problem.gate.get(row, i), gate = c.gate ? z / (1 + std::exp(-z)) : 1;
      const double right = s * scale * problem.weight[i] * gate;
      const double y = r.normed.get(row, i);
      CHECK(std::fabs(y - right) <= 1e-5 + rounding(c.normed_type) * std::fabs(right),
            "%s: normed %g, not %g", problem.name, y, right);
      written.memory.set_bits(written.index(row, i), r.normed.memory.bits(r.normed.index(row, i)));
      const float single = static_cast<float>(s);  // the sum is one operation in float32
      if (c.total)
        CHECK(r.total.memory.bits(r.total.index(row, i)) == format_of(c.total_type).nearest(single),
              "%s: total %g, not %g", problem.name, r.total.get(row, i), s);
    }
  }
  CHECK(written.memory == r.normed.memory, "%s: written outside of the rows", problem.name);
  CHECK(r.scale.back() == -77.0f, "%s: a scale too many", problem.name);
}

void check_backward(const Problem& problem, const Result& forward, const Gradients& d) {
  const Case& c = problem.c;
  std::vector<double> dweight(c.d, 0.0);
  for (int64_t row = 0; row < c.rows; ++row) {
    // normed_i = s_i r w_i with r = (mean s^2 + eps)^-1/2, from the sum as it is stored.
    double through_scale = 0;
    const double scale = forward.scale[row];
    for (int64_t i = 0; i < c.d; ++i) {
      const double dy = problem.dnormed.get(row, i), s = forward.total.get(row, i);
      dweight[i] += dy * s * scale;
      through_scale += dy * problem.weight[i] * s;
    }
    for (int64_t i = 0; i < c.d; ++i) {
      const double s = forward.total.get(row, i);
      const double g = problem.dnormed.get(row, i) * problem.weight[i];
      const double right = scale * g -
                           scale * scale * scale * s / static_cast<double>(c.d) * through_scale +
                           (c.total ? problem.dtotal.get(row, i) : 0);
      const double found = d.x.get(row, i);
      CHECK(std::fabs(found - right) <= 1e-5 * (1 + scale) + rounding(c.x_type) * std::fabs(right),
            "%s: dx %g, not %g", problem.name, found, right);
    }
  }
  for (int64_t i = 0; i < c.d; ++i) {
    const double found = d.weight[i];
    const double right = dweight[i];
    CHECK(std::fabs(found - right) <= 1e-5 * (1 + static_cast<double>(c.rows) / 10),
          "%s: dweight %g, not %g", problem.name, found, right);
  }
  CHECK(d.weight.back() == -77.0f, "%s: a dweight too many", problem.name);
}

void check_cases() {
  Random random(1);
  const int64_t sizes[] = {1, 2, 3, 7, 15, 16, 17, 33, 64, 65, 200, 768, 1000};
  const int64_t rows[] = {0, 1, 2, 5, 16, 17, 33, 100, 300};
  for (int i = 0; i < 300; ++i) {
    Case c;
    c.d = sizes[random.below(13)];
    c.rows = c.d > 200 ? rows[random.below(6)] : rows[random.below(9)];
    c.gap = random.below(3);
    c.x_type = kTypes[random.below(3)];
    c.residual_type = kTypes[random.below(3)];
    c.normed_type = kTypes[random.below(3)];
    c.total_type = kTypes[random.below(3)];
    c.residual = random.below(2) == 0;
    c.total = random.below(3) != 0;
    c.gate = random.below(3) == 0;
    const double scales[] = {1, 1, 1e-2, 100};
    c.size = scales[random.below(4)];
    c.eps = random.below(2) == 0 ? 1e-5f : 1e-2f;
    const Problem problem(c, random);
    Result r = on_any_threads(problem.name, [&] { return run_forward(problem); });
    check_forward(problem, r);
    if (!c.total) r.total.fill(c.size, random);  // then the sum is anything
    check_backward(problem, r,
                   on_any_threads(problem.name, [&] { return run_backward(problem, r); }));
  }
}

// The sum may be stored over the residual, and what is normed over x.
void check_in_place() {
  Random random(2);
  for (const DType type : kTypes) {
    Problem problem({20, 77, 1, type, type, type, type, true, true, true, 1, 1e-5f}, random);
    const Result apart = run_forward(problem);
    std::vector<float> scale(20);
    kernels().norm(problem.norm(), {problem.x.view(), problem.residual.view(), scale.data()});
    for (int64_t row = 0; row < 20; ++row)
      for (int64_t i = 0; i < 77; ++i)
        CHECK(problem.x.get(row, i) == apart.normed.get(row, i) &&
                  problem.residual.get(row, i) == apart.total.get(row, i),
              "in place, type %d", (int)type);
  }
}

// A row of zeros has the scale that eps gives, and NaN stays in its row.
void check_special() {
  Random random(3);
  constexpr DType f32 = DType::f32;
  Problem problem({3, 40, 0, f32, f32, f32, f32, false, false, false, 1, 1e-4f}, random);
  for (int64_t i = 0; i < 40; ++i) problem.x.memory.set(problem.x.index(0, i), 0);
  problem.x.memory.set_bits(problem.x.index(1, 5), 0x7fc00000u);
  const Result r = run_forward(problem);
  CHECK(std::fabs(r.scale[0] - 100) < 1e-3 && r.normed.get(0, 7) == 0, "zeros: scale %g",
        r.scale[0]);
  for (int64_t i = 0; i < 40; ++i) {
    CHECK(std::isnan(r.normed.get(1, i)), "NaN was lost");
    CHECK(!std::isnan(r.normed.get(2, i)), "NaN has spread");
  }
}

}  // namespace

int main() {
  check_cases();
  check_in_place();
  check_special();
  return finish("norm");
}
