// The convolution against loops in double: forward, backward, and one step at a time.
#include <algorithm>

#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

// Windows are tensors (states, columns, channels).
Window window_of(const Tensor& tensor) {
  const Tensor3 view = tensor.view();
  return {view.data, view.type, view.row_stride, view.channel_stride, view.step_stride,
          tensor.steps};
}

std::vector<float> random_floats(int64_t count, Random& random) {
  std::vector<float> numbers;
  for (int64_t i = 0; i < count; ++i) numbers.push_back(static_cast<float>(random.number()));
  return numbers;
}

Layout any_layout(Random& random) { return static_cast<Layout>(random.below(kLayouts)); }

struct Case {
  int64_t b, l, e, k, w;
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
  SegmentList segments;
  int64_t states;
  Tensor x, dy, initial, dfinal;
  std::vector<float> weight, bias;

  Problem(const Case& chosen, Random& random)
      : c(chosen),
        name(text_of(chosen)),
        segments(cut(random)),
        states(segments.count() + 1),
        x(c.x_type, c.layout, c.b, c.l, c.e),
        dy(c.y_type, c.layout, c.b, c.l, c.e),
        initial(c.window_type, any_layout(random), states, c.w, c.e),
        dfinal(DType::f32, any_layout(random), states, c.w, c.e),
        weight(random_floats(c.e * c.k, random)),
        bias(random_floats(c.e, random)) {
    for (int64_t s = 0; s + 1 < states; ++s) {
      // Some begin from zeros, two may begin from one state; states are left in another order.
      segments.in.push_back(random.below(4) == 0 ? -1 : random.below(states));
      segments.out.push_back(random.below(5) == 0 ? -1 : states - 1 - s);
    }
    for (Tensor* tensor : {&x, &initial}) tensor->fill([&] { return 2 * random.number(); });
    for (Tensor* tensor : {&dy, &dfinal}) tensor->fill([&] { return random.number(); });
  }

  SegmentList cut(Random& random) const {
    SegmentList list;
    list.reverse = c.reverse;
    for (int64_t b = 0; b < c.b; ++b) {
      int64_t start = 0;
      do {
        const int64_t stop = c.cut ? std::min(c.l, start + random.below(c.l + 1) / 2) : c.l;
        // Else steps that belong to none.
        if (!c.cut || random.below(6) != 0) list.add(b, start, stop);
        start = stop;
      } while (start < c.l && list.count() < 30);
    }
    return list;
  }

  Conv conv() const {
    Conv conv;
    conv.e = c.e, conv.k = c.k;
    conv.segments = segments.view();
    conv.x = x.view();
    conv.weight = weight.data();
    conv.bias = c.bias ? bias.data() : nullptr;
    conv.silu = c.silu;
    if (c.initial) conv.initial = window_of(initial);
    return conv;
  }

  // The input at a position of segment s, the window's before 0.
  double input(int64_t s, int64_t p, int64_t e) const {
    if (p >= 0) return x.given(segments.rows[s], segments.step(s, p), e);
    if (!c.initial || segments.in[s] < 0 || p < -c.w) return 0;
    return initial.given(segments.in[s], c.w + p, e);
  }
  double before_silu(int64_t s, int64_t p, int64_t e, double* size = nullptr) const {
    double total = c.bias ? bias[e] : 0, sizes = 1;
    for (int64_t j = 0; j < c.k; ++j) {
      const double term = weight[e * c.k + j] * input(s, p - c.k + 1 + j, e);
      total += term, sizes += std::fabs(term);
    }
    if (size != nullptr) *size = sizes;
    return total;
  }
};

struct Forward {
  Tensor y, final;
  bool operator==(const Forward&) const = default;
};

Forward run_forward(const Problem& problem, DType final_type) {
  const Case& c = problem.c;
  Forward f{Tensor(c.y_type, c.layout, c.b, c.l, c.e),
            Tensor(final_type, c.l % 2 == 0 ? Layout::channels_first : Layout::gaps,
                   problem.states, c.w, c.e)};
  kernels().conv(problem.conv(), {f.y.view(), window_of(f.final)});
  return f;
}

void check_forward(const Problem& problem, DType final_type) {
  const Case& c = problem.c;
  const SegmentList& segments = problem.segments;
  const Forward f =
      on_any_threads(problem.name, [&] { return run_forward(problem, final_type); });
  Tensor expected(c.y_type, c.layout, c.b, c.l, c.e);  // untouched where no segment is
  for (int64_t s = 0; s < segments.count(); ++s)
    for (int64_t e = 0; e < c.e; ++e) {
      for (int64_t p = 0; p < segments.length(s); ++p) {
        double size;
        double y = problem.before_silu(s, p, e, &size);
        if (c.silu) y *= sigmoid(y);
        const int64_t at = f.y.index(segments.rows[s], segments.step(s, p), e);
        const double found = f.y.memory.get(at);
        CHECK(std::fabs(found - y) <= 5e-7 * size + rounding(c.y_type) * std::fabs(y),
              "%s: y is %g, not %g", problem.name.c_str(), found, y);
        expected.memory.set_bits(at, f.y.memory.bits(at));
      }
      for (int64_t i = 0; segments.out[s] >= 0 && i < c.w; ++i) {
        const int64_t p = segments.length(s) - c.w + i;
        const std::uint32_t bits = f.final.memory.bits(f.final.index(segments.out[s], i, e));
        const std::uint32_t right = format_of(final_type).nearest(problem.input(s, p, e));
        CHECK(bits == right, "%s: final window %08x, not %08x", problem.name.c_str(), bits, right);
      }
    }
  CHECK(expected.memory == f.y.memory, "%s: y is written outside of segments",
        problem.name.c_str());
}

struct Backward {
  Tensor x, initial;
  std::vector<float> weight, bias;
  bool operator==(const Backward&) const = default;
};

Backward run_backward(const Problem& problem, bool with_final) {
  const Case& c = problem.c;
  Backward d{Tensor(c.x_type, c.layout, c.b, c.l, c.e),
             Tensor(DType::f32, c.l % 2 == 0 ? Layout::channels_first : Layout::gaps,
                    problem.states, c.w, c.e),
             std::vector<float>(c.e * c.k, -77.0f), std::vector<float>(c.e, -77.0f)};
  ConvGradients g;
  g.y = problem.dy.view();
  if (with_final) g.final = window_of(problem.dfinal);
  g.x = d.x.view();
  g.weight = d.weight.data();
  g.bias = c.bias ? d.bias.data() : nullptr;
  if (c.initial) g.initial = window_of(d.initial);
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

void check_backward(const Problem& problem, bool with_final) {
  const Case& c = problem.c;
  const SegmentList& segments = problem.segments;
  const Backward d =
      on_any_threads(problem.name, [&] { return run_backward(problem, with_final); });
  for (int64_t e = 0; e < c.e; ++e) {
    std::vector<Sum> dx(c.b * c.l), dweight(c.k), dwindow(problem.states * c.w);
    std::vector<bool> covered(dx.size());
    Sum dbias;
    for (int64_t s = 0; s < segments.count(); ++s) {
      const int64_t row = segments.rows[s], in = segments.in[s], out = segments.out[s];
      // A gradient of the input at a position goes to x, to the window, or is lost.
      const auto add = [&](int64_t p, double term) {
        if (p >= 0) dx[row * c.l + segments.step(s, p)].add(term);
        else if (in >= 0 && p >= -c.w) dwindow[in * c.w + c.w + p].add(term);
      };
      for (int64_t p = 0; p < segments.length(s); ++p) {
        covered[row * c.l + segments.step(s, p)] = true;
        double g = problem.dy.given(row, segments.step(s, p), e);
        if (c.silu) {
          const double u = problem.before_silu(s, p, e);
          g *= sigmoid(u) * (1 + u * (1 - sigmoid(u)));
        }
        dbias.add(g);
        for (int64_t j = 0; j < c.k; ++j) {
          add(p - c.k + 1 + j, g * problem.weight[e * c.k + j]);
          dweight[j].add(g * problem.input(s, p - c.k + 1 + j, e));
        }
      }
      for (int64_t i = 0; with_final && out >= 0 && i < c.w; ++i)
        add(segments.length(s) - c.w + i, problem.dfinal.given(out, i, e));
    }
    for (int64_t b = 0; b < c.b; ++b)
      for (int64_t t = 0; t < c.l; ++t)
        if (covered[b * c.l + t])
          check_sum("dx", problem, d.x.get(b, t, e), dx[b * c.l + t], c.x_type);
    for (int64_t j = 0; j < c.k; ++j)
      check_sum("dweight", problem, d.weight[e * c.k + j], dweight[j], DType::f32);
    if (c.bias) check_sum("dbias", problem, d.bias[e], dbias, DType::f32);
    for (int64_t s = 0; c.initial && s < problem.states; ++s)
      for (int64_t i = 0; i < c.w; ++i)
        check_sum("dinitial", problem, d.initial.get(s, i, e), dwindow[s * c.w + i], DType::f32);
  }
}

void check_sequences() {
  Random random(1);
  const int64_t channels[] = {1, 3, 7, 8, 16, 17, 64, 70, 131, 200};
  const int64_t lengths[] = {0, 1, 2, 3, 5, 31, 33, 65, 130, 300};
  const int64_t taps[] = {1, 2, 3, 4, 5, 9};
  for (int i = 0; i < 400; ++i) {
    Case c;
    c.b = 1 + random.below(3);
    c.l = lengths[random.below(10)];
    c.e = channels[random.below(10)];
    if (c.l * c.e > 10000) c.b = 1;
    c.k = taps[random.below(6)];
    c.w = c.k - 1 + random.below(3);
    c.layout = any_layout(random);
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
    for (const int64_t l : {0, 2, 9}) {
      Case c{1, l, 37, 4, 5, Layout::channels_last, type, type, type, false, false, true, false, false};
      Problem problem(c, random);
      problem.segments.in = {0}, problem.segments.out = {0};
      const std::uint32_t snan = format_of(type).infinity() + 1;
      for (Memory* memory : {&problem.x.memory, &problem.initial.memory})
        for (std::size_t i = 0; i < memory->size(); ++i)
          memory->set_bits(i, i % 3 == 0 ? snan : static_cast<std::uint32_t>(random.next()));
      const Memory before = problem.initial.memory;
      Tensor y(type, c.layout, c.b, c.l, c.e);
      kernels().conv(problem.conv(), {y.view(), window_of(problem.initial)});
      for (int64_t e = 0; e < c.e; ++e)
        for (int64_t i = 0; i < c.w; ++i) {
          const int64_t p = l - c.w + i;
          const std::uint32_t right = p >= 0 ? problem.x.memory.bits(problem.x.index(0, p, e))
                                             : before.bits(problem.initial.index(0, c.w + p, e));
          const std::uint32_t found = problem.initial.memory.bits(problem.initial.index(0, i, e));
          CHECK(found == right, "type %d, l %d: %08x, not %08x", (int)type, (int)l, found, right);
        }
    }
}

void check_steps() {
  Random random(3);
  for (int i = 0; i < 200; ++i) {
    const int64_t b = 1 + random.below(3), e = 1 + random.below(300), k = 1 + random.below(6);
    const int64_t w = std::max<int64_t>(1, k - 1 + random.below(3));
    const DType x_type = kTypes[random.below(3)], y_type = kTypes[random.below(3)];
    const DType window_type = kTypes[random.below(3)];
    const Layout layout = any_layout(random);
    const bool silu = random.below(2) == 0, bias = random.below(2) == 0;
    Tensor x(x_type, layout, b, 1, e), y(y_type, layout, b, 1, e);
    Tensor window(window_type, any_layout(random), b, w, e);
    const std::vector<float> weights = random_floats(e * k, random);
    const std::vector<float> biases = random_floats(e, random);
    for (Tensor* tensor : {&x, &window}) tensor->fill([&] { return random.number(); });
    const Memory before = window.memory;
    ConvStep step;
    step.b = b, step.e = e, step.k = k;
    step.x = x.view(), step.y = y.view();
    step.weight = weights.data();
    step.bias = bias ? biases.data() : nullptr;
    step.silu = silu;
    step.window = window_of(window);
    const int64_t first = random.below(e), last = first + random.below(e - first + 1);
    kernels().conv_step(step, first, last);
    Memory untouched_y = Tensor(y_type, layout, b, 1, e).memory;
    for (int64_t row = 0; row < b; ++row)
      for (int64_t c = 0; c < e; ++c) {
        const bool mine = first <= c && c < last;
        double total = bias ? biases[c] : 0;
        for (int64_t j = 0; j < k; ++j)
          total += weights[c * k + j] * (j == k - 1 ? x.given(row, 0, c)
                                                    : window.given(row, w - (k - 1) + j, c));
        if (silu) total *= sigmoid(total);
        const int64_t at = y.index(row, 0, c);
        if (mine) {
          CHECK(std::fabs(y.memory.get(at) - total) <= 2e-6 + rounding(y_type) * std::fabs(total),
                "step %d: y is %g, not %g", i, y.memory.get(at), total);
          untouched_y.set_bits(at, y.memory.bits(at));
        }
        for (int64_t j = 0; j < w; ++j) {
          const std::uint32_t found = window.memory.bits(window.index(row, j, c));
          const std::uint32_t right =
              !mine       ? before.bits(window.index(row, j, c))
              : j + 1 < w ? before.bits(window.index(row, j + 1, c))
                          : format_of(window_type).nearest(x.given(row, 0, c));
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
