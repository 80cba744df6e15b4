// The kernels of one instruction set, and the choice among those this machine has.
#pragma once

#include "kernels/conv.h"
#include "kernels/gemm.h"
#include "kernels/norm.h"
#include "kernels/quantized.h"
#include "kernels/scan.h"
#include "kernels/ssd.h"

namespace anymamba {

struct Kernels {
  const char* isa;
#define ANYMAMBA_KERNEL(name, ...) void (*name)(__VA_ARGS__);
#include "kernels/kernels.def"
};

// The best instruction set that this machine has, or the one that ANYMAMBA_ISA names.
// Throws std::runtime_error if that one is unknown or not available.
const Kernels& kernels();

// Makes kernels() return those of another instruction set from now on; false where it is missing.
bool use_isa(const char* isa);

// The names of the instruction sets that this machine has, the best first; null behind the last.
const char* const* isas();

#if defined(ANYMAMBA_ISA)
namespace ANYMAMBA_ISA {
#define ANYMAMBA_KERNEL(name, ...) void name(__VA_ARGS__);
#include "kernels/kernels.def"
}  // namespace ANYMAMBA_ISA
#endif

}  // namespace anymamba
