// The scan's kernels against plain loops in double precision, over shapes, strides and options.
#include <random>

#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

static std::string what;  // the case at work

static std::mt19937 randomness(7);

static double normal() { return std::normal_distribution<double>()(randomness); }
static int64_t below(int64_t limit) { return static_cast<int64_t>(randomness() % limit); }

// ---- Storage and the case ----------------------------------------------------------------------

// B and C: channels are (group, state).
static Projection projection(const Tensor& tensor, int64_t n) {
  const Tensor3 view = tensor.view();
  return {view.data,        view.type, view.row_stride, view.step_stride,
          n * view.channel_stride, view.channel_stride};
}

static void fill(Tensor& tensor, double scale, double shift) {
  tensor.fill([=] { return shift + scale * normal(); });
}

static Floats random_floats(int64_t count, double scale, double shift) {
  Floats v(count);
  for (float& x : v) x = static_cast<float>(shift + scale * normal());
  return v;
}

struct Options {
  int64_t b = 1, l = 1, e = 1, n = 1, groups = 1;
  int cuts = 0;  // segments a row, empty ones and gaps among them; 0: the whole row
  DType type = DType::f32;
  Layout layout = Layout::channels_last;
  bool reverse = false, gate = true, D = true, bias = true, softplus = true, states = true;
};

struct Problem {
  Options o;
  Tensor x, delta, z, B, C, dy;
  Floats A, D, bias, initial, dlast;
  SegmentList segments;
  int64_t n_states = 0;
  Scan scan;

  explicit Problem(const Options& options)
      : o(options),
        x(o.type, o.layout, o.b, o.l, o.e),
        delta(x), z(x),
        B(o.type, o.layout, o.b, o.l, o.groups * o.n),
        C(B), dy(x) {
    fill(x, 1, 0), fill(z, 2, 0), fill(B, 1, 0), fill(C, 1, 0), fill(dy, 1, 0);
    // Without softplus delta stays positive, or states would outgrow float32.
    fill(delta, o.softplus ? 1 : 0.05, o.softplus ? -1 : 0.4);
    A = random_floats(o.e * o.n, 1, 0);
    for (float& a : A) a = -std::exp(a);
    D = random_floats(o.e, 1, 0);
    bias = random_floats(o.e, o.softplus ? 0.3 : 0.03, 0);
    cut();
    initial = random_floats(n_states * o.e * o.n, 1, 0);
    dlast = random_floats(n_states * o.e * o.n, 1, 0);
    scan.e = o.e, scan.n = o.n, scan.groups = o.groups;
    scan.segments = segments.view();
    scan.x = x.view(), scan.delta = delta.view();
    if (o.gate) scan.z = z.view();
    scan.B = projection(B, o.n), scan.C = projection(C, o.n);
    scan.A = A.data();
    if (o.D) scan.D = D.data();
    if (o.bias) scan.delta_bias = bias.data();
    scan.softplus = o.softplus;
    if (o.states) scan.initial = initial.data();
  }

  // Every third segment has no state in, every fourth none out; states are counted backwards.
  void cut() {
    for (int64_t b = 0; b < o.b; ++b) {
      int64_t start = 0;
      for (int cut = 0; cut < (o.cuts ? o.cuts : 1); ++cut) {
        const int64_t stop = o.cuts == 0 ? o.l : start + below(o.l - start + 1);
        segments.add(b, start, stop);
        start = o.cuts > 2 && stop < o.l && below(3) == 0 ? stop + 1 : stop;
      }
    }
    segments.reverse = o.reverse;
    n_states = segments.count() + 1;
    for (int64_t s = 0; s + 1 < n_states; ++s) {
      segments.in.push_back(s % 3 == 2 ? -1 : n_states - 1 - s);
      segments.out.push_back(s % 4 == 3 ? -1 : n_states - 1 - s);
    }
  }
};

// ---- Reference ---------------------------------------------------------------------------------

// Results and gradients, contiguous, in the kernels' order of axes.
struct Answer {
  Doubles y, last, dx, ddelta, dz, dB, dC, dA, dD, dbias, dinitial;
};

// One channel of one segment, forward and then backward.
static void reference_channel(const Problem& p, int64_t s, int64_t c, Answer& r) {
  const Options& o = p.o;
  const int64_t n = o.n, row = p.segments.rows[s], steps = p.segments.length(s);
  const int64_t in = p.segments.in[s], out = p.segments.out[s];
  const int64_t group = c / (o.e / o.groups);
  auto step = [&](int64_t t) { return p.segments.step(s, t); };
  Doubles h((steps + 1) * n), inner(steps), raw(steps), delta(steps);
  if (o.states && in >= 0)
    for (int64_t i = 0; i < n; ++i) h[i] = p.initial[(in * o.e + c) * n + i];
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = (row * o.l + step(t)) * o.e + c;
    const double x = p.x.given(row, step(t), c);
    raw[t] = p.delta.given(row, step(t), c) + (o.bias ? p.bias[c] : 0);
    delta[t] = o.softplus ? std::log1p(std::exp(raw[t])) : raw[t];
    inner[t] = o.D ? p.D[c] * x : 0;
    for (int64_t i = 0; i < n; ++i) {
      h[(t + 1) * n + i] = std::exp(delta[t] * p.A[c * n + i]) * h[t * n + i] +
                           delta[t] * p.B.given(row, step(t), group * n + i) * x;
      inner[t] += p.C.given(row, step(t), group * n + i) * h[(t + 1) * n + i];
    }
    const double z = p.z.given(row, step(t), c);
    r.y[at] = o.gate ? inner[t] * z * sigmoid(z) : inner[t];
  }
  Doubles carry(n);
  if (out >= 0)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = (out * o.e + c) * n + i;
      r.last[at] = h[steps * n + i];
      carry[i] = o.states ? p.dlast[at] : 0;
    }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const int64_t at = (row * o.l + step(t)) * o.e + c;
    const double x = p.x.given(row, step(t), c), z = p.z.given(row, step(t), c), q = sigmoid(z);
    const double dy = p.dy.given(row, step(t), c), du = o.gate ? dy * z * q : dy;
    r.dz[at] = o.gate ? dy * inner[t] * q * (1 + z * (1 - q)) : 0;
    double dx = o.D ? p.D[c] * du : 0, ddelta = 0;
    r.dD[c] += du * x;
    for (int64_t i = 0; i < n; ++i) {
      const double A = p.A[c * n + i], before = h[t * n + i], decay = std::exp(delta[t] * A);
      const double B = p.B.given(row, step(t), group * n + i);
      const double g = carry[i] + du * p.C.given(row, step(t), group * n + i);
      const int64_t shared = ((row * o.l + step(t)) * o.groups + group) * n + i;
      r.dC[shared] += du * h[(t + 1) * n + i];
      r.dB[shared] += g * delta[t] * x;
      dx += g * delta[t] * B;
      ddelta += g * (B * x + A * decay * before);
      r.dA[c * n + i] += g * delta[t] * decay * before;
      carry[i] = g * decay;
    }
    r.dx[at] = dx;
    r.ddelta[at] = o.softplus ? ddelta * sigmoid(raw[t]) : ddelta;
    r.dbias[c] += r.ddelta[at];
  }
  if (in >= 0)
    for (int64_t i = 0; i < n; ++i) r.dinitial[(in * o.e + c) * n + i] = carry[i];
}

static Answer reference(const Problem& p) {
  const Options& o = p.o;
  Answer r;
  for (Doubles* v : {&r.y, &r.dx, &r.ddelta, &r.dz}) v->assign(o.b * o.l * o.e, NAN);
  for (Doubles* v : {&r.dB, &r.dC}) v->assign(o.b * o.l * o.groups * o.n, 0);
  r.last.assign(p.n_states * o.e * o.n, NAN);
  r.dinitial.assign(p.n_states * o.e * o.n, 0);
  r.dA.assign(o.e * o.n, 0), r.dD.assign(o.e, 0), r.dbias.assign(o.e, 0);
  for (int64_t s = 0; s < p.segments.count(); ++s)
    for (int64_t c = 0; c < o.e; ++c) reference_channel(p, s, c, r);
  return r;
}

// ---- What the kernels say ----------------------------------------------------------------------

struct Result {
  Tensor y, dx, ddelta, dz;
  Floats last, checkpoints, dB, dC, dA, dD, dbias, dinitial;

  explicit Result(const Problem& p)
      : y(p.o.type, p.o.layout, p.o.b, p.o.l, p.o.e), dx(y), ddelta(y), dz(y) {
    const int64_t states = p.n_states * p.o.e * p.o.n, shared = p.o.b * p.o.l * p.o.groups * p.o.n;
    for (Floats* v : {&last, &dinitial}) v->assign(states, 77.0f);
    for (Floats* v : {&dB, &dC}) v->assign(shared, 77.0f);
    dA.assign(p.o.e * p.o.n, 77.0f), dD.assign(p.o.e, 77.0f), dbias.assign(p.o.e, 77.0f);
    checkpoints.assign(scan_checkpoint_floats(p.scan), 77.0f);
  }
};

static Result run(const Problem& p, int threads) {
  Threads::set_count(threads);
  Result r(p);
  ScanResult out;
  out.y = r.y.view(), out.last = r.last.data(), out.checkpoints = r.checkpoints.data();
  kernels().scan(p.scan, out);
  ScanGradients g;
  g.y = p.dy.view(), g.checkpoints = r.checkpoints.data();
  if (p.o.states) g.last = p.dlast.data();
  g.x = r.dx.view(), g.delta = r.ddelta.view();
  if (p.o.gate) g.z = r.dz.view();
  g.B = r.dB.data(), g.C = r.dC.data(), g.rows = p.o.b, g.steps = p.o.l;
  g.A = r.dA.data(), g.D = r.dD.data(), g.delta_bias = r.dbias.data();
  g.initial = r.dinitial.data(), g.n_states = p.n_states;
  kernels().scan_backward(p.scan, g);
  return r;
}

// Numbers that the reference leaves NaN must be as they were.
struct Worst {
  double error = 0, size = 1;
  bool untouched = true;
  void add(double found, double expected, double before) {
    if (std::isnan(expected)) {
      untouched = untouched && found == before;
    } else {
      error = std::isnan(found) ? INFINITY : std::fmax(error, std::fabs(found - expected));
      size = std::fmax(size, std::fabs(expected));
    }
  }
  void check(const char* name, double tolerance) const {
    CHECK(error <= tolerance * size, "%s: %g of %g, %s", name, error, size, what.c_str());
    CHECK(untouched, "%s outside the segments in %s", name, what.c_str());
  }
};

static void compare(const char* name, const Tensor& found, const Doubles& expected,
                    double tolerance) {
  const Memory fresh(found.memory.type(), 1);
  Worst worst;
  for (int64_t b = 0, i = 0; b < found.rows; ++b)
    for (int64_t t = 0; t < found.steps; ++t)
      for (int64_t c = 0; c < found.channels; ++c)
        worst.add(found.get(b, t, c), expected[i++], fresh.get(0));
  worst.check(name, tolerance);
}

static void compare(const char* name, const Floats& found, const Doubles& expected,
                    double tolerance) {
  Worst worst;
  for (std::size_t i = 0; i < expected.size(); ++i) worst.add(found[i], expected[i], 77.0);
  worst.check(name, tolerance);
}

static bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && (a.empty() || !std::memcmp(a.data(), b.data(), a.size() * 4));
}

// DESIGN's tolerances: 1e-5 forward and 1e-4 for gradients, 2e-2 where storage has half width.
static void test_scan(const Options& o) {
  const Problem p(o);
  const Answer expected = reference(p);
  const Result r = run(p, 1);
  const bool half = o.type != DType::f32;
  const double forward = half ? 2e-2 : 1e-5, backward = half ? 2e-2 : 1e-4;
  compare("y", r.y, expected.y, forward);
  compare("last", r.last, expected.last, 1e-5);
  compare("dx", r.dx, expected.dx, backward);
  compare("ddelta", r.ddelta, expected.ddelta, backward);
  if (o.gate) compare("dz", r.dz, expected.dz, backward);
  compare("dB", r.dB, expected.dB, 1e-4);
  compare("dC", r.dC, expected.dC, 1e-4);
  compare("dA", r.dA, expected.dA, 1e-4);
  compare("dD", r.dD, expected.dD, 1e-4);
  compare("dbias", r.dbias, expected.dbias, 1e-4);
  compare("dinitial", r.dinitial, expected.dinitial, 1e-4);
  const Result other = run(p, 3);  // which share the work, and not evenly
  for (const auto member : {&Result::y, &Result::dx, &Result::ddelta, &Result::dz})
    CHECK((r.*member).memory == (other.*member).memory, "3 threads, %s", what.c_str());
  for (const auto member : {&Result::last, &Result::checkpoints, &Result::dB, &Result::dC,
                            &Result::dA, &Result::dD, &Result::dbias, &Result::dinitial})
    CHECK(same(r.*member, other.*member), "3 threads, %s", what.c_str());
}

// The first step of a problem, spread over two ranges of channels.
static void test_step(const Options& o) {
  const Problem p(o);
  const Answer expected = reference(p);
  const int64_t stride = o.e * o.n + 3;
  Tensor y(o.type, o.layout, o.b, 1, o.e);
  Floats state(o.b * stride + 1, 77.0f);
  for (int64_t b = 0; b < o.b; ++b)
    for (int64_t i = 0; i < o.e * o.n; ++i)
      state[b * stride + i] =
          o.states && p.segments.in[b] >= 0 ? p.initial[p.segments.in[b] * o.e * o.n + i] : 0;
  const ScanStep step = {p.scan, o.b, y.view(), state.data(), stride};
  const int64_t middle = below(o.e + 1);
  kernels().scan_step(step, 0, middle);
  kernels().scan_step(step, middle, o.e);
  compare("y of a step", y, expected.y, o.type == DType::f32 ? 1e-5 : 2e-2);
  Worst worst;
  for (int64_t b = 0; b < o.b; ++b) {
    for (int64_t i = 0; i < o.e * o.n && p.segments.out[b] >= 0; ++i)
      worst.add(state[b * stride + i], expected.last[p.segments.out[b] * o.e * o.n + i], 77);
    for (int64_t i = o.e * o.n; i < stride; ++i) worst.add(state[b * stride + i], NAN, 77);
  }
  worst.check("state of a step", 1e-5);
}

static void check(Options o) {
  char text[200];
  std::snprintf(text, sizeof text,
                "b=%d l=%d e=%d n=%d groups=%d cuts=%d type=%d layout=%d reverse=%d gate=%d D=%d "
                "bias=%d softplus=%d states=%d",
                int(o.b), int(o.l), int(o.e), int(o.n), int(o.groups), o.cuts, int(o.type),
                int(o.layout), o.reverse, o.gate, o.D, o.bias, o.softplus, o.states);
  what = text;
  test_scan(o);
  o.l = 1, o.cuts = 0;
  if (o.b > 0) test_step(o);
}

static Options random_options(int64_t e, int64_t n, int64_t l) {
  Options o;
  o.e = e, o.n = n, o.l = l;
  o.b = below(8) == 0 ? 0 : 1 + below(e * n * l > 50000 ? 1 : 3);
  do o.groups = 1 + below(e);
  while (e % o.groups != 0);
  o.cuts = below(2) ? 0 : static_cast<int>(1 + below(6));
  o.type = below(2) ? DType::f32 : static_cast<DType>(below(3));
  o.layout = static_cast<Layout>(below(kLayouts));
  o.reverse = below(2), o.gate = below(3), o.D = below(3), o.bias = below(3);
  o.softplus = below(3), o.states = below(3);
  return o;
}

int main() {
  // Every pair of sizes, in a third of all combinations.
  const int64_t widths[] = {1, 3, 16, 17, 48}, states[] = {1, 3, 8, 16, 24, 64, 300};
  const int64_t lengths[] = {0, 1, 2, 15, 16, 17, 33, 70};
  for (int e = 0; e < 5; ++e)
    for (int n = 0; n < 7; ++n)
      for (int l = 0; l < 8; ++l)
        if ((e + n + l) % 3 == 0) check(random_options(widths[e], states[n], lengths[l]));
  // Several blocks of channels, more of them than partial sums, and more segments.
  for (const Layout layout : {Layout::channels_last, Layout::channels_first, Layout::gaps}) {
    for (const DType type : kTypes) {
      Options o;
      o.layout = layout, o.type = type;
      o.b = 2, o.l = 70, o.e = 200, o.n = 16, o.groups = 2;
      check(o);
      o.l = 33, o.e = 256, o.groups = 1, o.reverse = true;
      check(o);
    }
  }
  Options wide;
  wide.l = 40, wide.e = 1100, wide.n = 5, wide.cuts = 3;
  check(wide);
  Options many;
  many.b = 3, many.l = 64, many.e = 20, many.n = 4, many.cuts = 12;
  check(many);
  Options none;
  none.l = 3, none.e = 0;
  check(none);
  return finish("test_scan");
}
