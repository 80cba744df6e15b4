// Memory for one piece of a kernel's work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "simd.h"

namespace anymamba::ANYMAMBA_ISA {

// `count` numbers, not initialized, aligned to cache lines and so to vectors.
template <class Number>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<Number*>(::operator new(
            static_cast<std::size_t>(count) * sizeof(Number), std::align_val_t{64}))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t{64}); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator Number*() const { return data_; }

 private:
  Number* data_;
};

}  // namespace anymamba::ANYMAMBA_ISA
