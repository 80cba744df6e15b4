// Memory for a work item of a kernel.
#pragma once

#include <cstdint>

#include "base/arena.h"
#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {

// `count` numbers, not initialized, aligned to cache lines and so to vectors.
template <class Number>
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : memory_(bytes(count)) {}
  operator Number*() const { return static_cast<Number*>(memory_.data()); }

  // What it takes of an arena.
  static std::int64_t in_arena(std::int64_t count) { return anymamba::in_arena(bytes(count)); }

 private:
  static std::int64_t bytes(std::int64_t count) {
    return count * static_cast<std::int64_t>(sizeof(Number));
  }

  const ScratchMemory memory_;
};

}  // namespace anymamba::ANYMAMBA_ISA
