// The convolution against loops in double: forward, backward, and one step at a time.
#include <algorithm>

#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

using Doubles = std::vector<double>;

enum Layout { kChannelsLast, kChannelsFirst, kGaps, kBackwards, kLayouts };

// (rows, steps, channels) in one of several layouts.
struct Tensor {
  Memory memory;
  Tensor3 view;
  std::int64_t base = 0;

  Tensor(DType type, Layout layout, std::int64_t b, std::int64_t l, std::int64_t e) {
    std::int64_t channel = 1, step = e, row = l * e, count = b * l * e;
    if (layout == kChannelsFirst) step = 1, channel = l;
    if (layout == kGaps) channel = 3, step = 3 * e + 2, row = step * l + 7, count = row * b;
    if (layout == kBackwards) {
      step = -(e + 5), row = (e + 5) * l, count = row * b;
      base = (e + 5) * std::max<std::int64_t>(l - 1, 0);
    }
    memory = Memory(type, count);
    char* const first = static_cast<char*>(memory.data());
    view = {first + base * size_of(type), type, row, step, channel};
  }
  std::int64_t index(std::int64_t b, std::int64_t t, std::int64_t c) const {
    return base + b * view.row_stride + t * view.step_stride + c * view.channel_stride;
  }
  double get(std::int64_t b, std::int64_t t, std::int64_t c) const {
    return memory.get(index(b, t, c));
  }
};

// (states, e, w), with a gap between states; the columns first or the channels first.
struct Windows {
  Memory memory;
  Window view;

  Windows() = default;
  Windows(DType type, bool columns_inside, std::int64_t states, std::int64_t e, std::int64_t w) {
    const std::int64_t state = e * w + 3;
    memory = Memory(type, states * state);
    view = {nullptr, type, state, columns_inside ? w : 1, columns_inside ? 1 : e, w};
    view.data = memory.data();
  }
  std::int64_t index(std::int64_t s, std::int64_t c, std::int64_t column) const {
    return s * view.state_stride + c * view.channel_stride + column * view.column_stride;
  }
};

struct Case {
  std::int64_t b, l, e, k, w;
  Layout layout;
  DType x_type, y_type, window_type;
  bool silu, bias, initial, reverse, cut;
};

std::string text_of(const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text, "b %d l %d e %d k %d w %d layout %d types %d%d%d%s%s%s%s%s",
                (int)c.b, (int)c.l, (int)c.e, (int)c.k, (int)c.w, (int)c.layout, (int)c.x_type,
                (int)c.y_type, (int)c.window_type, c.silu ? " silu" : "", c.bias ? " bias" : "",
                c.initial ? " initial" : "", c.reverse ? " reverse" : "", c.cut ? " cut" : "");
  return text;
}

struct Problem {
  Case c;
  std::string name;
  std::int64_t states;
  std::vector<std::int64_t> rows, starts, stops, in, out;
  Tensor x, dy;
  std::vector<float> weight, bias;
  Windows initial, dfinal;

  Problem(const Case& chosen, Random& random)
      : c(chosen),
        name(text_of(chosen)),
        x(c.x_type, c.layout, c.b, c.l, c.e),
        dy(c.y_type, c.layout, c.b, c.l, c.e) {
    cut(random);
    states = static_cast<std::int64_t>(rows.size()) + 1;
    for (std::int64_t s = 0; s + 1 < states; ++s) {
      // Some begin from zeros, two may begin from one state; states are left in another order.
      in.push_back(random.below(4) == 0 ? -1 : random.below(states));
      out.push_back(random.below(5) == 0 ? -1 : states - 1 - s);
    }
    for (std::int64_t b = 0; b < c.b; ++b)
      for (std::int64_t t = 0; t < c.l; ++t)
        for (std::int64_t e = 0; e < c.e; ++e) {
          x.memory.set(x.index(b, t, e), 2 * random.number());
          dy.memory.set(dy.index(b, t, e), random.number());
        }
    for (std::int64_t i = 0; i < c.e * c.k; ++i)
      weight.push_back(static_cast<float>(random.number()));
    for (std::int64_t i = 0; i < c.e; ++i) bias.push_back(static_cast<float>(random.number()));
    initial = Windows(c.window_type, random.below(2) == 0, states, c.e, c.w);
    dfinal = Windows(DType::f32, random.below(2) == 0, states, c.e, c.w);
    for (std::int64_t s = 0; s < states; ++s)
      for (std::int64_t e = 0; e < c.e; ++e)
        for (std::int64_t i = 0; i < c.w; ++i) {
          initial.memory.set(initial.index(s, e, i), 2 * random.number());
          dfinal.memory.set(dfinal.index(s, e, i), random.number());
        }
  }

  void cut(Random& random) {
    for (std::int64_t b = 0; b < c.b; ++b) {
      std::int64_t start = 0;
      do {
        const std::int64_t stop = c.cut ? std::min(c.l, start + random.below(c.l + 1) / 2) : c.l;
        if (!c.cut || random.below(6) != 0) {  // else steps that belong to none
          rows.push_back(b), starts.push_back(start), stops.push_back(stop);
        }
        start = stop;
      } while (start < c.l && rows.size() < 30);
    }
  }

  Conv conv() {
    Conv conv;
    conv.e = c.e, conv.k = c.k;
    conv.segments = {static_cast<std::int64_t>(rows.size()),
                     rows.data(),
                     starts.data(),
                     stops.data(),
                     in.data(),
                     out.data(),
                     c.reverse};
    conv.x = x.view;
    conv.weight = weight.data();
    conv.bias = c.bias ? bias.data() : nullptr;
    conv.silu = c.silu;
    if (c.initial) conv.initial = initial.view;
    return conv;
  }

  std::int64_t length(std::size_t s) const { return stops[s] - starts[s]; }
  std::int64_t step(std::size_t s, std::int64_t p) const {
    return c.reverse ? stops[s] - 1 - p : starts[s] + p;
  }
  // The input at a position of segment s, the window's before 0.
  double input(std::size_t s, std::int64_t p, std::int64_t e) const {
    if (p >= 0) return x.get(rows[s], step(s, p), e);
    if (!c.initial || in[s] < 0 || p < -c.w) return 0;
    return initial.memory.get(initial.index(in[s], e, c.w + p));
  }
  double before_silu(std::size_t s, std::int64_t p, std::int64_t e, double* size = nullptr) const {
    double total = c.bias ? bias[static_cast<std::size_t>(e)] : 0, sizes = 1;
    for (std::int64_t j = 0; j < c.k; ++j) {
      const double term =
          weight[static_cast<std::size_t>(e * c.k + j)] * input(s, p - c.k + 1 + j, e);
      total += term, sizes += std::fabs(term);
    }
    if (size != nullptr) *size = sizes;
    return total;
  }
};

struct Forward {
  Tensor y;
  Windows final;
};

Forward run_forward(Problem& problem, DType final_type) {
  const Case& c = problem.c;
  Forward f{Tensor(c.y_type, c.layout, c.b, c.l, c.e),
            Windows(final_type, c.l % 2 == 0, problem.states, c.e, c.w)};
  kernels().conv(problem.conv(), {f.y.view, f.final.view});
  return f;
}

void check_forward(Problem& problem, DType final_type) {
  const Case& c = problem.c;
  Threads::set_count(1);
  const Forward f = run_forward(problem, final_type);
  for (const int threads : {2, 4}) {
    Threads::set_count(threads);
    const Forward again = run_forward(problem, final_type);
    CHECK(again.y.memory == f.y.memory && again.final.memory == f.final.memory,
          "%s: %d threads give something else", problem.name.c_str(), threads);
  }
  Tensor expected(c.y_type, c.layout, c.b, c.l, c.e);  // untouched where no segment is
  for (std::size_t s = 0; s < problem.rows.size(); ++s)
    for (std::int64_t e = 0; e < c.e; ++e) {
      for (std::int64_t p = 0; p < problem.length(s); ++p) {
        double size;
        double y = problem.before_silu(s, p, e, &size);
        if (c.silu) y *= sigmoid(y);
        const std::int64_t at = f.y.index(problem.rows[s], problem.step(s, p), e);
        const double error = std::fabs(f.y.memory.get(at) - y);
        CHECK(error <= 5e-7 * size + rounding(c.y_type) * std::fabs(y), "%s: y is %g, not %g",
              problem.name.c_str(), f.y.memory.get(at), y);
        expected.memory.set_bits(at, f.y.memory.bits(at));
      }
      for (std::int64_t i = 0; problem.out[s] >= 0 && i < c.w; ++i) {
        const std::int64_t p = problem.length(s) - c.w + i;
        const std::uint32_t bits = f.final.memory.bits(f.final.index(problem.out[s], e, i));
        const std::uint32_t right = format_of(final_type).nearest(problem.input(s, p, e));
        CHECK(bits == right, "%s: final window %08x, not %08x", problem.name.c_str(), bits, right);
      }
    }
  CHECK(expected.memory == f.y.memory, "%s: y is written outside of segments",
        problem.name.c_str());
}

struct Backward {
  Tensor x;
  Windows initial;
  std::vector<float> weight, bias;
};

Backward run_backward(Problem& problem, bool with_final) {
  const Case& c = problem.c;
  Backward d{Tensor(c.x_type, c.layout, c.b, c.l, c.e),
             Windows(DType::f32, c.l % 2 == 0, problem.states, c.e, c.w),
             std::vector<float>(static_cast<std::size_t>(c.e * c.k), -77.0f),
             std::vector<float>(static_cast<std::size_t>(c.e), -77.0f)};
  ConvGradients g;
  g.y = problem.dy.view;
  if (with_final) g.final = problem.dfinal.view;
  g.x = d.x.view;
  g.weight = d.weight.data();
  g.bias = c.bias ? d.bias.data() : nullptr;
  if (c.initial) g.initial = d.initial.view;
  g.n_states = problem.states;
  kernels().conv_backward(problem.conv(), g);
  return d;
}

// A sum and the size of what went into it.
struct Sum {
  double value = 0, size = 0;
  void add(double term) { value += term, size += std::fabs(term); }
};

void check_sum(const char* what, const Problem& problem, double found, const Sum& sum, DType type) {
  const double allowed = 4e-6 * (1 + sum.size) + rounding(type) * std::fabs(sum.value);
  CHECK(std::fabs(found - sum.value) <= allowed, "%s: %s is %g, not %g",
        problem.name.c_str(), what, found, sum.value);
}

void check_backward(Problem& problem, bool with_final) {
  const Case& c = problem.c;
  Threads::set_count(1);
  const Backward d = run_backward(problem, with_final);
  for (const int threads : {2, 4}) {
    Threads::set_count(threads);
    const Backward again = run_backward(problem, with_final);
    CHECK(again.x.memory == d.x.memory && again.initial.memory == d.initial.memory &&
              again.weight == d.weight && again.bias == d.bias,
          "%s: %d threads give other gradients", problem.name.c_str(), threads);
  }
  for (std::int64_t e = 0; e < c.e; ++e) {
    std::vector<Sum> dx(static_cast<std::size_t>(c.b * c.l)),
        dweight(static_cast<std::size_t>(c.k)),
        dwindow(static_cast<std::size_t>(problem.states * c.w));
    std::vector<bool> covered(dx.size());
    Sum dbias;
    for (std::size_t s = 0; s < problem.rows.size(); ++s) {
      // A gradient of the input at a position goes to x, to the window, or is lost.
      const auto add = [&](std::int64_t p, double term) {
        if (p >= 0)
          dx[static_cast<std::size_t>(problem.rows[s] * c.l + problem.step(s, p))].add(term);
        else if (problem.in[s] >= 0 && p >= -c.w)
          dwindow[static_cast<std::size_t>(problem.in[s] * c.w + c.w + p)].add(term);
      };
      for (std::int64_t p = 0; p < problem.length(s); ++p) {
        covered[static_cast<std::size_t>(problem.rows[s] * c.l + problem.step(s, p))] = true;
        double g = problem.dy.get(problem.rows[s], problem.step(s, p), e);
        if (c.silu) {
          const double u = problem.before_silu(s, p, e);
          g *= sigmoid(u) * (1 + u * (1 - sigmoid(u)));
        }
        dbias.add(g);
        for (std::int64_t j = 0; j < c.k; ++j) {
          add(p - c.k + 1 + j, g * problem.weight[static_cast<std::size_t>(e * c.k + j)]);
          dweight[static_cast<std::size_t>(j)].add(g * problem.input(s, p - c.k + 1 + j, e));
        }
      }
      for (std::int64_t i = 0; with_final && problem.out[s] >= 0 && i < c.w; ++i)
        add(problem.length(s) - c.w + i,
            problem.dfinal.memory.get(problem.dfinal.index(problem.out[s], e, i)));
    }
    for (std::int64_t b = 0; b < c.b; ++b)
      for (std::int64_t t = 0; t < c.l; ++t)
        if (covered[static_cast<std::size_t>(b * c.l + t)])
          check_sum("dx", problem, d.x.get(b, t, e), dx[static_cast<std::size_t>(b * c.l + t)],
                    c.x_type);
    for (std::int64_t j = 0; j < c.k; ++j)
      check_sum("dweight", problem, d.weight[static_cast<std::size_t>(e * c.k + j)],
                dweight[static_cast<std::size_t>(j)], DType::f32);
    if (c.bias) check_sum("dbias", problem, d.bias[static_cast<std::size_t>(e)], dbias, DType::f32);
    for (std::int64_t s = 0; c.initial && s < problem.states; ++s)
      for (std::int64_t i = 0; i < c.w; ++i)
        check_sum("dinitial", problem, d.initial.memory.get(d.initial.index(s, e, i)),
                  dwindow[static_cast<std::size_t>(s * c.w + i)], DType::f32);
  }
}

void check_sequences() {
  Random random(1);
  const std::int64_t channels[] = {1, 3, 7, 8, 16, 17, 64, 70, 131, 200};
  const std::int64_t lengths[] = {0, 1, 2, 3, 5, 31, 33, 65, 130, 300};
  const std::int64_t taps[] = {1, 2, 3, 4, 5, 9};
  for (int i = 0; i < 400; ++i) {
    Case c;
    c.b = 1 + random.below(3);
    c.l = lengths[random.below(10)];
    c.e = channels[random.below(10)];
    if (c.l * c.e > 10000) c.b = 1;
    c.k = taps[random.below(6)];
    c.w = c.k - 1 + random.below(3);
    c.layout = static_cast<Layout>(random.below(kLayouts));
    c.x_type = kTypes[random.below(3)];
    c.y_type = random.below(3) == 0 ? kTypes[random.below(3)] : c.x_type;
    c.window_type = random.below(3) == 0 ? kTypes[random.below(3)] : c.x_type;
    c.silu = random.below(3) != 0;
    c.bias = random.below(3) != 0;
    c.initial = random.below(3) != 0;
    c.reverse = random.below(3) == 0;
    c.cut = random.below(2) == 0;
    Problem problem(c, random);
    check_forward(problem, random.below(2) == 0 ? c.x_type : kTypes[random.below(3)]);
    check_backward(problem, random.below(3) != 0);
  }
}

// Windows keep the bits of what they copy, those of signalling NaN too, and may change in place.
void check_bits() {
  Random random(2);
  for (const DType type : kTypes)
    for (const std::int64_t l : {0, 2, 9}) {
      Case c{1, l, 37, 4, 5, kChannelsLast, type, type, type, false, false, true, false, false};
      Problem problem(c, random);
      problem.in = {0}, problem.out = {0};
      const std::uint32_t snan = format_of(type).infinity() + 1;
      const auto any = [&](std::int64_t i) {
        return i % 3 == 0 ? snan : static_cast<std::uint32_t>(random.next());
      };
      for (std::int64_t i = 0; i < l * c.e; ++i) problem.x.memory.set_bits(i, any(i));
      for (std::int64_t i = 0; i < c.w * c.e; ++i) problem.initial.memory.set_bits(i, any(i));
      const Memory before = problem.initial.memory;
      Tensor y(type, c.layout, c.b, c.l, c.e);
      kernels().conv(problem.conv(), {y.view, problem.initial.view});
      for (std::int64_t e = 0; e < c.e; ++e)
        for (std::int64_t i = 0; i < c.w; ++i) {
          const std::int64_t p = l - c.w + i;
          const std::uint32_t right = p >= 0 ? problem.x.memory.bits(problem.x.index(0, p, e))
                                             : before.bits(problem.initial.index(0, e, c.w + p));
          const std::uint32_t found = problem.initial.memory.bits(problem.initial.index(0, e, i));
          CHECK(found == right, "type %d, l %d: %08x, not %08x", (int)type, (int)l, found, right);
        }
    }
}

void check_steps() {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    const std::int64_t b = 1 + random.below(3), e = 1 + random.below(300), k = 1 + random.below(6);
    const std::int64_t w = std::max<std::int64_t>(1, k - 1 + random.below(3));
    const DType x_type = kTypes[random.below(3)], y_type = kTypes[random.below(3)];
    const DType window_type = kTypes[random.below(3)];
    const Layout layout = static_cast<Layout>(random.below(kLayouts));
    const bool silu = random.below(2) == 0, bias = random.below(2) == 0;
    Tensor x(x_type, layout, b, 1, e), y(y_type, layout, b, 1, e);
    Windows window(window_type, random.below(2) == 0, b, e, w);
    std::vector<float> weights, biases;
    for (std::int64_t j = 0; j < e * k; ++j) weights.push_back(static_cast<float>(random.number()));
    for (std::int64_t j = 0; j < e; ++j) biases.push_back(static_cast<float>(random.number()));
    for (std::int64_t row = 0; row < b; ++row)
      for (std::int64_t c = 0; c < e; ++c) {
        x.memory.set(x.index(row, 0, c), random.number());
        for (std::int64_t j = 0; j < w; ++j)
          window.memory.set(window.index(row, c, j), random.number());
      }
    const Memory before = window.memory;
    ConvStep step;
    step.b = b, step.e = e, step.k = k;
    step.x = x.view, step.y = y.view;
    step.weight = weights.data();
    step.bias = bias ? biases.data() : nullptr;
    step.silu = silu;
    step.window = window.view;
    const std::int64_t first = random.below(e), last = first + random.below(e - first + 1);
    kernels().conv_step(step, first, last);
    Memory untouched_y = Tensor(y_type, layout, b, 1, e).memory;
    for (std::int64_t row = 0; row < b; ++row)
      for (std::int64_t c = 0; c < e; ++c) {
        const bool mine = first <= c && c < last;
        double total = bias ? biases[static_cast<std::size_t>(c)] : 0;
        for (std::int64_t j = 0; j < k; ++j)
          total += weights[static_cast<std::size_t>(c * k + j)] *
                   (j == k - 1 ? x.get(row, 0, c)
                               : before.get(window.index(row, c, w - (k - 1) + j)));
        if (silu) total *= sigmoid(total);
        const std::int64_t at = y.index(row, 0, c);
        if (mine) {
          CHECK(std::fabs(y.memory.get(at) - total) <= 2e-6 + rounding(y_type) * std::fabs(total),
                "step %d: y is %g, not %g", i, y.memory.get(at), total);
          untouched_y.set_bits(at, y.memory.bits(at));
        }
        for (std::int64_t j = 0; j < w; ++j) {
          const std::uint32_t found = window.memory.bits(window.index(row, c, j));
          const std::uint32_t right =
              !mine       ? before.bits(window.index(row, c, j))
              : j + 1 < w ? before.bits(window.index(row, c, j + 1))
                          : format_of(window_type).nearest(x.get(row, 0, c));
          CHECK(found == right, "step %d: window %08x, not %08x", i, found, right);
        }
      }
    CHECK(untouched_y == y.memory, "step %d: y is written outside of its channels", i);
  }
}

}  // namespace

int main() {
  check_sequences();
  check_bits();
  check_steps();
  return finish("conv");
}
