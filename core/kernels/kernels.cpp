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
    gemm,
    gemv,
    quantize_activations,
    quantized_gemv,
    quantized_gemm,
    dequantize,
    to_float32,
    negative_exp,
    apply_exp,
    apply_exp2,
    apply_silu,
    apply_softplus,
    convert,
};

}  // namespace anymamba::ANYMAMBA_ISA
