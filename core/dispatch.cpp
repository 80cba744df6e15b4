// The choice of an instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

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
bool gains_from_pairs() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const Kernels& choose() {
  if (const char* wanted = std::getenv("ANYMAMBA_ISA"); wanted != nullptr && *wanted != '\0') {
    if (const Kernels* found = kernels_of(wanted)) return *found;
    throw std::runtime_error(std::string("ANYMAMBA_ISA is '") + wanted +
                             "', which this machine does not have; it has" +
                             (has("avx512_bf16") ? " avx512_bf16" : "") +
                             (has("avx512") ? " avx512" : "") + (has("avx2") ? " avx2" : "") +
                             " portable");
  }
  if (const Kernels* found = kernels_of("avx512_bf16"); found != nullptr && gains_from_pairs())
    return *found;
  for (const char* isa : {"avx512", "avx2"})
    if (const Kernels* found = kernels_of(isa)) return *found;
  return portable::table;
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
