// The kernels of one instruction set, and the choice among those this machine has.
#pragma once

#include "kernels/conv.h"
#include "kernels/gemm.h"
#include "kernels/norm.h"
#include "kernels/quantized.h"
#include "kernels/scan.h"

namespace anymamba {

struct Kernels {
  const char* isa;
  bool multiplies_bf16;  // at twice float32's speed: activations are then best kept in bfloat16
  void (*scan)(const Scan&, const ScanResult&);
  void (*scan_backward)(const Scan&, const ScanGradients&);
  // Rows of the batch and channels [first, last), so that a caller can spread one step.
  void (*scan_step)(const ScanStep&, std::int64_t first, std::int64_t last);
  void (*conv)(const Conv&, const ConvResult&);
  void (*conv_backward)(const Conv&, const ConvGradients&);
  void (*conv_step)(const ConvStep&, std::int64_t first, std::int64_t last);
  void (*norm)(const Norm&, const NormResult&);
  void (*norm_backward)(const Norm&, const NormGradients&);
  void (*gemm)(const Gemm&);
  void (*gemv)(const Gemv&, std::int64_t first, std::int64_t last);
  // Rows [first, last) of x rounded into `out`.
  void (*quantize_activations)(const float* x, std::int64_t row_stride, const QuantizedActivations& out,
                        std::int64_t first, std::int64_t last);
  void (*quantized_gemv)(const QuantizedGemv&, std::int64_t first, std::int64_t last);
  void (*quantized_gemm)(const QuantizedGemm&);
  // y (k) = a row of the weight.
  void (*dequantize)(const QuantizedWeight&, std::int64_t row, std::int64_t k, float* y);
  // y (count) in float32 from x of any storage type.
  void (*to_float32)(const void* x, DType type, float* y, std::int64_t count);
  // y (count) = -exp(x), for A from A_log.
  void (*negative_exp)(const void* x, DType type, float* y, std::int64_t count);
  // y[i] = f(x[i]), for tests over a function's whole range.
  void (*apply_exp)(const float* x, float* y, std::int64_t count);
  void (*apply_exp2)(const float* x, float* y, std::int64_t count);
  void (*apply_silu)(const float* x, float* y, std::int64_t count);
  void (*apply_softplus)(const float* x, float* y, std::int64_t count);
  // y[i] = x[i] in another type, by way of float32.
  void (*convert)(const void* x, DType from, void* y, DType to, std::int64_t count);
};

// The best instruction set that this machine has, or the one that ANYMAMBA_ISA names.
// Throws std::runtime_error if that one is unknown or not to be had.
const Kernels& kernels();

// Makes kernels() return those of another instruction set from now on; false where it is missing.
bool use_isa(const char* isa);

// The names of the instruction sets that this machine has, the best first; null behind the last.
const char* const* isas();

// By name; null where this machine or this build does not have it.
const Kernels* kernels_of(const char* isa);

namespace avx512_bf16 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace portable { extern const Kernels table; }

}  // namespace anymamba
