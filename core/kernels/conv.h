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

struct Conv {
  std::int64_t e = 0, k = 0;
  Segments segments;
  Tensor3 x;
  const float* weight = nullptr;  // (e, k) contiguous
  const float* bias = nullptr;    // (e,) or null
  bool silu = false;
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
struct ConvStep {
  std::int64_t b = 0, e = 0, k = 0;
  Tensor3 x, y;                   // one step each; step_stride unused
  const float* weight = nullptr;
  const float* bias = nullptr;
  bool silu = false;
  Window window;                  // state_stride is the row's
};

// The scratch memory of a worker in the forward pass.
constexpr std::int64_t conv_worker_scratch(std::int64_t k) { return 4 * 128 * (2 * k + 32) + 128; }

}  // namespace anymamba
