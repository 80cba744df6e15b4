// What products of more than a few vectors share, whoever spreads them over threads.
#pragma once

#include "kernels/quantized.h"

namespace anymamba::ANYMAMBA_ISA {

// The columns [first, last) of c, of x in place of the product's a. On the calling thread.
void multiply_panels(const QuantizedGemm& product, const QuantizedActivations& x, std::int64_t first,
                     std::int64_t last);

}  // namespace anymamba::ANYMAMBA_ISA
