// A whole model as pointers to its weights, and the states of a batch. Letters: b rows, d model
// width, e inner width, n states, r rank of the step size, k convolution width, v vocabulary.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "base/types.h"

namespace anymamba {

// A weight of shape (n, k), rows contiguous; where it is quantized, `quantized` has it instead.
struct Weight {
  const void* data = nullptr;
  DType type = DType::f32;
  std::int64_t row_stride = 0;
  QuantizedWeight quantized;
};

// A small tensor without gaps, of any storage type; may be absent.
struct Array {
  const void* data = nullptr;
  DType type = DType::f32;
};

// The model's own memory: what follows from it (A from A_log, float32 from bfloat16) is computed
// anew at each call, so that no change of a weight can go unnoticed. A alone may be given beside
// A_log, by an owner whose weights never change.
struct Layer {
  Array norm;           // (d,)
  Weight in_proj;       // (2e, d)
  Array in_proj_bias;   // (2e,) or absent
  Array conv_weight;    // (e, k)
  Array conv_bias;      // (e,) or absent
  Weight x_proj;        // (r + 2n, e)
  Array dt_norm, B_norm, C_norm;  // (r,), (n,), (n,): RMSNorms before dt_proj and the scan, or absent
  Weight dt_proj;       // (e, r)
  Array dt_bias;        // (e,) or absent
  Array A_log;          // (e, n)
  const float* A = nullptr;  // (e, n), negative_exp of A_log, or null
  Array D;              // (e,)
  Weight out_proj;      // (d, e)
  Array out_proj_bias;  // (d,) or absent
};

struct Model {
  std::int64_t v = 0, d = 0, e = 0, n = 0, r = 0, k = 0;
  float eps = 0;
  float mixer_eps = 0;                 // of dt_norm, B_norm and C_norm
  Weight embeddings;                   // (v, d)
  Weight head;                         // (v, d)
  Array norm;                          // (d,)
  std::vector<Layer> layers;
};

// The states of a batch, as the cache lays them out: contiguous blocks (layers, b, e, k) and
// (layers, b, e, n).
struct States {
  void* conv = nullptr;
  DType conv_type = DType::f32;
  float* ssm = nullptr;
};

// The item at an index of an array.
inline const void* at(Array array, std::int64_t index) {
  return static_cast<const char*>(array.data) + index * size_of(array.type);
}

// What a product with a weight reads its activations as. With `bf16_products` those of bfloat16
// weights are rounded to bfloat16; else, and for all other weights, they are float32.
inline DType operand_type(const Weight& weight, bool bf16_products) {
  const bool rounds =
      bf16_products && weight.quantized.bits == 0 && weight.type == DType::bf16;
  return rounds ? DType::bf16 : DType::f32;
}

}  // namespace anymamba
