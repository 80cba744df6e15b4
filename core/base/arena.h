// Memory for the work of kernels, taken before workers begin.
//
// A worker must not throw, and a state must not be left half advanced. So whoever starts workers
// takes their memory beforehand, where a lack of it can be told to the caller, and gives each of
// them an arena. What a worker then asks for comes out of its arena.
#pragma once

#include <cstdint>

#include "base/threads.h"

namespace anymamba {

// A block of memory that is handed out from its beginning and taken back from its end. An arena
// without memory of its own only counts what would be handed out.
class Arena {
 public:
  Arena() = default;
  Arena(void* memory, std::int64_t bytes);
  // Aligned to cache lines; null where there is no room.
  void* take(std::int64_t bytes);
  float* floats(std::int64_t count);
  // The last of what was taken.
  void give_back(void* memory);
  std::int64_t used() const;
  std::int64_t room() const;

 private:
  std::uintptr_t first_ = 0, next_ = 0, last_ = ~std::uintptr_t{0};
};

// Lets the scratch memory of this thread come out of `arena`.
class UseArena {
 public:
  explicit UseArena(Arena& arena);
  ~UseArena();
  UseArena(const UseArena&) = delete;
  UseArena& operator=(const UseArena&) = delete;

 private:
  Arena* const before_;
};

// Uninitialized memory, aligned to cache lines, for as long as this lives: out of this thread's
// arena, or of the heap where there is no room. Throws std::bad_alloc.
class ScratchMemory {
 public:
  explicit ScratchMemory(std::int64_t bytes);
  ~ScratchMemory();
  ScratchMemory(const ScratchMemory&) = delete;
  ScratchMemory& operator=(const ScratchMemory&) = delete;
  void* data() const { return data_; }

 private:
  Arena* arena_;  // null: it is from the heap
  void* data_ = nullptr;
};

// What `bytes` take in an arena.
std::int64_t in_arena(std::int64_t bytes);

// Gives this thread an arena with room for `bytes`, which it keeps until it ends. Nothing is done
// where the arena in use is another's, where part of it is in use, or for very much memory, which is
// better returned. Throws std::bad_alloc.
void reserve_scratch(std::int64_t bytes);

// Arenas of `bytes` each for a number of workers.
class WorkerArenas {
 public:
  WorkerArenas(int workers, std::int64_t bytes);
  Arena of(int worker) const;

 private:
  const std::int64_t stride_;
  const ScratchMemory memory_;
};

// parallel_for with `bytes` of scratch memory for each worker.
template <class F>
inline void parallel_for(std::int64_t items, std::int64_t bytes, const F& body) {
  if (items <= 0) return;
  const int most = Threads::count();
  const int workers = items < most ? static_cast<int>(items) : most;
  const WorkerArenas arenas(workers, bytes);
  std::int64_t next = 0;
  auto work = [&](int worker) {
    Arena arena = arenas.of(worker);
    const UseArena use(arena);
    for (std::int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) body(i);
  };
  Threads::loop(
      [](void* context, int worker, int, Barrier&) {
        (*static_cast<decltype(work)*>(context))(worker);
      },
      &work, workers);
}

// parallel_region with `bytes` of scratch memory for each worker: body(worker, workers, barrier,
// arena).
template <class F>
inline void parallel_region(std::int64_t bytes, const F& body, int at_most) {
  const int most = Threads::count();
  const int workers = at_most < most ? at_most : most;
  const WorkerArenas arenas(workers, bytes);
  parallel_region(
      [&](int worker, int crew, Barrier& barrier) {
        Arena arena = arenas.of(worker);
        const UseArena use(arena);
        body(worker, crew, barrier, arena);
      },
      workers);
}

}  // namespace anymamba
