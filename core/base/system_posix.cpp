// What Linux and macOS share.
#include <pthread.h>
#include <sys/mman.h>
#include <time.h>

#include <new>

#include "base/system.h"

namespace anymamba {

AtThreadExit::AtThreadExit(void (*forget)(void*)) {
  pthread_key_t key;
  if (pthread_key_create(&key, forget) != 0) throw std::bad_alloc();
  key_ = static_cast<std::uintptr_t>(key);
}

void AtThreadExit::set(void* value) const {
  if (pthread_setspecific(static_cast<pthread_key_t>(key_), value) != 0) throw std::bad_alloc();
}

void after_fork_in_child(void (*function)()) { pthread_atfork(nullptr, nullptr, function); }

std::int64_t thread_time() {
  timespec time{};
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) != 0) return -1;
  return static_cast<std::int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

void* map_memory(std::size_t bytes) {
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
#if defined(MADV_HUGEPAGE)  // Linux; macOS chooses by itself
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return memory;
}

void unmap_memory(void* memory, std::size_t bytes) { munmap(memory, bytes); }

}  // namespace anymamba
