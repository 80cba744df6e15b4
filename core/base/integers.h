// Arithmetic on counts.
#pragma once

#include <cstdint>

// Internal to each file, so that no function built for one instruction set is linked into another.
#define ANYMAMBA_INLINE static inline __attribute__((always_inline))

namespace anymamba {

ANYMAMBA_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
ANYMAMBA_INLINE std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
ANYMAMBA_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
ANYMAMBA_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace anymamba
