// Compiled once for each instruction set: its table.
#include "kernels/kernels.h"

#include "kernels/functions.h"
#include "simd/simd.h"

#define ANYMAMBA_TEXT_OF(x) #x
#define ANYMAMBA_TEXT(x) ANYMAMBA_TEXT_OF(x)

namespace anymamba::ANYMAMBA_ISA {

extern const Kernels table;
const Kernels table = {
    ANYMAMBA_TEXT(ANYMAMBA_ISA),
#if defined(__AVX512BF16__)
    true,
#else
    false,
#endif
    scan,
    scan_backward,
    scan_step,
    conv,
    conv_backward,
    conv_step,
    norm,
    norm_backward,
    product,
    few_rows,
    quantize_rows,
    few_quantized_rows,
    quantized_product,
    widen_quantized,
    widen,
    rates,
    apply_exp,
    apply_exp2,
    apply_silu,
    apply_softplus,
    convert,
};

}  // namespace anymamba::ANYMAMBA_ISA
