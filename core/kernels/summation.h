// The one order in which products of floats are summed over k, so that a row's results do not depend
// on the rows beside it, on the kernel, or on the number of threads: k is cut into equal parts, and
// each part is summed from 0 in the order of k. To the first part's sum the bias is added, then what c
// held if the product is added to it; then come the sums of the other parts.
#pragma once

#include "base/integers.h"
#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

// Of k at a time. A panel of so many steps takes 48 KiB with AVX-512, 24 KiB with AVX2.
inline constexpr std::int64_t kDepth = 384;

// Steps [p, p + depth) of k.
struct Cut {
  std::int64_t p, depth;
};

// The length of the parts; the last may be shorter.
ANYMAMBA_INLINE std::int64_t depth_step_of(std::int64_t k) {
  return round_up(ceil_div(k, larger(1, ceil_div(k, kDepth))), 16);
}

}  // namespace anymamba::ANYMAMBA_ISA
