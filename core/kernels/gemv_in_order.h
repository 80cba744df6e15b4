// The product of weights and a few vectors whose sums are those of a product of matrices.
#pragma once

#include "kernels/gemm.h"

namespace anymamba::ANYMAMBA_ISA {

// As gemv, for at most kInOrderVectors vectors: of floats, or of bfloat16 pairs where the processor
// multiplies them.
void gemv_in_order(const Gemv& gemv, std::int64_t first, std::int64_t last);

}  // namespace anymamba::ANYMAMBA_ISA
