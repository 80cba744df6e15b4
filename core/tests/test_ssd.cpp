// The state space duality's kernels against the plain recurrence in double precision, over shapes,
// types, strides and options.
#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;
using std::int64_t;
using Floats = std::vector<float>;

namespace {

std::string what;  // the case at work
Random randomness{5};

struct Sizes {
  int64_t b, l, heads, p, n, groups;
  int64_t e() const { return heads * p; }
};

// Numbers (rows, steps, width) of any type, with gaps or without, as a kernel's argument.
struct Stored {
  Memory memory;
  int64_t step, row, gap;

  Stored(DType type, int64_t b, int64_t l, int64_t width, bool dense, double size, double shift = 0)
      : gap(dense ? 1 : 2) {
    step = gap * width + (dense ? 0 : 3);
    row = l * step;
    memory = Memory(type, b * row);
    for (std::size_t i = 0; i < memory.size(); ++i)
      memory.set(static_cast<int64_t>(i), shift + size * randomness.number());
  }
  double at(int64_t b, int64_t t, int64_t c) const { return memory.get(b * row + t * step + c * gap); }
  Tensor3 view() { return {memory.data(), memory.type(), row, step, gap}; }
  Projection maps(int64_t n) { return {memory.data(), memory.type(), row, step, n * gap, gap}; }
};

Floats random_floats(int64_t count, double size, double shift = 0) {
  Floats values(count);
  for (float& value : values) value = static_cast<float>(shift + size * randomness.number());
  return values;
}

struct Options {
  DType type = DType::f32;
  bool dense = true, gate = true, skip = true, bias = true, softplus = true, limits = false;
  bool skip_of_channels = false;
};

// A case with its inputs, its segments, and what the recurrence makes of them.
struct Case {
  Sizes z_;
  Options options;
  Stored x, z, dt, B, C, y;
  Floats A, D, bias, initial, last, step_state;
  std::vector<int64_t> lists[5];
  Ssd ssd;
  std::vector<double> expected_y, expected_last;

  Case(const Sizes& s, const Options& o)
      : z_(s), options(o), x(o.type, s.b, s.l, s.e(), o.dense, 1), z(o.type, s.b, s.l, s.e(), o.dense, 3),
        dt(o.type, s.b, s.l, s.heads, o.dense, 2, -1), B(o.type, s.b, s.l, s.groups * s.n, o.dense, 1),
        C(o.type, s.b, s.l, s.groups * s.n, o.dense, 1), y(o.type, s.b, s.l, s.e(), o.dense, 0),
        A(random_floats(s.heads, 4, -4)), D(random_floats(s.e(), 1)), bias(random_floats(s.heads, 1)) {
    if (!o.softplus)  // it is a step size itself
      for (std::size_t i = 0; i < dt.memory.size(); ++i)
        dt.memory.set(static_cast<int64_t>(i), 0.5 + 0.5 * randomness.number());
    static_cast<SsdInputs&>(ssd) = {s.heads, s.p, s.n, s.groups, x.view(), {}, dt.view(),
                                    B.maps(s.n), C.maps(s.n), A.data()};
    if (o.gate) ssd.z = z.view();
    if (o.skip) ssd.D = D.data();
    if (o.bias && o.softplus) ssd.dt_bias = bias.data();
    ssd.softplus = o.softplus;
    ssd.D_of_channels = o.skip_of_channels;
    if (o.limits) ssd.low = 0.3f, ssd.high = 0.9f;
  }

  // Every row cut once, the second part going on from zeros or from a state; in any direction.
  void cut(bool reverse, bool with_states) {
    int64_t states = 0;
    for (int64_t row = 0; row < z_.b; ++row) {
      const int64_t border = z_.l == 0 ? 0 : randomness.below(z_.l + 1);
      const int64_t borders[] = {0, border, z_.l};
      for (int part = 0; part < 2; ++part) {
        const int64_t state = with_states && randomness.below(3) > 0 ? states++ : -1;
        const int64_t values[] = {row, borders[part], borders[part + 1], state, state};
        for (int i = 0; i < 5; ++i) lists[i].push_back(values[i]);
      }
    }
    initial = random_floats(states * z_.e() * z_.n, 1);
    last = Floats(initial.size(), 77.0f);
    ssd.segments = {static_cast<int64_t>(lists[0].size()), lists[0].data(), lists[1].data(), lists[2].data(),
                    lists[3].data(), lists[4].data(), reverse};
    if (states > 0) ssd.initial = initial.data();
  }

  double size_of_step(int64_t row, int64_t t, int64_t h) const {
    double size = dt.at(row, t, h) + (ssd.dt_bias != nullptr ? static_cast<double>(bias[h]) : 0);
    if (ssd.softplus) size = std::log1p(std::exp(size));
    return std::fmin(std::fmax(size, static_cast<double>(ssd.low)), static_cast<double>(ssd.high));
  }

  double skip(int64_t c) const {
    if (ssd.D == nullptr) return 0;
    return static_cast<double>(D[ssd.D_of_channels ? c : c / z_.p]);
  }

  // One step of one row; h (e, n) advances, out (e,).
  void recurrence(int64_t row, int64_t t, double* state, double* out) const {
    const int64_t n = z_.n, of_group = z_.heads / z_.groups;
    for (int64_t c = 0; c < z_.e(); ++c) {
      const int64_t head = c / z_.p, group = head / of_group;
      const double size = size_of_step(row, t, head);
      const double decay = std::exp(size * static_cast<double>(A[head])), input = x.at(row, t, c);
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        double& h = state[c * n + i];
        h = decay * h + size * input * B.at(row, t, group * n + i);
        sum += h * C.at(row, t, group * n + i);
      }
      sum += skip(c) * input;
      if (ssd.z) sum *= z.at(row, t, c) * sigmoid(z.at(row, t, c));
      out[c] = sum;
    }
  }

  void check(const std::vector<double>& expected, const std::vector<double>& found, const char* name) const {
    double largest = 1;
    for (const double value : expected) largest = std::fmax(largest, std::fabs(value));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double tolerance = 1e-5 * largest + rounding(options.type) * std::fabs(expected[i]);
      CHECK(std::fabs(found[i] - expected[i]) <= tolerance, "%s: %s %zu is %g, expected %g", what.c_str(),
            name, i, found[i], expected[i]);
    }
  }

  void test_forward() {
    for (const auto kernel : {kernels().ssd, kernels().ssd_in_order})
      for (const int threads : {1, 3}) {
        Threads::set_count(threads);
        Floats found_last = last;
        kernel(ssd, {y.view(), last.empty() ? nullptr : found_last.data()});
        check_forward(found_last);
        static Memory first;
        if (threads == 1) first = y.memory;
        CHECK(first == y.memory, "%s: %d threads give another y than one", what.c_str(), threads);
      }
  }

  void check_forward(const Floats& found_last) const {
    const int64_t e = z_.e(), size = e * z_.n;
    for (int64_t s = 0; s < ssd.segments.count; ++s) {
      std::vector<double> state(size), out(e), expected, found;
      const int64_t in = lists[3][s], row = lists[0][s];
      for (int64_t i = 0; i < size; ++i) state[i] = in >= 0 ? static_cast<double>(initial[in * size + i]) : 0;
      const int64_t steps = lists[2][s] - lists[1][s];
      for (int64_t k = 0; k < steps; ++k) {
        const int64_t t = ssd.segments.reverse ? lists[2][s] - 1 - k : lists[1][s] + k;
        recurrence(row, t, state.data(), out.data());
        for (int64_t c = 0; c < e; ++c) expected.push_back(out[c]), found.push_back(y.at(row, t, c));
      }
      check(expected, found, "y");
      if (in < 0) continue;
      std::vector<double> left(size);
      for (int64_t i = 0; i < size; ++i) left[i] = static_cast<double>(found_last[in * size + i]);
      Options wide = options;
      wide.type = DType::f32;  // states are float32
      Case::check_as(wide, state, left);
    }
  }

  static void check_as(const Options& wide, const std::vector<double>& expected, const std::vector<double>& found) {
    double largest = 1;
    for (const double value : expected) largest = std::fmax(largest, std::fabs(value));
    for (std::size_t i = 0; i < expected.size(); ++i)
      CHECK(std::fabs(found[i] - expected[i]) <= 1e-5 * largest + rounding(wide.type) * std::fabs(expected[i]),
            "%s: state %zu is %g, expected %g", what.c_str(), i, found[i], expected[i]);
  }

  // The gradients of a segment, of the state that it leaves being given in g (e, n).
  struct Gradients {
    std::vector<double> x, dt, B, C, z, A, D, bias, initial;
  };

  void go_back(int64_t s, const Stored& dy, const std::vector<double>& dlast, Gradients& to) const {
    const int64_t e = z_.e(), n = z_.n, size = e * n, of_group = z_.heads / z_.groups;
    const int64_t row = lists[0][s], in = lists[3][s], steps = lists[2][s] - lists[1][s];
    std::vector<std::vector<double>> states(1, std::vector<double>(size)), outs;
    std::vector<double> g(size), out(e);
    for (int64_t i = 0; i < size; ++i) {
      states[0][i] = in >= 0 ? static_cast<double>(initial[in * size + i]) : 0;
      g[i] = in >= 0 && !dlast.empty() ? dlast[in * size + i] : 0;
    }
    const auto step = [&](int64_t k) { return ssd.segments.reverse ? lists[2][s] - 1 - k : lists[1][s] + k; };
    for (int64_t k = 0; k < steps; ++k) {
      states.push_back(states.back());
      recurrence(row, step(k), states.back().data(), out.data());
    }
    for (int64_t k = steps - 1; k >= 0; --k) {
      const int64_t t = step(k), at = row * z_.l + t;
      for (int64_t h = 0; h < z_.heads; ++h) {
        const double dt_ = size_of_step(row, t, h), decay = std::exp(dt_ * static_cast<double>(A[h]));
        double ddt = 0, dproduct = 0;
        for (int64_t c = h * z_.p; c < (h + 1) * z_.p; ++c) {
          const double input = x.at(row, t, c), zc = ssd.z ? z.at(row, t, c) : 0, s_ = sigmoid(zc);
          const double du = dy.at(row, t, c) * (ssd.z ? zc * s_ : 1);
          double y_ = skip(c) * input, dx = skip(c) * du;
          for (int64_t i = 0; i < n; ++i) {
            const int64_t map = (h / of_group) * n + i;
            const double b = B.at(row, t, map), after = states[k + 1][c * n + i], before = states[k][c * n + i];
            double& G = g[c * n + i];
            G += du * C.at(row, t, map);
            y_ += after * C.at(row, t, map);
            dx += G * dt_ * b;
            to.B[at * z_.groups * n + map] += G * dt_ * input;
            to.C[at * z_.groups * n + map] += du * after;
            ddt += G * input * b;
            dproduct += G * decay * before;
            G *= decay;
          }
          to.x[at * e + c] = dx;
          if (ssd.z) to.z[at * e + c] = dy.at(row, t, c) * s_ * (1 + zc * (1 - s_)) * y_;
          if (ssd.D != nullptr) to.D[ssd.D_of_channels ? c : h] += du * input;
        }
        to.A[h] += dproduct * dt_;
        ddt += dproduct * static_cast<double>(A[h]);
        const double raw = dt.at(row, t, h) + (ssd.dt_bias != nullptr ? static_cast<double>(bias[h]) : 0);
        if (ssd.softplus) ddt *= sigmoid(raw);
        const double unlimited = ssd.softplus ? std::log1p(std::exp(raw)) : raw;
        if (unlimited < static_cast<double>(ssd.low) || unlimited > static_cast<double>(ssd.high)) ddt = 0;
        to.dt[at * z_.heads + h] = ddt;
        to.bias[h] += ddt;
      }
    }
    if (in >= 0)
      for (int64_t i = 0; i < size; ++i) to.initial[in * size + i] = g[i];
  }

  Gradients zeros() const {
    const int64_t steps = z_.b * z_.l, maps = steps * z_.groups * z_.n, e = z_.e();
    const auto of = [](int64_t count) { return std::vector<double>(static_cast<std::size_t>(count)); };
    return {of(steps * e), of(steps * z_.heads), of(maps), of(maps), of(ssd.z ? steps * e : 0), of(z_.heads),
            of(ssd.D == nullptr ? 0 : ssd.D_of_channels ? e : z_.heads), of(z_.heads),
            of(static_cast<int64_t>(initial.size()))};
  }

  std::vector<double> all_of(const Stored& numbers, int64_t width) const {
    std::vector<double> found;
    for (int64_t row = 0; row < z_.b; ++row)
      for (int64_t t = 0; t < z_.l; ++t)
        for (int64_t c = 0; c < width; ++c) found.push_back(numbers.at(row, t, c));
    return found;
  }

  static std::vector<double> wide(const Floats& values) { return {values.begin(), values.end()}; }

  void test_backward() {
    const Stored dy(options.type, z_.b, z_.l, z_.e(), options.dense, 1);
    const Floats dlast = random_floats(static_cast<int64_t>(initial.size()), 1);
    Gradients expected = zeros();
    for (int64_t s = 0; s < ssd.segments.count; ++s) go_back(s, dy, wide(dlast), expected);
    Floats first;
    for (const int threads : {1, 3}) {
      Threads::set_count(threads);
      Stored dx = x, ddt = dt, dz = z, given = dy;
      Floats dA(z_.heads, 7), dB(expected.B.size(), 7), dC(expected.C.size(), 7), dD(expected.D.size(), 7),
          dbias(z_.heads, 7), dinitial(initial.size(), 7);
      SsdGradients gradients;
      gradients.y = given.view();
      gradients.last = dlast.empty() ? nullptr : dlast.data();
      gradients.x = dx.view(), gradients.dt = ddt.view();
      if (ssd.z) gradients.z = dz.view();
      gradients.B = dB.data(), gradients.C = dC.data();
      gradients.rows = z_.b, gradients.steps = z_.l;
      gradients.A = dA.data();
      if (ssd.D != nullptr) gradients.D = dD.data();
      if (ssd.dt_bias != nullptr) gradients.dt_bias = dbias.data();
      if (!initial.empty()) gradients.initial = dinitial.data();
      gradients.n_states = initial.empty() ? 0 : static_cast<int64_t>(initial.size()) / (z_.e() * z_.n);
      kernels().ssd_backward(ssd, gradients);
      check_gradient(expected.x, all_of(dx, z_.e()), "dx");
      check_gradient(expected.dt, all_of(ddt, z_.heads), "ddt");
      if (ssd.z) check_gradient(expected.z, all_of(dz, z_.e()), "dz");
      check_gradient(expected.B, wide(dB), "dB");
      check_gradient(expected.C, wide(dC), "dC");
      check_gradient(expected.A, wide(dA), "dA");
      if (ssd.D != nullptr) check_gradient(expected.D, wide(dD), "dD");
      if (ssd.dt_bias != nullptr) check_gradient(expected.bias, wide(dbias), "ddt_bias");
      if (!initial.empty()) check_gradient(expected.initial, wide(dinitial), "dinitial");
      Floats all = dB;
      for (const Floats& each : {dC, dA, dD, dbias, dinitial}) all.insert(all.end(), each.begin(), each.end());
      if (threads == 1) first = all;
      CHECK(first == all, "%s: %d threads give other gradients than one", what.c_str(), threads);
    }
  }

  // Gradients are sums of more terms: ten times the tolerance of results.
  void check_gradient(const std::vector<double>& expected, const std::vector<double>& found, const char* name) const {
    double largest = 1;
    for (const double value : expected) largest = std::fmax(largest, std::fabs(value));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      const double tolerance = 1e-4 * largest + rounding(options.type) * std::fabs(expected[i]);
      CHECK(std::fabs(found[i] - expected[i]) <= tolerance, "%s: %s %zu is %g, expected %g", what.c_str(),
            name, i, found[i], expected[i]);
    }
  }

  // The first step of each row, channels in two calls.
  void test_step() {
    const int64_t e = z_.e(), size = e * z_.n, stride = size + 5;
    step_state = random_floats(z_.b * stride, 1);
    const Floats before = step_state;
    SsdStep step;
    static_cast<SsdInputs&>(step) = ssd;
    step.b = z_.b;
    step.y = y.view();
    step.state = step_state.data();
    step.state_stride = stride;
    const int64_t border = randomness.below(e + 1);
    kernels().ssd_step(step, 0, border);
    kernels().ssd_step(step, border, e);
    for (int64_t row = 0; row < z_.b; ++row) {
      std::vector<double> state(size), out(e), found(e), left(size);
      for (int64_t i = 0; i < size; ++i) {
        state[i] = static_cast<double>(before[row * stride + i]);
        left[i] = static_cast<double>(step_state[row * stride + i]);
      }
      recurrence(row, 0, state.data(), out.data());
      for (int64_t c = 0; c < e; ++c) found[c] = y.at(row, 0, c);
      check(out, found, "y of a step");
      check_as({}, state, left);
    }
  }
};

const Sizes kSizes[] = {
    {2, 150, 4, 16, 16, 2},  // chunks, and a last one that is shorter
    {1, 70, 3, 5, 7, 1},     // nothing fits a vector
    {2, 9, 2, 70, 33, 2},    // heads wider than a block
    {3, 1, 2, 64, 128, 1},   // single steps
    {1, 64, 6, 1, 1, 3},     // heads of width one
    {2, 0, 2, 3, 4, 1},      // no steps
};

void test_all() {
  for (const Sizes& sizes : kSizes)
    for (int i = 0; i < 6; ++i) {
      Options options;
      options.type = kTypes[i % 3];
      options.dense = i % 2 == 0;
      options.gate = i != 1, options.skip = i != 2, options.bias = i != 3;
      options.softplus = i != 4, options.limits = i >= 4;
      options.skip_of_channels = i % 2 == 1;
      what = "l " + std::to_string(sizes.l) + ", p " + std::to_string(sizes.p) + ", case " + std::to_string(i);
      Case one(sizes, options);
      one.cut(i % 3 == 1, i > 0);
      one.test_forward();
      one.test_backward();
      if (sizes.l > 0) one.test_step();
    }
}

// Steps so long that their sums lose all digits of a float beside what lies between two of them.
void test_long_steps() {
  what = "long steps";
  Options options;
  options.softplus = false;
  Case one({1, 64, 1, 8, 16, 1}, options);
  for (std::size_t i = 0; i < one.dt.memory.size(); ++i) one.dt.memory.set(static_cast<int64_t>(i), i % 8 == 3 ? 4000 : 0.05);
  one.cut(false, true);
  one.test_forward();
  one.test_backward();
}

}  // namespace

int main() {
  test_all();
  test_long_steps();
  return finish("ssd");
}
