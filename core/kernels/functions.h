// Declarations of one instruction set's kernels.
#pragma once

#include "kernels/conv.h"
#include "kernels/gemm.h"
#include "kernels/norm.h"
#include "kernels/quantized.h"
#include "kernels/scan.h"

namespace anymamba::ANYMAMBA_ISA {

void scan(const Scan&, const ScanResult&);
void scan_backward(const Scan&, const ScanGradients&);
void scan_step(const ScanStep&, std::int64_t first, std::int64_t last);
void conv(const Conv&, const ConvResult&);
void conv_backward(const Conv&, const ConvGradients&);
void conv_step(const ConvStep&, std::int64_t first, std::int64_t last);
void norm(const Norm&, const NormResult&);
void norm_backward(const Norm&, const NormGradients&);
void gemm(const Gemm&);
void gemv(const Gemv&, std::int64_t first, std::int64_t last);
void quantize_activations(const float* x, std::int64_t row_stride, const QuantizedActivations& out,
                   std::int64_t first, std::int64_t last);
void quantized_gemv(const QuantizedGemv&, std::int64_t first, std::int64_t last);
void quantized_gemm(const QuantizedGemm&);
void dequantize(const QuantizedWeight&, std::int64_t row, std::int64_t k, float* y);
void negative_exp(const void* x, DType type, float* y, std::int64_t count);
void to_float32(const void* x, DType type, float* y, std::int64_t count);
void apply_exp(const float* x, float* y, std::int64_t count);
void apply_exp2(const float* x, float* y, std::int64_t count);
void apply_silu(const float* x, float* y, std::int64_t count);
void apply_softplus(const float* x, float* y, std::int64_t count);
void convert(const void* x, DType from, void* y, DType to, std::int64_t count);

}  // namespace anymamba::ANYMAMBA_ISA
