// Numbers below 1.2e-38, which processors compute with many times more slowly than with others. A
// scan meets them by the thousand: in states that fade, and in gradients that go back through them.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace anymamba {

// While it lives, its thread reads and writes such numbers as zeros. Each worker of a scan has one,
// so that results depend neither on the worker nor on what the caller's thread is set to.
class SubnormalsAreZeros {
 public:
  SubnormalsAreZeros() : before_(control()) { set_control(before_ | kFlags); }
  ~SubnormalsAreZeros() { set_control(before_); }
  SubnormalsAreZeros(const SubnormalsAreZeros&) = delete;
  SubnormalsAreZeros& operator=(const SubnormalsAreZeros&) = delete;

 private:
#if defined(__SSE__)
  static constexpr std::uint64_t kFlags = 0x8040;  // of what is written, of what is read
  static std::uint64_t control() { return _mm_getcsr(); }
  static void set_control(std::uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
  static constexpr std::uint64_t kFlags = 1u << 24;
  static std::uint64_t control() {
    std::uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(std::uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  static constexpr std::uint64_t kFlags = 0;
  static std::uint64_t control() { return 0; }
  static void set_control(std::uint64_t) {}
#endif

  const std::uint64_t before_;
};

}  // namespace anymamba
