// One step of Mamba-2's recurrence.
//
// A vector holds kLanes states of a channel, as they lie in memory. A few channels go through their
// states side by side, so that a vector of B and of C serves them all.
#include "kernels/scan_tiles.h"
#include "kernels/ssd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kTogether = 4;  // channels

// What all channels of a head have in common. B and C are (n,), rounded up to whole vectors with
// zeros.
struct Head {
  float dt, decay;
  const float *B, *C;
};

// The states h (M, n) of M channels, of which `dx` is dt x; sums (M, kLanes) are parts of C h.
template <int M>
ANYMAMBA_INLINE void advance_states(const Head& head, std::int64_t n, const float* dx, float* h, float* sums) {
  FloatVec input[M], y[M] = {};
  const FloatVec decay = splat(head.decay);
#pragma GCC unroll 8
  for (int c = 0; c < M; ++c) input[c] = splat(dx[c]);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const FloatVec B = load(head.B + i), C = load(head.C + i);
#pragma GCC unroll 8
    for (int c = 0; c < M; ++c) {
      const FloatVec after = fma(decay, load(h + c * n + i), input[c] * B);
      store(h + c * n + i, after);
      y[c] = fma(after, C, y[c]);
    }
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    const FloatVec B = load(head.B + i), C = load(head.C + i);
#pragma GCC unroll 8
    for (int c = 0; c < M; ++c) {
      const FloatVec after = fma(decay, load_some(h + c * n + i, rest), input[c] * B);
      store_some(h + c * n + i, after, rest);
      y[c] = fma(after, C, y[c]);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < M; ++c) store(sums + c * kLanes, y[c]);
}

// Up to kLanes channels of one row and one head.
void step_channels(const SsdStep& step, std::int64_t row, std::int64_t first, int channels, const Head& head) {
  const SegmentSlice here{row, 0, 1, 1};
  const Block block{first, channels, kLanes};
  float x[kLanes], z[kLanes], sums[kLanes * kLanes];
  load_tile(x, step.x, here, block);
  const FloatVec inputs = load(x);
  store(x, splat(head.dt) * inputs);
  float* const h = step.state + slot_in(step.slot_of, row) * step.state_stride + first * step.n;
  int c = 0;
  for (; c + kTogether <= channels; c += kTogether)
    advance_states<kTogether>(head, step.n, x + c, h + c * step.n, sums + c * kLanes);
  for (; c < channels; ++c) advance_states<1>(head, step.n, x + c, h + c * step.n, sums + c * kLanes);
  fill_zeros(sums + channels * kLanes, (kLanes - channels) * kLanes);
  FloatVec y = row_sums(sums);
  if (step.D != nullptr) {
    const FloatVec D = step.D_of_channels ? load_some(step.D + first, channels) : splat(step.D[first / step.p]);
    y = fma(D, inputs, y);
  }
  if (step.z) {
    load_tile(z, step.z, here, block);
    y = y * silu_of(load(z));
  }
  store(x, y);
  store_tile(x, step.y, here, block);
}

// The step size of a head and what follows from it.
Head head_of(const SsdStep& step, std::int64_t row, std::int64_t h, const float* B, const float* C) {
  float dt = read(step.dt.data, step.dt.type, row * step.dt.row_stride + h * step.dt.channel_stride);
  if (step.dt_bias != nullptr) dt += step.dt_bias[h];
  FloatVec size = splat(dt);
  if (step.softplus) size = softplus_of(size);
  size = clamp(size, step.low, step.high);
  const FloatVec decay = exp2_of(size * splat(step.A[h] * kLog2e));
  return {size[0], decay[0], B, C};
}

}  // namespace

void ssd_step(const SsdStep& step, std::int64_t first, std::int64_t last) {
  const std::int64_t width = step.e() / step.groups, padded = round_up(step.n, kLanes);
  const Scratch<float> projections(2 * padded);
  float *B = projections, *C = B + padded;
  const SubnormalsAreZeros fast;
  fill_zeros(B, 2 * padded);
  for (std::int64_t row = 0; row < step.b; ++row) {
    std::int64_t group = -1;
    for (std::int64_t c = first; c < last;) {
      if (c / width != group) {
        group = c / width;
        const SegmentSlice here{row, 0, 1, 1};
        read_projection(B, step.B, here, group, step.n);
        read_projection(C, step.C, here, group, step.n);
      }
      const std::int64_t h = c / step.p, stop = smaller(last, (h + 1) * step.p);
      const Head head = head_of(step, row, h, B, C);
      for (; c < stop; c += kLanes)
        step_channels(step, row, c, static_cast<int>(smaller(kLanes, stop - c)), head);
      c = stop;
    }
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
