// The state space duality of Mamba-2, forward and backward, and one step of its recurrence: a scan whose heads of
// p channels each decay at one rate, and whose neighbouring heads form groups that share B and C.
//
//   dt_t = clamp(softplus(dt_t + bias), low, high)
//   h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = (h_t C_t + D x_t) silu(z_t)
//
// Letters: b rows, l steps, h heads, p channels of a head, e = h p, g groups, n states of a channel.
// Source: "Transformers are SSMs" (arXiv 2405.21060).
#pragma once

#include "kernels/gemm.h"
#include "kernels/scan.h"

namespace anymamba {

// What the duality and a step of it read.
struct SsdInputs {
  std::int64_t heads = 0, p = 0, n = 0, groups = 1;
  Tensor3 x, z;                    // (rows, steps, e); z may be absent; one step each for a step
  Tensor3 dt;                      // (rows, steps, h)
  Projection B, C;                 // (rows, steps, g, n)
  const float* A = nullptr;        // (h,)
  const float* D = nullptr;        // (h,), or (e,) where channels have their own, or null
  const float* dt_bias = nullptr;  // (h,) or null
  bool softplus = false, D_of_channels = false;
  float low = 0, high = __builtin_inff();  // limits of a step size

  std::int64_t e() const { return heads * p; }
};

struct Ssd : SsdInputs {
  Segments segments;
  const float* initial = nullptr;  // states that state_in counts, (., h, p, n), or null for zeros
};

// What it leaves.
struct SsdResult {
  Tensor3 y;
  float* last = nullptr;  // states that state_out counts, (., h, p, n), or null
};

// Gradients in and out. All float outputs are overwritten, with zeros where no segment is.
struct SsdGradients {
  Tensor3 y;                    // given
  const float* last = nullptr;  // given, like SsdResult::last, or null
  Tensor3 x, dt, z;             // z absent where the duality has none
  float* B = nullptr;           // (b, l, g, n) contiguous; rows and steps as the segments say
  float* C = nullptr;
  std::int64_t rows = 0, steps = 0;  // b and l of B and C here
  float* A = nullptr;           // (h,)
  float* D = nullptr;           // as Ssd::D, or null
  float* dt_bias = nullptr;     // (h,) or null
  float* initial = nullptr;     // like Ssd::initial, or null; every entry is written
  std::int64_t n_states = 0;    // entries of initial and last
};

// One step for a batch: the state changes in place.
struct SsdStep : SsdInputs {
  std::int64_t b = 0;
  Tensor3 y;
  float* state = nullptr;  // (slots, h, p, n), stride below, contiguous inside a slot
  std::int64_t state_stride = 0;
  const std::int64_t* slot_of = nullptr;  // (b,), or null: row i has slot i
};

// Steps that matrix products take together, and channels of a head that a work item has at most.
inline constexpr int kSsdSteps = 64, kSsdChannels = 64;

// The scratch memory of a worker in the forward pass, and what the caller needs for so many steps of
// so many segments.
constexpr std::int64_t ssd_worker_scratch(std::int64_t n) {
  const std::int64_t tiles = kSsdChannels * (n + 3 * kSsdSteps) + kSsdSteps * (2 * n + kSsdSteps + 8);
  return 4 * tiles + kGemmScratch + 4096;
}
constexpr std::int64_t ssd_caller_scratch(std::int64_t steps, std::int64_t segments, std::int64_t groups) {
  const std::int64_t chunks = steps / kSsdSteps + segments;
  return 4 * chunks * groups * kSsdSteps * kSsdSteps + 8 * (segments + 1) + 256;
}

}  // namespace anymamba
