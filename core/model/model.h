// A whole model as pointers to its weights, and the states of a batch: a Mamba, or with heads a
// Mamba-2. Letters: b rows, d model width, e inner width, n states, r rank of the step size, k
// convolution width, v vocabulary, h heads, p channels of a head, g groups of heads, m = g n.
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
struct Layer {                //  Mamba                    Mamba-2
  Array norm;                 //  (d,)                     (d,)
  Weight in_proj;             //  (2e, d) x, z             (2e + 2m + h, d) z, x, B, C, dt
  Array in_proj_bias;         //  (2e,) or absent          (2e + 2m + h,) or absent
  Array in_proj_scale;        //  of what in_proj and its bias give: the same shape, or absent
  Array conv_weight;          //  (e, k)                   (e + 2m, k)
  Array conv_bias;            //  (e,) or absent           (e + 2m,) or absent
  Weight x_proj;              //  (r + 2n, e)
  Array dt_norm, B_norm, C_norm;  // (r,), (n,), (n,): RMSNorms before dt_proj and the scan, or absent
  Weight dt_proj;             //  (e, r)
  Array dt_bias;              //  (e,) or absent           (h,) or absent
  Array A_log;                //  (e, n)                   (h,)
  const float* A = nullptr;   //  negative_exp of A_log, or null
  Array D;                    //  (e,)                     (h,)
  Array gated_norm;           //                           (e,): RMSNorms of groups, or absent
  Weight out_proj;            //  (d, e)                   (d, e)
  Array out_proj_bias;  // (d,) or absent
};

struct Model {
  std::int64_t v = 0, d = 0, e = 0, n = 0, r = 0, k = 0;
  std::int64_t h = 0, g = 1;           // a Mamba has no heads
  float dt_low = 0, dt_high = __builtin_inff();  // limits of a head's step size
  float eps = 0;
  float mixer_eps = 0;                 // of dt_norm, B_norm and C_norm, or of gated_norm
  // Whether a text's results are the same, bit for bit, whatever is computed beside it and however it is
  // cut. Where no weight is quantized, that takes longer.
  bool in_order = false;
  bool norm_before_gate = false;       // gated_norm's result is multiplied by the gate, not its input
  Weight embeddings;                   // (v, d)
  Weight head;                         // (v, d)
  Array norm;                          // (d,)
  std::vector<Layer> layers;

  bool has_heads() const { return h > 0; }
  // The convolution's channels, the first of them in what in_proj gives, and all that this gives.
  std::int64_t conv_channels() const { return has_heads() ? e + 2 * g * n : e; }
  std::int64_t first_conv_channel() const { return has_heads() ? e : 0; }
  std::int64_t projected() const { return e + conv_channels() + h; }
  // What x_proj gives, and dt_proj.
  std::int64_t x_projected() const { return has_heads() ? 0 : r + 2 * n; }
  std::int64_t dt_projected() const { return has_heads() ? 0 : e; }
  // D and the biases of step sizes, and of each of them the numbers of A.
  std::int64_t rates() const { return has_heads() ? h : e; }
  std::int64_t rates_width() const { return has_heads() ? 1 : n; }
};

// The states of some texts, as the cache lays them out: contiguous blocks (layers, slots,
// conv_channels, k) and (layers, slots, e, n), where e is (h, p) with heads. Each row of a batch has
// a slot of its own; slots that no row has keep their states.
struct States {
  void* conv = nullptr;
  DType conv_type = DType::f32;
  float* ssm = nullptr;
  std::int64_t slots = 0;
  const std::int64_t* slot_of = nullptr;  // (b,), or null: row i has slot i
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
