// RMSNorm over rows, with a gate or the residual addition before it, forward and backward; forward
// with a gate behind it.
#pragma once

#include "base/types.h"

namespace anymamba {

// A matrix (rows, d) whose rows are contiguous.
struct Rows {
  void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0;
};

struct Norm {
  std::int64_t rows = 0, d = 0;
  Rows x, residual;               // residual may be absent
  const float* weight = nullptr;  // (d,)
  float eps = 0;
  Rows gate;                      // may be absent: x is multiplied by silu(gate) first
  Rows gate_after;                // may be absent: what is normed is multiplied by its silu
};

struct NormResult {
  Rows normed;
  Rows total;                     // x + residual, may be absent
  float* scale = nullptr;         // (rows,) 1 / rms, for the backward pass, or null
};

struct NormGradients {
  Rows normed;                    // given
  Rows total;                     // given, or absent: the gradient of the sum from elsewhere
  Rows sum;                       // x + residual as the forward pass stored it; x where there is a gate
  const float* scale = nullptr;   // from the forward pass
  Rows x;                         // written: the gradient of x, which is also the residual's
  Rows gate;                      // written where the norm has a gate
  float* weight = nullptr;        // (d,), overwritten
};

// The scratch memory of a worker in the forward pass.
constexpr std::int64_t norm_worker_scratch(std::int64_t d) { return 2 * 4 * (d + 16) + 128; }

}  // namespace anymamba
