// The choice of an instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace anymamba {
namespace {

std::atomic<const Kernels*> chosen{nullptr};

bool has(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(isa, "avx512_bf16") == 0) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "avx2") == 0) return avx2;
#endif
  return std::strcmp(isa, "portable") == 0;
}

// Whether products of bfloat16 pairs outrun those of float32. On Intel's processors they do not.
// Nothing but speed follows from it: pairs are multiplied where both operands are bfloat16.
bool gains_from_pairs() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

struct Names {
  const char* all[5] = {};  // null behind the last

  Names() {
    const char** next = all;
    const bool pairs = gains_from_pairs();
    for (const char* isa : {pairs ? "avx512_bf16" : "avx512", pairs ? "avx512" : "avx512_bf16", "avx2",
                            "portable"})
      if (has(isa)) *next++ = isa;
  }
};

const Kernels& choose() {
  const char* wanted = std::getenv("ANYMAMBA_ISA");
  if (wanted == nullptr || *wanted == '\0') return *kernels_of(isas()[0]);
  if (const Kernels* found = kernels_of(wanted)) return *found;
  std::string message = std::string("ANYMAMBA_ISA is '") + wanted +
                        "', which this machine does not have; it has";
  for (const char* const* isa = isas(); *isa != nullptr; ++isa) message += std::string(" ") + *isa;
  throw std::runtime_error(message);
}

}  // namespace

const Kernels* kernels_of(const char* isa) {
  if (!has(isa)) return nullptr;
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512_bf16") == 0) return &avx512_bf16::table;
  if (std::strcmp(isa, "avx512") == 0) return &avx512::table;
  if (std::strcmp(isa, "avx2") == 0) return &avx2::table;
#endif
  return &portable::table;
}

const char* const* isas() {
  static const Names names;
  return names.all;
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = &choose();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

bool use_isa(const char* isa) {
  const Kernels* found = kernels_of(isa);
  if (found == nullptr) return false;
  chosen.store(found, std::memory_order_release);
  return true;
}

}  // namespace anymamba
