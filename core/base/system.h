// What the core asks of the operating system. Each system has a file of its own, system_*.cpp, and
// nothing else in the core calls one: the rest is standard C++.
#pragma once

#include <cstddef>
#include <cstdint>

namespace anymamba {

// Calls a function with a thread's own value when the thread ends. Made once and never destroyed,
// for threads may outlive the program's static objects.
class AtThreadExit {
 public:
  explicit AtThreadExit(void (*forget)(void* value));  // throws std::bad_alloc
  void set(void* value) const;                         // of this thread; throws std::bad_alloc

 private:
  std::uintptr_t key_;
};

// Has the child of each fork call `function` first of all, where the system has forks.
void after_fork_in_child(void (*function)());

// Nanoseconds that this thread has computed, without the time in which others had its processor; -1
// where the system does not tell to some microseconds.
std::int64_t thread_time();

// How many processors this process may run on, 1 or more.
int allowed_processors();

// Of these, how many are fast: without the efficiency cores of laptops and phones. 1 or more.
int performance_processors();

// Zeros in pages of their own, large ones where the system has them to give; null for lack of memory.
void* map_memory(std::size_t bytes);
void unmap_memory(void* memory, std::size_t bytes);

// What this processor has beyond 64-bit Arm's first version; nothing on other processors.
struct ArmFeatures {
  bool dotprod = false, fp16 = false;  // Armv8.2
  bool i8mm = false, bf16 = false;     // Armv8.6
};
ArmFeatures arm_features();

}  // namespace anymamba
