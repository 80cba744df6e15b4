// One step of Mamba-2's recurrence.
//
// A vector holds kLanes states of a channel, as they lie in memory. A few channels go through their
// states side by side, so that a vector of B and of C serves them all.
#include "kernels/ssd_recurrence.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kTogether = 4;  // channels

// The states h (M, n) of M channels, of which `dx` is dt x; sums (M, kLanes) are parts of C h.
template <int M>
ANYMAMBA_INLINE void advance_states(const Head& head, std::int64_t n, const float* B_n, const float* C_n,
                                    const float* dx, float* h, float* sums) {
  FloatVec input[M], y[M] = {};
  const FloatVec decay = splat(head.decay);
#pragma GCC unroll 8
  for (int c = 0; c < M; ++c) input[c] = splat(dx[c]);
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const FloatVec B = load(B_n + i), C = load(C_n + i);
#pragma GCC unroll 8
    for (int c = 0; c < M; ++c) {
      const FloatVec after = fma(decay, load(h + c * n + i), input[c] * B);
      store(h + c * n + i, after);
      y[c] = fma(after, C, y[c]);
    }
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    const FloatVec B = load(B_n + i), C = load(C_n + i);
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

// Up to kLanes channels of one head, at one step of a row. h (channels, n) is their state.
void step_channels(const SsdInputs& ssd, const Tensor3& y, const SegmentSlice& here, std::int64_t first,
                   int channels, const Head& head, const float* B, const float* C, float* h) {
  const Block block{first, channels, kLanes};
  float x[kLanes], dx[kLanes], sums[kLanes * kLanes];
  load_tile(x, ssd.x, here, block);
  store(dx, splat(head.dt) * load(x));
  int c = 0;
  for (; c + kTogether <= channels; c += kTogether)
    advance_states<kTogether>(head, ssd.n, B, C, dx + c, h + c * ssd.n, sums + c * kLanes);
  for (; c < channels; ++c) advance_states<1>(head, ssd.n, B, C, dx + c, h + c * ssd.n, sums + c * kLanes);
  fill_zeros(sums + channels * kLanes, (kLanes - channels) * kLanes);
  write_output(ssd, y, here, block, row_sums(sums), load(x));
}

// Channels [first, last) of one head, at one step of a row.
void step_head(const SsdInputs& ssd, const Tensor3& y, const SegmentSlice& here, std::int64_t first,
               std::int64_t last, const float* B, const float* C, float* h) {
  const Head head = head_of(ssd, here, first / ssd.p);
  for (std::int64_t c = first; c < last; c += kLanes)
    step_channels(ssd, y, here, c, static_cast<int>(smaller(kLanes, last - c)), head, B, C,
                  h + (c - first) * ssd.n);
}

}  // namespace

void ssd_step(const SsdStep& step, std::int64_t first, std::int64_t last) {
  const std::int64_t width = step.e() / step.groups, padded = round_up(step.n, kLanes);
  const Scratch<float> projections(2 * padded);
  float *B = projections, *C = B + padded;
  const SubnormalsAreZeros fast;
  fill_zeros(B, 2 * padded);
  for (std::int64_t row = 0; row < step.b; ++row) {
    const SegmentSlice here{row, 0, 1, 1};
    float* const states = step.state + slot_in(step.slot_of, row) * step.state_stride;
    std::int64_t group = -1;
    for (std::int64_t c = first; c < last;) {
      if (c / width != group) {
        group = c / width;
        read_projection(B, step.B, here, group, step.n);
        read_projection(C, step.C, here, group, step.n);
      }
      const std::int64_t stop = smaller(last, (c / step.p + 1) * step.p);
      step_head(step, step.y, here, c, stop, B, C, states + c * step.n);
      c = stop;
    }
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
