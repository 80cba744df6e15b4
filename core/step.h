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

// A small tensor without gaps, of any storage type; may be absent.
struct Array {
  const void* data = nullptr;
  DType type = DType::f32;
};

// Only the model's own memory: what follows from it (A from A_log, float32 from bfloat16) is
// computed anew at each step, so that no change of a weight can go unnoticed.
struct StepLayer {
  Array norm;           // (d,)
  Weight in_proj;       // (2e, d)
  Array in_proj_bias;   // (2e,) or absent
  Array conv_weight;    // (e, k)
  Array conv_bias;      // (e,) or absent
  Weight x_proj;        // (r + 2n, e)
  Weight dt_proj;       // (e, r)
  Array dt_bias;        // (e,) or absent
  Array A_log;          // (e, n)
  Array D;              // (e,)
  Weight out_proj;      // (d, e)
  Array out_proj_bias;  // (d,) or absent
};

struct StepModel {
  std::int64_t v = 0, d = 0, e = 0, n = 0, r = 0, k = 0;
  float eps = 0;
  Weight embeddings;                   // (v, d)
  Weight head;                         // (v, d)
  Array norm;                          // (d,)
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
