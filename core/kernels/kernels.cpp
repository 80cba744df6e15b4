// Compiled once for each instruction set: its table.
#include "kernels/kernels.h"

#include "simd/simd.h"

#define ANYMAMBA_TEXT_OF(x) #x
#define ANYMAMBA_TEXT(x) ANYMAMBA_TEXT_OF(x)

namespace anymamba::ANYMAMBA_ISA {

extern const Kernels table;
const Kernels table = {
    .isa = ANYMAMBA_TEXT(ANYMAMBA_ISA),
#define ANYMAMBA_KERNEL(name, ...) .name = name,
#include "kernels/kernels.def"
};

}  // namespace anymamba::ANYMAMBA_ISA
