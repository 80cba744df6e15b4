// What one step of Mamba-2's recurrence and many in turn share, so that their results are the same.
#pragma once

#include "kernels/scan_tiles.h"
#include "kernels/ssd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// What all channels of a head have in common at a step.
struct Head {
  float dt, decay;
};

inline Head head_of(const SsdInputs& ssd, const SegmentSlice& here, std::int64_t h) {
  const Tensor3& steps = ssd.dt;
  float dt = read(steps.data, steps.type,
                  here.row * steps.row_stride + here.first * steps.step_stride + h * steps.channel_stride);
  if (ssd.dt_bias != nullptr) dt += ssd.dt_bias[h];
  FloatVec size = splat(dt);
  if (ssd.softplus) size = softplus_of(size);
  size = clamp(size, ssd.low, ssd.high);
  const FloatVec decay = exp2_of(size * splat(ssd.A[h] * kLog2e));
  return {size[0], decay[0]};
}

// The output of up to kLanes channels of one head at a step: y = C h + D x, through the gate.
inline void write_output(const SsdInputs& ssd, const Tensor3& to, const SegmentSlice& here, const Block& block,
                         FloatVec y, FloatVec x) {
  float out[kLanes];
  if (ssd.D != nullptr) {
    const FloatVec D =
        ssd.D_of_channels ? load_some(ssd.D + block.first, block.channels) : splat(ssd.D[block.first / ssd.p]);
    y = fma(D, x, y);
  }
  if (ssd.z) {
    load_tile(out, ssd.z, here, block);
    y = y * silu_of(load(out));
  }
  store(out, y);
  store_tile(out, to, here, block);
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
