// Many tokens of several sequences through the whole model. Memory grows with the number of tokens,
// so long prompts come in chunks.
#pragma once

#include <functional>

#include "model/model.h"

namespace anymamba {

// The sequences' tokens one behind the other; sequence i has those from offsets[i] to offsets[i+1]
// and goes on from the state in its slot, which advances in place. One without tokens keeps it.
struct Prompt {
  std::int64_t sequences = 0;
  const std::int64_t* offsets = nullptr;  // (sequences + 1,), from 0 on, ascending
  const std::int64_t* tokens = nullptr;   // in [0, v); or
  const float* hidden = nullptr;          // (., d) in their place
  std::int64_t wanted = 0;                // positions that get logits
  const std::int64_t* positions = nullptr;  // (wanted,)
  bool bf16_products = false;             // see operand_type
  bool without_head = false;              // they get what the head would read, (wanted, d)
  std::function<bool()> interrupted = {};  // asked between layers whether to stop, or empty
};

// What `interrupted` led to.
struct Interrupted {};

// logits (wanted, v), or without the head (wanted, d). Throws std::bad_alloc or Interrupted; then the
// states are as before.
void prefill(const Model& model, const States& states, const Prompt& prompt, float* logits);

}  // namespace anymamba
