// The selective scan, forward and backward, and one step of it.
//
//   h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = (C_t h_t + D x_t) silu(z_t)
//
// Letters: b rows, l steps, e channels, n states a channel, g groups of B and C, s segments.
#pragma once

#include "base/types.h"

namespace anymamba {

// B or C, (rows, steps, groups, states).
struct Projection {
  void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0;
  std::int64_t step_stride = 0;
  std::int64_t group_stride = 0;
  std::int64_t state_stride = 0;
};

// What a scan and a step of it read.
struct ScanInputs {
  std::int64_t e = 0, n = 0, groups = 1;
  Tensor3 x, delta, z;                // z may be absent; one step each for a step
  Projection B, C;
  const float* A = nullptr;           // (e, n), contiguous
  const float* D = nullptr;           // (e,) or null
  const float* delta_bias = nullptr;  // (e,) or null
  bool softplus = false;
};

struct Scan : ScanInputs {
  Segments segments;
  const float* initial = nullptr;  // states that state_in counts, (., e, n), or null for zeros
};

// What the forward pass leaves.
struct ScanResult {
  Tensor3 y;
  float* last = nullptr;         // states that state_out counts, (., e, n), or null
  float* checkpoints = nullptr;  // scan_checkpoint_floats(...) floats for the backward pass, or null
};

// Gradients in and out. Absent outputs are not written. All float outputs are overwritten, with
// zeros where no segment is. With `initial`, no two segments may begin from the same state.
struct ScanGradients {
  Tensor3 y;                      // given
  const float* last = nullptr;    // given, like ScanResult::last, or null
  const float* checkpoints = nullptr;  // from the forward pass
  Tensor3 x, delta, z;            // z absent where the scan has none
  float* B = nullptr;             // (b, l, g, n) contiguous; rows and steps as the segments say
  float* C = nullptr;
  std::int64_t rows = 0, steps = 0;  // b and l of B and C here
  float* A = nullptr;             // (e, n)
  float* D = nullptr;             // (e,) or null
  float* delta_bias = nullptr;    // (e,) or null
  float* initial = nullptr;       // like Scan::initial, or null; every entry is written
  std::int64_t n_states = 0;      // entries of initial and last
};

// One step for a batch: the state changes in place.
struct ScanStep : ScanInputs {
  std::int64_t b = 0;
  Tensor3 y;
  float* state = nullptr;  // (slots, e, n), stride below, contiguous inside a slot
  std::int64_t state_stride = 0;
  const std::int64_t* slot_of = nullptr;  // (b,), or null: row i has slot i
};

// Channels and steps that a kernel works through at a time: its tiles stay in the first two caches.
// The forward pass leaves the state before each chunk of steps of each segment, from which the
// backward pass recomputes those inside: l * e * n / 32 floats.
inline constexpr int kScanChannels = 64, kChunkSteps = 32;

// The scratch memory of a worker in the forward pass.
constexpr std::int64_t scan_worker_scratch(std::int64_t n) {
  return 4 * (kScanChannels * (3 * kChunkSteps + 2 * n + 2) + 2 * kChunkSteps * n);
}

// Floats that the backward pass needs. The same for every instruction set.
std::int64_t scan_checkpoint_floats(const Scan& scan);

}  // namespace anymamba
