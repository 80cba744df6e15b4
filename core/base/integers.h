// Arithmetic on counts.
#pragma once

#include <cstdint>

#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

ANYMAMBA_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
ANYMAMBA_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
ANYMAMBA_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
ANYMAMBA_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace anymamba::ANYMAMBA_ISA
