#include "base/processor.h"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

namespace anymamba {
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Zeros for what the processor does not know.
Registers cpuid(unsigned leaf, unsigned part = 0) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(unsigned word, int index) { return (word >> index & 1u) != 0; }

// Which registers the system saves when it changes threads (XCR0).
std::uint64_t saved_registers() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

}  // namespace

// The places of the bits: Intel's Software Developer's Manual, volume 2A, CPUID.
X86Features x86_features() {
  constexpr std::uint64_t kHalves = 0x6, kWhole = 0xe6;  // XMM and YMM; with masks and ZMM
  const Registers first = cpuid(1), second = cpuid(7), third = cpuid(7, 1);
  const bool saves = bit(first.c, 27);
  const std::uint64_t saved = saves ? saved_registers() : 0;
  const bool halves = (saved & kHalves) == kHalves, whole = (saved & kWhole) == kWhole;
  X86Features found;
  found.avx2 = halves && bit(second.b, 5);
  found.fma = halves && bit(first.c, 12);
  found.f16c = halves && bit(first.c, 29);
  found.avx_vnni = halves && bit(third.a, 4);
  found.avx512f = whole && bit(second.b, 16);
  found.avx512dq = whole && bit(second.b, 17);
  found.avx512bw = whole && bit(second.b, 30);
  found.avx512vl = whole && bit(second.b, 31);
  found.avx512_vnni = whole && bit(second.c, 11);
  found.avx512_bf16 = whole && bit(third.a, 5);
  found.is_amd = cpuid(0).b == 0x68747541;  // "Auth" of "AuthenticAMD"
  return found;
}

}  // namespace anymamba

#else

namespace anymamba {

X86Features x86_features() { return {}; }

}  // namespace anymamba

#endif
