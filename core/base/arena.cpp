#include "base/arena.h"

#include <memory>
#include <new>

#include "base/system.h"

namespace anymamba {
namespace {

constexpr std::uintptr_t kLine = 64;
constexpr std::int64_t kMostKept = 128 << 20;

void* from_heap(std::int64_t bytes) {
  return ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{kLine});
}

void to_heap(void* memory) { ::operator delete(memory, std::align_val_t{kLine}); }

// A thread's own memory.
struct Kept {
  void* memory = nullptr;
  Arena arena;
  ~Kept() { to_heap(memory); }
};

// The C library takes a thread's variables from the heap when the thread first uses one, and where
// it lacks memory, ends the program. These are so few that they are part of every thread.
#if defined(__GLIBC__)
#define ANYMAMBA_PART_OF_THREAD [[gnu::tls_model("initial-exec")]]
#else
#define ANYMAMBA_PART_OF_THREAD
#endif
ANYMAMBA_PART_OF_THREAD thread_local Kept* kept = nullptr;
ANYMAMBA_PART_OF_THREAD thread_local Arena* current = nullptr;

// Gives this thread memory to keep, which goes when the thread ends. A thread_local object that is
// destroyed by then would end the program too for lack of memory.
void begin_to_keep() {
  static const AtThreadExit at_exit([](void* memory) { delete static_cast<Kept*>(memory); });
  auto fresh = std::make_unique<Kept>();
  at_exit.set(fresh.get());
  kept = fresh.release();
}

}  // namespace

std::int64_t in_arena(std::int64_t bytes) {
  const auto line = static_cast<std::int64_t>(kLine);
  return bytes < 1 ? line : (bytes + line - 1) / line * line;  // nothing has a place too
}

Arena::Arena(void* memory, std::int64_t bytes)
    : first_(reinterpret_cast<std::uintptr_t>(memory)), next_(first_),
      last_(first_ + static_cast<std::uintptr_t>(bytes)) {}

void* Arena::take(std::int64_t bytes) {
  const auto whole = static_cast<std::uintptr_t>(in_arena(bytes));
  if (whole > last_ - next_) return nullptr;
  void* const memory = reinterpret_cast<void*>(next_);
  next_ += whole;
  return memory;
}

float* Arena::floats(std::int64_t count) { return static_cast<float*>(take(count * 4)); }

void Arena::give_back(void* memory) { next_ = reinterpret_cast<std::uintptr_t>(memory); }

std::int64_t Arena::used() const { return static_cast<std::int64_t>(next_ - first_); }

std::int64_t Arena::room() const { return static_cast<std::int64_t>(last_ - next_); }

UseArena::UseArena(Arena& arena) : before_(current) { current = &arena; }
UseArena::~UseArena() { current = before_; }

ScratchMemory::ScratchMemory(std::int64_t bytes) : arena_(current) {
  if (arena_ != nullptr) data_ = arena_->take(bytes);
  if (data_ != nullptr) return;
  arena_ = nullptr;
  data_ = from_heap(bytes);
}

ScratchMemory::~ScratchMemory() {
  if (arena_ != nullptr) arena_->give_back(data_);
  else to_heap(data_);
}

void reserve_scratch(std::int64_t bytes) {
  if (current != nullptr && (kept == nullptr || current != &kept->arena)) return;
  if (bytes > kMostKept) return;
  if (kept == nullptr) begin_to_keep();
  if (current != nullptr && (kept->arena.room() >= bytes || kept->arena.used() > 0)) return;
  const std::int64_t whole = in_arena(bytes);
  current = nullptr;
  to_heap(kept->memory);
  kept->memory = nullptr;
  kept->memory = from_heap(whole);
  kept->arena = Arena(kept->memory, whole);
  current = &kept->arena;
}

WorkerArenas::WorkerArenas(int workers, std::int64_t bytes)
    : stride_(in_arena(bytes)), memory_((reserve_scratch(workers * stride_), workers * stride_)) {}

Arena WorkerArenas::of(int worker) const {
  return Arena(static_cast<char*>(memory_.data()) + worker * stride_, stride_);
}

}  // namespace anymamba
