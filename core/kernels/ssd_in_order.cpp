// Mamba-2's recurrence through segments, step by step: what ssd_step gives, however segments are cut,
// which the chunks of the duality do not.
//
//   for each head of each segment                     a work item
//     for each kLanes steps
//       B, C (steps, n)                               as floats
//       for each kLanes channels
//         for each kTogether channels, for each kStates vectors of their states
//           for each step                             states in registers
//             h = decay h + dt x B
//             parts (channels, steps, kLanes) += C h
//         y (steps, channels) = the sums of the parts' lanes
#include "kernels/ssd_recurrence.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kSteps = kLanes;
constexpr int kVectors = kLanes == 16 ? 8 : 4;  // of a channel's states in registers
constexpr int kTogether = 2;                    // channels

// A head's channels and their states h (channels, padded n), zeros behind n.
class HeadStates {
 public:
  HeadStates(const Ssd& ssd, std::int64_t head, Arena& memory)
      : ssd_(ssd), head_(head), padded_(round_up(ssd.n, kLanes)), h_(memory.floats(ssd.p * padded_)),
        B_(memory.floats(kSteps * padded_)), C_(memory.floats(kSteps * padded_)),
        dx_(memory.floats(kLanes * kSteps)), x_(memory.floats(kSteps * kLanes)),
        parts_(memory.floats(kLanes * kSteps * kLanes)) {}

  static std::int64_t scratch(const Ssd& ssd) {
    Arena counted;
    HeadStates(ssd, 0, counted);
    return counted.used();
  }

  void read(const float* states) {
    fill_zeros(h_, ssd_.p * padded_);
    if (states == nullptr) return;
    for (std::int64_t c = 0; c < ssd_.p; ++c) copy(h_ + c * padded_, states + (head_ * ssd_.p + c) * ssd_.n);
  }

  void write(float* states) const {
    for (std::int64_t c = 0; c < ssd_.p; ++c) copy(states + (head_ * ssd_.p + c) * ssd_.n, h_ + c * padded_);
  }

  // At most kSteps steps.
  void advance(const SegmentSlice& slice, const Tensor3& y) {
    steps_ = static_cast<int>(slice.steps);
    const std::int64_t group = head_ / (ssd_.heads / ssd_.groups);
    read_maps(B_, ssd_.B, slice, group);
    read_maps(C_, ssd_.C, slice, group);
    for (int t = 0; t < steps_; ++t) heads_[t] = head_of(ssd_, part_of(slice, t, 1), head_);
    const std::int64_t first = head_ * ssd_.p, last = first + ssd_.p;
    for (std::int64_t c = first; c < last; c += kLanes)
      advance_channels({c, static_cast<int>(smaller(kLanes, last - c)), kLanes}, h_ + (c - first) * padded_, slice,
                       y);
  }

 private:
  void copy(float* to, const float* from) const {
    __builtin_memcpy(to, from, static_cast<std::size_t>(ssd_.n) * sizeof(float));
  }

  // maps (steps, padded n).
  void read_maps(float* maps, const Projection& p, const SegmentSlice& slice, std::int64_t group) const {
    if (padded_ == ssd_.n) return read_projection(maps, p, slice, group, ssd_.n);
    fill_zeros(maps, slice.steps * padded_);
    for (int t = 0; t < slice.steps; ++t)
      read_projection(maps + t * padded_, p, part_of(slice, t, 1), group, ssd_.n);
  }

  void advance_channels(const Block& block, float* h, const SegmentSlice& slice, const Tensor3& y) {
    load_tile(x_, ssd_.x, slice, block);
    for (int t = 0; t < steps_; ++t) store(dx_ + t * kLanes, splat(heads_[t].dt) * load(x_ + t * kLanes));
    fill_zeros(parts_ + block.channels * kSteps * kLanes, (kLanes - block.channels) * kSteps * kLanes);
    int c = 0;
    for (; c + kTogether <= block.channels; c += kTogether) advance_some<kTogether>(c, h + c * padded_);
    for (; c < block.channels; ++c) advance_some<1>(c, h + c * padded_);
    for (int t = 0; t < steps_; ++t) {
      FloatVec of_channels[kLanes];
      for (int i = 0; i < kLanes; ++i) of_channels[i] = load(parts_ + (i * kSteps + t) * kLanes);
      write_output(ssd_, y, part_of(slice, t, 1), block, sums_of_lanes(of_channels), load(x_ + t * kLanes));
    }
  }

  template <int M>
  void advance_some(int c, float* h) {
    std::int64_t i = 0;
    for (; i + kVectors * kLanes <= ssd_.n; i += kVectors * kLanes) advance_states<M, kVectors>(c, i, h);
    for (; i < padded_; i += kLanes) advance_states<M, 1>(c, i, h);
  }

  // V vectors of states, from number i on, of M channels from c on.
  template <int M, int V>
  void advance_states(int c, std::int64_t i, float* h) {
    FloatVec state[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) state[m][v] = load(h + m * padded_ + i + v * kLanes);
    // What lies behind n stays 0, as where one step follows another.
    const int rest = static_cast<int>(smaller(kLanes, ssd_.n - i));
    for (int t = 0; t < steps_; ++t) {
      const float *const B = B_ + t * padded_ + i, *const C = C_ + t * padded_ + i;
      const FloatVec decay = splat(heads_[t].decay);
      FloatVec input[M], y[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        input[m] = splat(dx_[t * kLanes + c + m]);
        y[m] = i == 0 ? FloatVec{} : load(parts_ + ((c + m) * kSteps + t) * kLanes);
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const FloatVec b = load(B + v * kLanes), from = load(C + v * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          state[m][v] = fma(decay, state[m][v], input[m] * b);
          y[m] = fma(state[m][v], from, y[m]);
        }
      }
      if (V == 1 && rest < kLanes)
        for (int m = 0; m < M; ++m) state[m][0] = first_lanes(state[m][0], rest);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) store(parts_ + ((c + m) * kSteps + t) * kLanes, y[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(h + m * padded_ + i + v * kLanes, state[m][v]);
  }

  static FloatVec first_lanes(FloatVec v, int count) {
    float lanes[kLanes];
    store(lanes, v);
    return load_some(lanes, count);
  }

  const Ssd& ssd_;
  const std::int64_t head_, padded_;
  float *const h_, *const B_, *const C_, *const dx_, *const x_, *const parts_;
  int steps_ = 0;
  Head heads_[kSteps];
};

}  // namespace

void ssd_in_order(const Ssd& ssd, const SsdResult& result) {
  const std::int64_t size = ssd.e() * ssd.n;
  parallel_with_arena(ssd.segments.count * ssd.heads, HeadStates::scratch(ssd), [&](std::int64_t item, Arena& memory) {
    const SegmentSlice segment = slice_of(ssd.segments, item / ssd.heads);
    HeadStates states(ssd, item % ssd.heads, memory);
    const bool goes_on = ssd.initial != nullptr && segment.state_in >= 0;
    states.read(goes_on ? ssd.initial + segment.state_in * size : nullptr);
    for (std::int64_t t = 0; t < segment.steps; t += kSteps)
      states.advance(part_of(segment, t, smaller(kSteps, segment.steps - t)), result.y);
    if (result.last != nullptr && segment.state_out >= 0) states.write(result.last + segment.state_out * size);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
