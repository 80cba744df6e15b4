// The kernels as functions on arrays.
#include <algorithm>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/gil.h"
#include "bindings/modules.h"
#include "base/arena.h"
#include "base/work_stealing.h"

namespace anymamba::bindings {
namespace {

// The segments of a batch, checked; owns the lists that `view` points to.
struct SegmentList {
  std::vector<std::int64_t> lists[5];  // rows, starts, stops, state_in, state_out
  std::int64_t n_states;
  Segments view;

  // `given` is (5, s) int64, or absent: every row is one segment with its own state.
  SegmentList(const MaybeIn& given, std::int64_t b, std::int64_t l, std::int64_t states,
              bool reverse)
      : n_states(given ? states : b) {
    // An array of stride 0 may claim any number of rows.
    if (!given && b > kMostRows) refuse(std::to_string(b) + " rows are too many");
    if (n_states < 0 || n_states > kMostRows)
      refuse("n_states is " + std::to_string(n_states) + ", expected 0 or more, but not that many");
    if (given)
      read(*given);
    else
      for (std::int64_t row = 0; row < b; ++row) {
        const std::int64_t values[] = {row, 0, l, row, row};
        for (int i = 0; i < 5; ++i) lists[i].push_back(values[i]);
      }
    check(b, l);
    view = {static_cast<std::int64_t>(lists[0].size()), lists[0].data(), lists[1].data(),
            lists[2].data(), lists[3].data(), lists[4].data(), reverse};
  }

 private:
  void read(const In& given) {
    check_shape("segments", given, {5, kAny});
    if (static_cast<std::int64_t>(given.shape(1)) > kMostRows) refuse("segments are too many");
    if (given.dtype() != nb::dtype<std::int64_t>()) refuse("segments must be int64");
    const auto* data = static_cast<const std::int64_t*>(pointer(given));
    for (int i = 0; i < 5; ++i)
      for (std::size_t s = 0; s < given.shape(1); ++s)
        lists[i].push_back(data[i * given.stride(0) + static_cast<std::int64_t>(s) * given.stride(1)]);
  }

  void check(std::int64_t b, std::int64_t l) const {
    std::vector<bool> entered(n_states, false), left(n_states, false);
    for (std::size_t s = 0; s < lists[0].size(); ++s) {
      const std::int64_t in = lists[3][s], out = lists[4][s];
      if (lists[0][s] < 0 || lists[0][s] >= b || lists[1][s] < 0 || lists[1][s] > lists[2][s] ||
          lists[2][s] > l || in < -1 || in >= n_states || out < -1 ||
          out >= n_states)
        refuse("segment " + std::to_string(s) + " is outside of the batch or of its states");
      if (in >= 0 && entered[in]) refuse("two segments begin from the same state");
      if (out >= 0 && left[out]) refuse("two segments leave the same state");
      if (in >= 0) entered[in] = true;
      if (out >= 0) left[out] = true;
    }
  }
};

// What a scan and a step of it read besides activations, checked.
ScanInputs scan_parameters(const In& A, const MaybeIn& D, const MaybeIn& delta_bias, bool softplus,
                           std::int64_t e, std::int64_t groups) {
  const std::int64_t n = extent(A, 1);
  if (groups < 1 || e % groups != 0) refuse("the groups of B must divide the channels");
  return {e, n, groups, {}, {}, {}, {}, {}, floats("A", A, {e, n}), floats("D", D, {e}),
          floats("delta_bias", delta_bias, {e}), softplus};
}

// What `scan` and `scan_backward` share: the inputs, checked.
Scan read_scan(const In& x, const In& delta, const In& A, const In& B, const In& C,
               const MaybeIn& D, const MaybeIn& z, const MaybeIn& delta_bias, bool softplus,
               const MaybeIn& initial, const SegmentList& segments) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  Scan scan = {scan_parameters(A, D, delta_bias, softplus, extent(x, 2), extent(B, 2)),
               segments.view, nullptr};
  if (scan.n < 1) refuse("A needs at least one state");
  scan.x = tensor3("x", x, {b, l, scan.e});
  scan.delta = tensor3("delta", delta, {b, l, scan.e});
  if (z) scan.z = tensor3("z", *z, {b, l, scan.e});
  scan.B = projection("B", B, b, l, scan.groups, scan.n);
  scan.C = projection("C", C, b, l, scan.groups, scan.n);
  scan.initial = floats("initial", initial, {segments.n_states, scan.e, scan.n});
  return scan;
}

std::int64_t py_scan_checkpoint_floats(std::int64_t b, std::int64_t l, std::int64_t e,
                                       std::int64_t n, const MaybeIn& segments,
                                       std::int64_t n_states) {
  if (b < 0 || l < 0 || e < 0 || n < 1) refuse("sizes must not be negative");
  double product = 8;
  for (const std::int64_t size : {b, l, e, n}) product *= static_cast<double>(size);
  if (product > 9e18) refuse("sizes are too large");
  const SegmentList list(segments, b, l, n_states, false);
  Scan scan;
  scan.e = e;
  scan.n = n;
  scan.segments = list.view;
  return scan_checkpoint_floats(scan);
}

void py_scan(const In& x, const In& delta, const In& A, const In& B, const In& C, const MaybeIn& D,
             const MaybeIn& z, const MaybeIn& delta_bias, bool softplus, const MaybeIn& initial,
             const MaybeIn& segments, std::int64_t n_states, bool reverse, const Out& y,
             const MaybeOut& last, const MaybeOut& checkpoints) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Scan scan = read_scan(x, delta, A, B, C, D, z, delta_bias, softplus, initial, list);
  ScanResult result;
  result.y = tensor3("y", y, {b, l, scan.e});
  result.last = floats("last", last, {list.n_states, scan.e, scan.n});
  result.checkpoints = floats("checkpoints", checkpoints, {scan_checkpoint_floats(scan)});
  const WithoutGil unlocked;
  kernels().scan(scan, result);
}

void py_scan_backward(const In& x, const In& delta, const In& A, const In& B, const In& C,
                      const MaybeIn& D, const MaybeIn& z, const MaybeIn& delta_bias, bool softplus,
                      const MaybeIn& initial, const MaybeIn& segments, std::int64_t n_states,
                      bool reverse, const In& checkpoints, const In& dy, const MaybeIn& dlast,
                      const Out& dx, const Out& ddelta, const Out& dA, const Out& dB, const Out& dC,
                      const MaybeOut& dD, const MaybeOut& dz, const MaybeOut& ddelta_bias,
                      const MaybeOut& dinitial) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Scan scan = read_scan(x, delta, A, B, C, D, z, delta_bias, softplus, initial, list);
  if (scan.D != nullptr && !dD) refuse("dD is missing");
  if (scan.z && !dz) refuse("dz is missing");
  if (scan.delta_bias != nullptr && !ddelta_bias) refuse("ddelta_bias is missing");
  ScanGradients gradients;
  gradients.y = tensor3("dy", dy, {b, l, scan.e});
  gradients.last = floats("dlast", dlast, {list.n_states, scan.e, scan.n});
  gradients.checkpoints = floats("checkpoints", checkpoints, {scan_checkpoint_floats(scan)});
  gradients.x = tensor3("dx", dx, {b, l, scan.e});
  gradients.delta = tensor3("ddelta", ddelta, {b, l, scan.e});
  if (scan.z) gradients.z = tensor3("dz", *dz, {b, l, scan.e});
  gradients.B = floats("dB", dB, {b, l, scan.groups, scan.n});
  gradients.C = floats("dC", dC, {b, l, scan.groups, scan.n});
  gradients.rows = b;
  gradients.steps = l;
  gradients.A = floats("dA", dA, {scan.e, scan.n});
  gradients.D = scan.D ? floats("dD", dD, {scan.e}) : nullptr;
  gradients.delta_bias = scan.delta_bias ? floats("ddelta_bias", ddelta_bias, {scan.e}) : nullptr;
  gradients.initial = floats("dinitial", dinitial, {list.n_states, scan.e, scan.n});
  gradients.n_states = list.n_states;
  const WithoutGil unlocked;
  kernels().scan_backward(scan, gradients);
}

// One step of B or C, (b, g, n).
Projection one_projection(const char* name, const In& array, std::int64_t b, std::int64_t g, std::int64_t n) {
  check_shape(name, array, {b, g, n});
  return {pointer(array), type_of(name, array), array.stride(0), 0, array.stride(1), array.stride(2)};
}

// Calls body(first, last) for channels of a step. Few states take less time than waking a thread, which
// would also take a processor from PyTorch's own threads where those work before and after: the caller
// does them alone.
template <class Body>
void spread_channels(std::int64_t b, std::int64_t e, std::int64_t n, const Body& body) {
  constexpr std::int64_t kAlone = 1 << 16;  // states
  constexpr std::int64_t kBlock = 256;      // channels a work item
  const std::int64_t block = b * e * n <= kAlone ? std::max(e, kBlock) : kBlock;
  const std::int64_t scratch = 2 * 4 * (n + 16);
  parallel_for((e + block - 1) / block, in_arena(scratch), [&](std::int64_t item) {
    body(item * block, std::min(e, (item + 1) * block));
  });
}

void py_scan_step(const Out& state, const In& x, const In& delta, const In& A, const In& B,
                  const In& C, const MaybeIn& D, const MaybeIn& z, const MaybeIn& delta_bias,
                  bool softplus, const Out& y) {
  ScanStep step = {scan_parameters(A, D, delta_bias, softplus, extent(x, 1), extent(B, 1)),
                   extent(x, 0), {}, nullptr, 0};
  step.x = one_step("x", x, {step.b, step.e});
  step.delta = one_step("delta", delta, {step.b, step.e});
  if (z) step.z = one_step("z", *z, {step.b, step.e});
  step.y = one_step("y", y, {step.b, step.e});
  step.B = one_projection("B", B, step.b, step.groups, step.n);
  step.C = one_projection("C", C, step.b, step.groups, step.n);
  check_shape("state", state, {step.b, step.e, step.n});
  if (type_of("state", state) != DType::f32 || !is_contiguous(state, 1))
    refuse("state must be float32 with contiguous rows");
  step.state = static_cast<float*>(pointer(state));
  step.state_stride = state.stride(0);
  const WithoutGil unlocked;
  spread_channels(step.b, step.e, step.n, [&](std::int64_t first, std::int64_t last) {
    kernels().scan_step(step, first, last);
  });
}

// What the state space duality and a step of it read besides activations, checked. x and z have the
// channels of all heads side by side.
SsdInputs ssd_parameters(const In& A, const MaybeIn& D, const MaybeIn& dt_bias, bool softplus,
                         Limits limits, std::int64_t e, std::int64_t groups, std::int64_t n) {
  const std::int64_t heads = extent(A, 0);
  if (heads < 1 || e % heads != 0) refuse("the heads of A must divide the channels");
  if (groups < 1 || heads % groups != 0) refuse("the groups of B must divide the heads");
  if (e < 1 || n < 1) refuse("heads need at least one channel and B one state");
  check_limits(limits);
  const std::int64_t p = e / heads;
  const bool D_of_channels = D && D->ndim() == 2;
  const float* const skip = D_of_channels ? floats("D", D, {heads, p}) : floats("D", D, {heads});
  return {heads, p, n, groups, {}, {}, {}, {}, {}, floats("A", A, {heads}), skip,
          floats("dt_bias", dt_bias, {heads}), softplus, D_of_channels, limits.first, limits.second};
}

// What `ssd` and `ssd_backward` share: the inputs, checked.
Ssd read_ssd(const In& x, const In& dt, const In& A, const In& B, const In& C, const MaybeIn& D,
             const MaybeIn& z, const MaybeIn& dt_bias, bool softplus, Limits dt_limit, const MaybeIn& initial,
             const SegmentList& segments) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1), e = extent(x, 2);
  Ssd ssd = {ssd_parameters(A, D, dt_bias, softplus, dt_limit, e, extent(B, 2), extent(B, 3)), segments.view,
             nullptr};
  ssd.x = tensor3("x", x, {b, l, e});
  ssd.dt = tensor3("dt", dt, {b, l, ssd.heads});
  if (z) ssd.z = tensor3("z", *z, {b, l, e});
  ssd.B = projection("B", B, b, l, ssd.groups, ssd.n);
  ssd.C = projection("C", C, b, l, ssd.groups, ssd.n);
  ssd.initial = floats("initial", initial, {segments.n_states, ssd.heads, ssd.p, ssd.n});
  return ssd;
}

void py_ssd(const In& x, const In& dt, const In& A, const In& B, const In& C, const MaybeIn& D,
            const MaybeIn& z, const MaybeIn& dt_bias, bool softplus, Limits dt_limit,
            const MaybeIn& initial, const MaybeIn& segments, std::int64_t n_states, bool reverse,
            const Out& y, const MaybeOut& last) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Ssd ssd = read_ssd(x, dt, A, B, C, D, z, dt_bias, softplus, dt_limit, initial, list);
  const SsdResult result = {tensor3("y", y, {b, l, ssd.e()}),
                            floats("last", last, {list.n_states, ssd.heads, ssd.p, ssd.n})};
  const WithoutGil unlocked;
  kernels().ssd(ssd, result);
}

void py_ssd_backward(const In& x, const In& dt, const In& A, const In& B, const In& C, const MaybeIn& D,
                     const MaybeIn& z, const MaybeIn& dt_bias, bool softplus, Limits dt_limit,
                     const MaybeIn& initial, const MaybeIn& segments, std::int64_t n_states, bool reverse,
                     const In& dy, const MaybeIn& dlast, const Out& dx, const Out& ddt, const Out& dA,
                     const Out& dB, const Out& dC, const MaybeOut& dD, const MaybeOut& dz,
                     const MaybeOut& ddt_bias, const MaybeOut& dinitial) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Ssd ssd = read_ssd(x, dt, A, B, C, D, z, dt_bias, softplus, dt_limit, initial, list);
  if (ssd.D != nullptr && !dD) refuse("dD is missing");
  if (ssd.z && !dz) refuse("dz is missing");
  if (ssd.dt_bias != nullptr && !ddt_bias) refuse("ddt_bias is missing");
  const std::int64_t h = ssd.heads, e = ssd.e();
  SsdGradients gradients;
  gradients.y = tensor3("dy", dy, {b, l, e});
  gradients.last = floats("dlast", dlast, {list.n_states, h, ssd.p, ssd.n});
  gradients.x = tensor3("dx", dx, {b, l, e});
  gradients.dt = tensor3("ddt", ddt, {b, l, h});
  if (ssd.z) gradients.z = tensor3("dz", *dz, {b, l, e});
  gradients.B = floats("dB", dB, {b, l, ssd.groups, ssd.n});
  gradients.C = floats("dC", dC, {b, l, ssd.groups, ssd.n});
  gradients.rows = b;
  gradients.steps = l;
  gradients.A = floats("dA", dA, {h});
  if (ssd.D != nullptr) gradients.D = ssd.D_of_channels ? floats("dD", *dD, {h, ssd.p}) : floats("dD", *dD, {h});
  gradients.dt_bias = ssd.dt_bias != nullptr ? floats("ddt_bias", ddt_bias, {h}) : nullptr;
  gradients.initial = floats("dinitial", dinitial, {list.n_states, h, ssd.p, ssd.n});
  gradients.n_states = list.n_states;
  const WithoutGil unlocked;
  kernels().ssd_backward(ssd, gradients);
}

void py_ssd_step(const Out& state, const In& x, const In& dt, const In& A, const In& B, const In& C,
                 const MaybeIn& D, const MaybeIn& z, const MaybeIn& dt_bias,
                 bool softplus, Limits dt_limit, const Out& y) {
  const std::int64_t b = extent(x, 0), e = extent(x, 1);
  SsdStep step = {ssd_parameters(A, D, dt_bias, softplus, dt_limit, e, extent(B, 1), extent(B, 2)), b, {},
                  nullptr, 0};
  step.x = one_step("x", x, {b, e});
  step.dt = one_step("dt", dt, {b, step.heads});
  if (z) step.z = one_step("z", *z, {b, e});
  step.y = one_step("y", y, {b, e});
  step.B = one_projection("B", B, b, step.groups, step.n);
  step.C = one_projection("C", C, b, step.groups, step.n);
  check_shape("state", state, {b, step.heads, step.p, step.n});
  if (type_of("state", state) != DType::f32 || !is_contiguous(state, 1))
    refuse("state must be float32 with contiguous rows");
  step.state = static_cast<float*>(pointer(state));
  step.state_stride = state.stride(0);
  const WithoutGil unlocked;
  spread_channels(b, e, step.n, [&](std::int64_t first, std::int64_t last) {
    kernels().ssd_step(step, first, last);
  });
}

Conv read_conv(const In& x, const In& weight, const MaybeIn& bias, bool silu,
               const MaybeIn& initial, const SegmentList& segments) {
  Conv conv;
  conv.e = extent(x, 2);
  conv.k = extent(weight, 1);
  if (conv.k < 1) refuse("weight needs at least one tap");
  conv.segments = segments.view;
  conv.x = tensor3("x", x, {extent(x, 0), extent(x, 1), conv.e});
  conv.weight = floats("weight", weight, {conv.e, conv.k});
  conv.bias = floats("bias", bias, {conv.e});
  conv.silu = silu;
  if (initial) conv.initial = window("initial", *initial, segments.n_states, conv.e, conv.k - 1);
  return conv;
}

void py_conv(const In& x, const In& weight, const MaybeIn& bias, bool silu, const MaybeIn& initial,
             const MaybeIn& segments, std::int64_t n_states, bool reverse, const Out& y,
             const MaybeOut& final) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Conv conv = read_conv(x, weight, bias, silu, initial, list);
  ConvResult result;
  result.y = tensor3("y", y, {b, l, conv.e});
  if (final) result.final = window("final", *final, list.n_states, conv.e, 0);
  if (final && initial && result.final.columns != conv.initial.columns)
    refuse("the final window must be as wide as the initial one");
  const WithoutGil unlocked;
  kernels().conv(conv, result);
}

void py_conv_backward(const In& x, const In& weight, const MaybeIn& bias, bool silu,
                      const MaybeIn& initial, const MaybeIn& segments, std::int64_t n_states,
                      bool reverse, const In& dy, const MaybeIn& dfinal, const Out& dx,
                      const Out& dweight, const MaybeOut& dbias, const MaybeOut& dinitial) {
  const std::int64_t b = extent(x, 0), l = extent(x, 1);
  const SegmentList list(segments, b, l, n_states, reverse);
  const Conv conv = read_conv(x, weight, bias, silu, initial, list);
  ConvGradients gradients;
  gradients.y = tensor3("dy", dy, {b, l, conv.e});
  if (dfinal) {
    gradients.final = window("dfinal", *dfinal, list.n_states, conv.e, 0);
    if (gradients.final.type != DType::f32) refuse("dfinal must be float32");
    if (initial && gradients.final.columns != conv.initial.columns)
      refuse("dfinal must be as wide as the initial window");
  }
  gradients.x = tensor3("dx", dx, {b, l, conv.e});
  gradients.weight = floats("dweight", dweight, {conv.e, conv.k});
  gradients.bias = floats("dbias", dbias, {conv.e});
  if (dinitial) {
    if (!initial) refuse("dinitial is given without an initial window");
    gradients.initial = window("dinitial", *dinitial, list.n_states, conv.e, 0);
    if (gradients.initial.type != DType::f32 || gradients.initial.columns != conv.initial.columns)
      refuse("dinitial must be float32 and as wide as the initial window");
  }
  gradients.n_states = list.n_states;
  const WithoutGil unlocked;
  kernels().conv_backward(conv, gradients);
}

void py_conv_step(const In& x, const Out& state, const In& weight, const MaybeIn& bias, bool silu,
                  const Out& y) {
  const std::int64_t b = extent(x, 0), e = extent(x, 1), k = extent(weight, 1);
  const ConvStep step = {{e, k, one_step("x", x, {b, e}), floats("weight", weight, {e, k}),
                          floats("bias", bias, {e}), silu},
                         b, one_step("y", y, {b, e}), window("window", state, b, e, k)};
  if (k < 1 || step.window.columns != k) refuse("the window must be as wide as the weight");
  const WithoutGil unlocked;
  kernels().conv_step(step, 0, step.e);
}

void py_norm(const In& x, const MaybeIn& residual, const In& weight, float eps, const Out& normed,
             const MaybeOut& total, const MaybeOut& scale, const MaybeIn& gate) {
  const std::int64_t n = extent(x, 0), d = extent(x, 1);
  Norm norm = {n, d, rows("x", x, {n, d}), {}, floats("weight", weight, {d}), eps};
  if (residual) norm.residual = rows("residual", *residual, {n, d});
  if (gate) norm.gate = rows("gate", *gate, {n, d});
  NormResult result = {rows("normed", normed, {n, d}), {}, floats("scale", scale, {n})};
  if (total) result.total = rows("total", *total, {n, d});
  const WithoutGil unlocked;
  kernels().norm(norm, result);
}

void py_norm_backward(const In& sum, const In& weight, float eps, const In& scale,
                      const In& dnormed, const MaybeIn& dtotal, const Out& dx, const Out& dweight,
                      const MaybeIn& gate, const MaybeOut& dgate) {
  const std::int64_t n = extent(sum, 0), d = extent(sum, 1);
  Norm norm = {n, d, {}, {}, floats("weight", weight, {d}), eps};
  NormGradients gradients;
  gradients.sum = rows("sum", sum, {n, d});
  gradients.scale = floats("scale", scale, {n});
  gradients.normed = rows("dnormed", dnormed, {n, d});
  if (dtotal) gradients.total = rows("dtotal", *dtotal, {n, d});
  gradients.x = rows("dx", dx, {n, d});
  gradients.weight = floats("dweight", dweight, {d});
  if (gate) {
    if (!dgate) refuse("dgate is missing");
    norm.gate = rows("gate", *gate, {n, d});
    gradients.gate = rows("dgate", *dgate, {n, d});
  }
  const WithoutGil unlocked;
  kernels().norm_backward(norm, gradients);
}

void py_gemm(const In& a, const In& b, const MaybeIn& bias, const Out& c, bool accumulate) {
  const std::int64_t m = extent(a, 0), k = extent(a, 1), n = extent(b, 1);
  const Gemm gemm = {m, n, k, matrix("a", a, {m, k}), matrix("b", b, {k, n}),
                     matrix("c", c, {m, n}), floats("bias", bias, {n}), accumulate};
  const WithoutGil unlocked;
  kernels().gemm(gemm);
}

// Calls f(rows) for blocks of a weight's n rows on all workers, each with so much scratch memory.
template <class F>
void for_shared_rows(std::int64_t n, std::int64_t row_bytes, std::int64_t scratch, const F& f) {
  const int most = Threads::count();
  Shares shares(most);
  parallel_region(scratch, [&](int worker, int workers, Barrier&, Arena&) {
    SharedRows(shares, worker, workers).for_blocks(n, row_bytes, f);
  }, most);
}

void py_gemv(const In& x, const In& weight, const MaybeIn& bias, const Out& y) {
  const std::int64_t m = extent(x, 0), n = extent(weight, 0), k = extent(weight, 1);
  const Weight w = dense_weight("weight", weight, n, k);
  const Gemv gemv = {k, w.data, w.type, w.row_stride, floats("bias", bias, {n}), floats("x", x, {m, k}),
                     DType::f32, k, floats("y", y, {m, n}), n, m};
  if (m == 0) return;
  const WithoutGil unlocked;
  for_shared_rows(n, k * size_of(w.type), gemv_scratch(m, k), [&](RowRange rows) {
    kernels().gemv(gemv, rows.first, rows.last);
  });
}

// y (m, n) = x (m, k) times a quantized weight (n, k), by the kernel for few rows or for many.
void py_quantized_gemm(const In& x, const In& q, const In& scales, const MaybeIn& minima,
                       const MaybeIn& bias, const Out& y, bool few) {
  const std::int64_t m = extent(x, 0), k = extent(x, 1), n = extent(q, 0);
  const QuantizedGemm gemm = {m, n, k, floats("x", x, {m, k}), k,
                              quantized_weight("weight", q, scales, minima, n, k),
                              floats("y", y, {m, n}), n, floats("bias", bias, {n})};
  if (m == 0) return;
  const WithoutGil unlocked;
  if (!few) return kernels().quantized_gemm(gemm);
  const std::int64_t groups = k / gemm.weight.group;
  std::vector<std::int8_t> rounded(m * k);
  std::vector<float> row_scales(m * groups);
  std::vector<std::int32_t> sums(m * groups);
  const QuantizedActivations rows = {m, k, gemm.weight.group, rounded.data(), row_scales.data(),
                                     sums.data()};
  kernels().quantize_activations(gemm.a, k, rows, 0, m);
  for_shared_rows(n, k * gemm.weight.bits / 8, in_arena(2 * 4 * m * (groups + 16)), [&](RowRange some) {
    kernels().quantized_gemv({gemm.weight, rows, gemm.bias, gemm.c, n}, some.first, some.last);
  });
}

void apply(const std::string& function, const In& x, const Out& y) {
  const std::int64_t count = extent(x, 0);
  const float* from = floats("x", x, {count});
  float* to = floats("y", y, {count});
  const Kernels& table = kernels();
  if (function == "exp") return table.apply_exp(from, to, count);
  if (function == "silu") return table.apply_silu(from, to, count);
  if (function == "softplus") return table.apply_softplus(from, to, count);
  refuse("no function is called " + function);
}

}  // namespace

void add_operators(nb::module_& m) {
  using namespace nb::literals;
  const auto none = nb::none();
  m.def("scan_checkpoint_floats", py_scan_checkpoint_floats, "b"_a, "l"_a, "e"_a, "n"_a,
        "segments"_a.none() = none, "n_states"_a = 0);
  m.def("scan", py_scan, "x"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(),
        "delta_bias"_a.none(), "softplus"_a, "initial"_a.none(), "segments"_a.none(), "n_states"_a,
        "reverse"_a, "y"_a, "last"_a.none(), "checkpoints"_a.none());
  m.def("scan_backward", py_scan_backward, "x"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(),
        "z"_a.none(), "delta_bias"_a.none(), "softplus"_a, "initial"_a.none(), "segments"_a.none(),
        "n_states"_a, "reverse"_a, "checkpoints"_a, "dy"_a, "dlast"_a.none(), "dx"_a, "ddelta"_a,
        "dA"_a, "dB"_a, "dC"_a, "dD"_a.none(), "dz"_a.none(), "ddelta_bias"_a.none(),
        "dinitial"_a.none());
  m.def("scan_step", py_scan_step, "state"_a, "x"_a, "delta"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(),
        "z"_a.none(), "delta_bias"_a.none(), "softplus"_a, "y"_a);
  m.def("ssd", py_ssd, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(), "dt_bias"_a.none(),
        "softplus"_a, "dt_limit"_a, "initial"_a.none(), "segments"_a.none(), "n_states"_a, "reverse"_a,
        "y"_a, "last"_a.none());
  m.def("ssd_backward", py_ssd_backward, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(), "z"_a.none(),
        "dt_bias"_a.none(), "softplus"_a, "dt_limit"_a, "initial"_a.none(), "segments"_a.none(),
        "n_states"_a, "reverse"_a, "dy"_a, "dlast"_a.none(), "dx"_a, "ddt"_a, "dA"_a, "dB"_a, "dC"_a,
        "dD"_a.none(), "dz"_a.none(), "ddt_bias"_a.none(), "dinitial"_a.none());
  m.def("ssd_step", py_ssd_step, "state"_a, "x"_a, "dt"_a, "A"_a, "B"_a, "C"_a, "D"_a.none(),
        "z"_a.none(), "dt_bias"_a.none(), "softplus"_a, "dt_limit"_a, "y"_a);
  m.def("conv", py_conv, "x"_a, "weight"_a, "bias"_a.none(), "silu"_a, "initial"_a.none(),
        "segments"_a.none(), "n_states"_a, "reverse"_a, "y"_a, "final"_a.none());
  m.def("conv_backward", py_conv_backward, "x"_a, "weight"_a, "bias"_a.none(), "silu"_a,
        "initial"_a.none(), "segments"_a.none(), "n_states"_a, "reverse"_a, "dy"_a,
        "dfinal"_a.none(), "dx"_a, "dweight"_a, "dbias"_a.none(), "dinitial"_a.none());
  m.def("conv_step", py_conv_step, "x"_a, "window"_a, "weight"_a, "bias"_a.none(), "silu"_a, "y"_a);
  m.def("norm", py_norm, "x"_a, "residual"_a.none(), "weight"_a, "eps"_a, "normed"_a,
        "total"_a.none(), "scale"_a.none(), "gate"_a.none() = none);
  m.def("norm_backward", py_norm_backward, "sum"_a, "weight"_a, "eps"_a, "scale"_a, "dnormed"_a,
        "dtotal"_a.none(), "dx"_a, "dweight"_a, "gate"_a.none() = none, "dgate"_a.none() = none);
  m.def("product", py_gemm, "a"_a, "b"_a, "bias"_a.none(), "c"_a, "accumulate"_a = false);
  m.def("few_rows", py_gemv, "x"_a, "weight"_a, "bias"_a.none(), "y"_a);
  m.def("quantized_product", py_quantized_gemm, "x"_a, "q"_a, "scales"_a, "minima"_a.none(),
        "bias"_a.none(), "y"_a, "few"_a = false);
  m.def("apply", apply, "function"_a, "x"_a, "y"_a);
}

}  // namespace anymamba::bindings
