// One token for each row of a batch through the whole model, in one call: decoding at the speed of
// reading the weights once. Letters: b rows, d model width, e inner width, n states, r rank of the
// step size, k convolution width, v vocabulary.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "types.h"

namespace anymamba {

// A weight of shape (n, k), rows contiguous.
struct Weight {
  const void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0;
};

struct StepLayer {
  const float* norm = nullptr;         // (d,)
  Weight in_proj;                      // (2e, d)
  const float* in_proj_bias = nullptr; // (2e,) or null
  const float* conv_weight = nullptr;  // (e, k)
  const float* conv_bias = nullptr;    // (e,) or null
  Weight x_proj;                       // (r + 2n, e)
  Weight dt_proj;                      // (e, r)
  const float* dt_bias = nullptr;      // (e,)
  const float* A = nullptr;            // (e, n), negative
  const float* D = nullptr;            // (e,)
  Weight out_proj;                     // (d, e)
  const float* out_proj_bias = nullptr;  // (d,) or null
};

struct StepModel {
  std::int64_t v = 0, d = 0, e = 0, n = 0, r = 0, k = 0;
  float eps = 0;
  Weight embeddings;                   // (v, d)
  Weight head;                         // (v, d)
  const float* norm = nullptr;         // (d,)
  std::vector<StepLayer> layers;
};

// The states of a batch, as the cache lays them out: contiguous blocks (layers, b, e, k) and
// (layers, b, e, n).
struct StepState {
  void* conv = nullptr;
  DType conv_type = DType::f32;
  float* ssm = nullptr;
};

// tokens (b,) in [0, v); hidden (b, d) instead where tokens is null. logits (b, v).
// Both states advance in place.
void decode_step(const StepModel& model, const StepState& state, std::int64_t b,
                 const std::int64_t* tokens, const float* hidden, float* logits);

}  // namespace anymamba
