// The compiler's intrinsics for x86, and what all its instruction sets here share.
#pragma once

// GCC 12 warns of the deliberately undefined registers inside its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "base/integers.h"

namespace anymamba::ANYMAMBA_ISA {

ANYMAMBA_INLINE float from_f16(std::uint16_t h) { return _cvtsh_ss(h); }

ANYMAMBA_INLINE std::uint16_t to_f16(float x) {
  return static_cast<std::uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace anymamba::ANYMAMBA_ISA
