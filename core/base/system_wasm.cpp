// WebAssembly without threads: one thread that never ends, one processor, no forks.
#include <cstdlib>
#include <cstring>

#include "base/system.h"

namespace anymamba {

AtThreadExit::AtThreadExit(void (*)(void*)) : key_(0) {}

void AtThreadExit::set(void*) const { static_cast<void>(key_); }

void after_fork_in_child(void (*)()) {}

std::int64_t thread_time() { return -1; }

int allowed_processors() { return 1; }

int performance_processors() { return 1; }

void* map_memory(std::size_t bytes) {
  constexpr std::size_t kLine = 64;
  const std::size_t whole = (bytes + kLine - 1) / kLine * kLine;
  void* const memory = std::aligned_alloc(kLine, whole);
  return memory == nullptr ? nullptr : std::memset(memory, 0, whole);
}

void unmap_memory(void* memory, std::size_t) { std::free(memory); }

ArmFeatures arm_features() { return {}; }

}  // namespace anymamba
