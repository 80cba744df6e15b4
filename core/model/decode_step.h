// One token for each row of a batch through the whole model, in one call: decoding at the speed of
// reading the weights once.
#pragma once

#include "model/model.h"

namespace anymamba {

// tokens (b,) in [0, v); hidden (b, d) instead where tokens is null. logits (b, v).
// The states of the rows' slots advance in place. `bf16_products`: see operand_type.
void decode_step(const Model& model, const States& states, std::int64_t b,
                 const std::int64_t* tokens, const float* hidden, float* logits,
                 bool bf16_products = false);

// The same through the mixer of the model's only layer, without the norm before it and the residual:
// x and y (b, d) of any storage type. The model needs neither embeddings nor head.
void mixer_step(const Model& model, const States& states, const Rows& x, const Rows& y,
                std::int64_t b, bool bf16_products = false);

}  // namespace anymamba
