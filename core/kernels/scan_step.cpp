// One step of the selective scan.
//
// Up to kLanes channels at a time. Their delta, x and z are one vector each; the states are taken
// channel by channel, kLanes states a vector, as they lie in memory.
#include "kernels/scan_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Up to kLanes channels of one row and one group. B and C are (n,), rounded up to whole vectors with
// zeros.
void step_channels(const ScanStep& step, std::int64_t row, std::int64_t first, int channels,
                   const float* B, const float* C) {
  const SegmentSlice here{row, 0, 1, 1};
  const Block block{first, channels, kLanes};
  float x[kLanes], delta[kLanes], z[kLanes], products[kLanes * kLanes];
  load_tile(x, step.x, here, block);
  load_tile(delta, step.delta, here, block);
  if (step.delta_bias != nullptr)
    store(delta, load(delta) + load_some(step.delta_bias + first, channels));
  if (step.softplus) store(delta, softplus_of(load(delta)));
  const FloatVec inputs = load(x);
  store(x, load(delta) * inputs);
  store(delta, load(delta) * splat(kLog2e));
  // The recurrence of each channel; its products C h stay apart, a vector of partial sums each.
  for (int c = 0; c < channels; ++c) {
    const float* A = step.A + (first + c) * step.n;
    float* h = step.state + slot_in(step.slot_of, row) * step.state_stride + (first + c) * step.n;
    FloatVec y{};
    for (std::int64_t i = 0; i < step.n; i += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, step.n - i));
      const bool whole = count == kLanes;
      const FloatVec decay = exp2_of(splat(delta[c]) * (whole ? load(A + i) : load_some(A + i, count)));
      const FloatVec before = whole ? load(h + i) : load_some(h + i, count);
      const FloatVec after = fma(decay, before, splat(x[c]) * load(B + i));
      whole ? store(h + i, after) : store_some(h + i, after, count);
      y = fma(after, load(C + i), y);
    }
    store(products + c * kLanes, y);
  }
  fill_zeros(products + channels * kLanes, (kLanes - channels) * kLanes);
  FloatVec y = row_sums(products);
  if (step.D != nullptr) y = fma(load_some(step.D + first, channels), inputs, y);
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
