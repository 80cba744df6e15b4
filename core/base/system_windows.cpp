// Windows.
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>

#include <bit>
#include <chrono>
#include <new>
#include <vector>

#include "base/system.h"

namespace anymamba {
namespace {

using CoreInformation = SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX;

// The processors that this process may run on. Machines with more than 64 have them in groups.
class Allowed {
 public:
  Allowed() {
    if (!GetProcessGroupAffinity(GetCurrentProcess(), &count_, groups_)) count_ = 0;
    DWORD_PTR installed = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &mask_, &installed);
  }

  // Those of a group's processors. Of several groups a process has all.
  KAFFINITY of(const GROUP_AFFINITY& processors) const {
    for (USHORT i = 0; i < count_; ++i)
      if (groups_[i] == processors.Group) return count_ == 1 ? processors.Mask & mask_ : processors.Mask;
    return count_ == 0 ? processors.Mask : 0;
  }

 private:
  static constexpr USHORT kMost = 64;
  USHORT count_ = kMost, groups_[kMost] = {};
  DWORD_PTR mask_ = 0;
};

// Calls f(efficiency class, processors) for each core, with those of its processors that this process
// may run on.
template <class F>
void for_cores(const F& f) {
  const Allowed allowed;
  DWORD bytes = 0;
  GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &bytes);
  std::vector<char> memory(bytes);
  if (bytes == 0 || !GetLogicalProcessorInformationEx(
                        RelationProcessorCore, reinterpret_cast<CoreInformation*>(memory.data()), &bytes))
    return;
  for (DWORD at = 0; at < bytes;) {
    const auto* core = reinterpret_cast<const CoreInformation*>(memory.data() + at);
    const KAFFINITY mask = allowed.of(core->Processor.GroupMask[0]);
    f(static_cast<int>(core->Processor.EfficiencyClass), std::popcount(static_cast<std::uint64_t>(mask)));
    at += core->Size;
  }
}

// What QueryThreadCycleTime counts in a nanosecond, found by a thread that computes all the while: the
// most of a few trials, since in each it may lose its processor. 0 where the system does not count.
double cycles_per_nanosecond() {
  using Clock = std::chrono::steady_clock;
  double most = 0;
  for (int trial = 0; trial < 5; ++trial) {
    ULONG64 first = 0, last = 0;
    const auto start = Clock::now();
    if (!QueryThreadCycleTime(GetCurrentThread(), &first)) return 0;
    while (Clock::now() - start < std::chrono::microseconds(50)) {}
    if (!QueryThreadCycleTime(GetCurrentThread(), &last)) return 0;
    const std::chrono::duration<double, std::nano> took = Clock::now() - start;
    const double rate = static_cast<double>(last - first) / took.count();
    if (rate > most) most = rate;
  }
  return most;
}

}  // namespace

// Fibers' storage, for alone it has a function that is called when a thread ends.
AtThreadExit::AtThreadExit(void (*forget)(void*)) {
  const DWORD key = FlsAlloc(forget);
  if (key == FLS_OUT_OF_INDEXES) throw std::bad_alloc();
  key_ = key;
}

void AtThreadExit::set(void* value) const {
  if (!FlsSetValue(static_cast<DWORD>(key_), value)) throw std::bad_alloc();
}

void after_fork_in_child(void (*)()) {}

// GetThreadTimes counts in steps of 16 milliseconds, which is too coarse.
std::int64_t thread_time() {
  static const double rate = cycles_per_nanosecond();
  ULONG64 cycles = 0;
  if (rate == 0 || !QueryThreadCycleTime(GetCurrentThread(), &cycles)) return -1;
  return static_cast<std::int64_t>(static_cast<double>(cycles) / rate);
}

int allowed_processors() {
  int count = 0;
  for_cores([&](int, int processors) { count += processors; });
  return count < 1 ? 1 : count;
}

int performance_processors() {
  int best = -1, count = 0;
  for_cores([&](int efficiency_class, int processors) {  // the higher, the faster
    if (processors == 0 || efficiency_class < best) return;
    if (efficiency_class > best) count = 0;
    best = efficiency_class;
    count += processors;
  });
  return count < 1 ? 1 : count;
}

void* map_memory(std::size_t bytes) {
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_memory(void* memory, std::size_t) { VirtualFree(memory, 0, MEM_RELEASE); }

ArmFeatures arm_features() {
  ArmFeatures found;
#if defined(__aarch64__)
  // PF_ARM_V82_DP, _V82_I8MM, _V82_FP16 and _V86_BF16_INSTRUCTIONS_AVAILABLE, which older headers lack.
  constexpr DWORD kDotprod = 43, kI8mm = 66, kFp16 = 67, kBf16 = 68;
  found.dotprod = IsProcessorFeaturePresent(kDotprod);
  // Windows before 2024 does not tell; no processor that it runs on has the one without the other.
  found.fp16 = found.dotprod || IsProcessorFeaturePresent(kFp16);
  found.i8mm = IsProcessorFeaturePresent(kI8mm);
  found.bf16 = IsProcessorFeaturePresent(kBf16);
#endif
  return found;
}

}  // namespace anymamba
