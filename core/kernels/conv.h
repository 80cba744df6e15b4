// The causal depthwise convolution with bias and silu, forward and backward, and one step of it.
// Letters: b rows, l steps, e channels, k taps, w columns of a window.
#pragma once

#include "base/types.h"

namespace anymamba {

// Windows, (., e, w), oldest input first; any strides.
struct Window {
  void* data = nullptr;
  DType type = DType::f32;
  std::int64_t state_stride = 0, channel_stride = 0, column_stride = 1;
  std::int64_t columns = 0;
};

// What a convolution and a step of it read.
struct ConvInputs {
  std::int64_t e = 0, k = 0;
  Tensor3 x;                      // one step of each row for a step
  const float* weight = nullptr;  // (e, k) contiguous
  const float* bias = nullptr;    // (e,) or null
  bool silu = false;
};

struct Conv : ConvInputs {
  Segments segments;
  Window initial;                 // absent (data null) means zeros
};

struct ConvResult {
  Tensor3 y;
  Window final;                   // absent: not kept
};

struct ConvGradients {
  Tensor3 y;                      // given
  Window final;                   // given, float32, or absent
  Tensor3 x;                      // written
  float* weight = nullptr;        // (e, k), overwritten
  float* bias = nullptr;          // (e,) or null, overwritten
  Window initial;                 // written, float32, or absent; every entry is written
  std::int64_t n_states = 0;
};

// One step for a batch: the window shifts in place by one column and takes x in.
struct ConvStep : ConvInputs {
  std::int64_t b = 0;
  Tensor3 y;
  Window window;                  // one a slot
  const std::int64_t* slot_of = nullptr;  // (b,), or null: row i has slot i
};

// Channels and steps of a tile of the forward pass.
inline constexpr int kConvChannels = 128, kConvSteps = 32;

// The scratch memory of a worker in the forward pass.
constexpr std::int64_t conv_worker_scratch(std::int64_t k) {
  return 4 * kConvChannels * (2 * k + kConvSteps);
}

}  // namespace anymamba
