// The choice of an instruction set at run time.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "base/processor.h"
#include "base/system.h"
#include "kernels/kernels.h"

namespace anymamba {

namespace avx512_bf16 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
namespace avx2_vnni { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace neon_i8mm { extern const Kernels table; }
namespace neon_dotprod { extern const Kernels table; }
namespace neon { extern const Kernels table; }
namespace portable { extern const Kernels table; }

namespace {

// Whether AVX-512's form of AVX-VNNI's instruction stands in for it, for tests.
#if defined(ANYMAMBA_EVEX_VNNI)
constexpr bool kEvexVnni = true;
#else
constexpr bool kEvexVnni = false;
#endif

std::atomic<const Kernels*> chosen{nullptr};

// The tables of the instruction sets that this machine has, the best first; null behind the last.
struct Available {
  static constexpr int kMost = 5;  // of one processor
  const Kernels* tables[kMost + 1] = {};
  const char* names[kMost + 1] = {};

  Available() {
    const X86Features x86 = x86_features();
    const ArmFeatures arm = arm_features();
    const bool has_avx2 = x86.avx2 && x86.fma && x86.f16c;
    const bool has_avx512 = has_avx2 && x86.avx512f && x86.avx512bw && x86.avx512dq && x86.avx512vl &&
                            x86.avx512_vnni;
    const bool has_vnni = kEvexVnni ? has_avx512 : has_avx2 && x86.avx_vnni;
    const bool has_pairs = has_avx512 && x86.avx512_bf16;
    const bool has_dotprod = arm.dotprod && arm.fp16, has_i8mm = has_dotprod && arm.i8mm && arm.bf16;
    // Products of bfloat16 pairs outrun those of float32 on AMD's processors, not on Intel's. Only
    // speed follows from it: pairs are multiplied where both operands are bfloat16.
    const bool gains_from_pairs = x86.is_amd;
    int count = 0;
    const auto add = [&](const Kernels& table, bool has) {
      if (has) tables[count] = &table, names[count++] = table.isa;
    };
    if constexpr (ANYMAMBA_BUILDS_avx512_bf16) add(avx512_bf16::table, has_pairs && gains_from_pairs);
    if constexpr (ANYMAMBA_BUILDS_avx512) add(avx512::table, has_avx512);
    if constexpr (ANYMAMBA_BUILDS_avx512_bf16) add(avx512_bf16::table, has_pairs && !gains_from_pairs);
    if constexpr (ANYMAMBA_BUILDS_avx2_vnni) add(avx2_vnni::table, has_vnni);
    if constexpr (ANYMAMBA_BUILDS_avx2) add(avx2::table, has_avx2);
    if constexpr (ANYMAMBA_BUILDS_neon_i8mm) add(neon_i8mm::table, has_i8mm);
    if constexpr (ANYMAMBA_BUILDS_neon_dotprod) add(neon_dotprod::table, has_dotprod);
    if constexpr (ANYMAMBA_BUILDS_neon) add(neon::table, true);
    if constexpr (ANYMAMBA_BUILDS_portable) add(portable::table, true);
  }

  // By name; null where this machine or this build does not have it.
  const Kernels* find(const char* isa) const {
    for (const Kernels* const* table = tables; *table != nullptr; ++table)
      if (std::strcmp((*table)->isa, isa) == 0) return *table;
    return nullptr;
  }
};

const Available& available() {
  static const Available found;
  return found;
}

const Kernels& choose() {
  const char* wanted = std::getenv("ANYMAMBA_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available().tables[0];
  if (const Kernels* found = available().find(wanted)) return *found;
  std::string message = std::string("ANYMAMBA_ISA is '") + wanted +
                        "', which this machine does not have; it has";
  for (const char* const* isa = isas(); *isa != nullptr; ++isa) message += std::string(" ") + *isa;
  throw std::runtime_error(message);
}

}  // namespace

const char* const* isas() { return available().names; }

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = &choose();
    chosen.store(table, std::memory_order_release);
  }
  return *table;
}

bool use_isa(const char* isa) {
  const Kernels* found = available().find(isa);
  if (found != nullptr) chosen.store(found, std::memory_order_release);
  return found != nullptr;
}

}  // namespace anymamba
