// One step of the selective scan.
//
// Up to kLanes channels at a time. Their delta, x and z are one vector each; the states are taken
// channel by channel, kLanes states a vector, as they lie in memory, and transposed for the sum over
// them, which is made in the order of the scan over many steps: the results are the same.
#include "kernels/scan_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// States [i, i + count) of one channel, count being at most kLanes: after the step, zeros behind them.
ANYMAMBA_INLINE FloatVec advance_states(const float* A, float* h, const float* B, float delta, float dx,
                                        int count) {
  const bool whole = count == kLanes;
  const FloatVec rates = (whole ? load(A) : load_some(A, count)) * splat(kLog2e);
  const FloatVec decay = exp2_of(splat(delta) * rates), before = whole ? load(h) : load_some(h, count);
  const FloatVec after = fma(decay, before, splat(dx) * load(B));
  whole ? store(h, after) : store_some(h, after, count);
  return after;
}

// y += C h over `count` states of kLanes channels, h (count, kLanes), as `advance` in scan_tiles.h does.
ANYMAMBA_INLINE FloatVec add_states(FloatVec y, const FloatVec (&h)[kLanes], const float* C, int count) {
  int i = 0;
  for (; i + kStates <= count; i += kStates) y = y + sum_of_states<kStates>(h + i, C + i);
  for (; i < count; ++i) y = fma(h[i], splat(C[i]), y);
  return y;
}

// Up to kLanes channels of one row and one group. B and C are (n,), rounded up to whole vectors with
// zeros.
void step_channels(const ScanStep& step, std::int64_t row, std::int64_t first, int channels,
                   const float* B, const float* C) {
  const SegmentSlice here{row, 0, 1, 1};
  const Block block{first, channels, kLanes};
  float x[kLanes] = {}, delta[kLanes] = {}, z[kLanes];
  load_tile(x, step.x, here, block);
  load_tile(delta, step.delta, here, block);
  if (step.delta_bias != nullptr)
    store(delta, load(delta) + load_some(step.delta_bias + first, channels));
  if (step.softplus) store(delta, softplus_of(load(delta)));
  const FloatVec inputs = load(x);
  store(x, load(delta) * inputs);
  // A product and nothing else: the compiler would contract it with the sum that follows.
  FloatVec y{};
  if (step.D != nullptr) y = fma(load_some(step.D + first, channels), inputs, splat(-0.0f));
  const float* const A = step.A + first * step.n;
  float* const state = step.state + slot_in(step.slot_of, row) * step.state_stride + first * step.n;
  for (std::int64_t i = 0; i < step.n; i += kLanes) {
    const int count = static_cast<int>(smaller(kLanes, step.n - i));
    FloatVec h[kLanes] = {};
    for (int c = 0; c < channels; ++c)
      h[c] = advance_states(A + c * step.n + i, state + c * step.n + i, B + i, delta[c], x[c], count);
    transpose(h);
    y = add_states(y, h, C + i, count);
  }
  if (step.z) {
    load_tile(z, step.z, here, block);
    y = y * silu_of(load(z));
  }
  store(x, y);
  store_tile(x, step.y, here, block);
}

}  // namespace

void scan_step(const ScanStep& step, std::int64_t first, std::int64_t last) {
  const std::int64_t width = step.e / step.groups, padded = round_up(step.n, kLanes);
  const Scratch<float> projections(2 * padded);
  float *B = projections, *C = B + padded;
  const SubnormalsAreZeros fast;
  fill_zeros(B, 2 * padded);
  for (std::int64_t row = 0; row < step.b; ++row) {
    for (std::int64_t c = first; c < last;) {
      const std::int64_t group = c / width, stop = smaller(last, (group + 1) * width);
      const SegmentSlice here{row, 0, 1, 1};
      read_projection(B, step.B, here, group, step.n);
      read_projection(C, step.C, here, group, step.n);
      for (; c < stop; c += kLanes)
        step_channels(step, row, c, static_cast<int>(smaller(kLanes, stop - c)), B, C);
      c = stop;
    }
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
