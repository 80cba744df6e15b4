// Linux and Android, beside system_posix.cpp.
#include <sched.h>

#include <thread>
#include <vector>

#include "base/linux_processors.h"
#include "base/system.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace anymamba {
namespace {

// The numbers of the processors that this process may run on.
std::vector<int> allowed() {
  std::vector<int> found;
  // The kernel refuses a mask with room for fewer processors than it was built for.
  for (int room = CPU_SETSIZE; room <= CPU_SETSIZE * 64; room *= 4) {
    std::vector<cpu_set_t> mask(static_cast<std::size_t>(room / CPU_SETSIZE));
    const std::size_t bytes = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) != 0) continue;
    for (int cpu = 0; cpu < room; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, mask.data())) found.push_back(cpu);
    break;
  }
  return found;
}

int or_all(std::size_t found) {
  if (found != 0) return static_cast<int>(found);
  const unsigned all = std::thread::hardware_concurrency();
  return all == 0 ? 1 : static_cast<int>(all);
}

}  // namespace

int allowed_processors() { return or_all(allowed().size()); }

int performance_processors() { return or_all(fast_processors("/sys/devices", allowed()).size()); }

ArmFeatures arm_features() {
  ArmFeatures found;
#if defined(__aarch64__)
  // The kernel's numbers, which older headers lack.
  constexpr unsigned long kAsimdHp = 1ul << 10, kAsimdDp = 1ul << 20;  // AT_HWCAP
  constexpr unsigned long kI8mm = 1ul << 13, kBf16 = 1ul << 14;        // AT_HWCAP2
  const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  found.fp16 = first & kAsimdHp;
  found.dotprod = first & kAsimdDp;
  found.i8mm = second & kI8mm;
  found.bf16 = second & kBf16;
#endif
  return found;
}

}  // namespace anymamba
