#include "base/threads.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <vector>

#include "base/pace.h"
#include "base/system.h"

namespace anymamba {

// Where threads sleep until something that they look at has changed.
class WaitQueue {
 public:
  // `done` loads the atomic that will change, in sequential order (the default). The change and
  // wake() are in that order too, so either the sleeper sees the change or wake() sees the sleeper.
  template <class Done>
  void sleep_until(const Done& done) {
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    while (!done()) condition_.wait(lock);
    sleepers_.fetch_sub(1);
  }

  // To be called after the change. Costs one load where nobody sleeps.
  void wake() {
    if (sleepers_.load() == 0) return;
    { const std::lock_guard<std::mutex> lock(mutex_); }  // nobody is between done() and wait()
    condition_.notify_all();
  }

 private:
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable condition_;
};

namespace {

constexpr int kSpins = 2000;
constexpr int kYields = 1000;
constexpr int kMostThreads = 4096;

using Nanoseconds = Pace::Nanoseconds;

Nanoseconds now() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Done>
void wait_until(const Done& done, WaitQueue& queue) {
  for (int i = 0; i < kSpins; ++i) {
    if (done()) return;
    relax();
  }
  for (int i = 0; i < kYields; ++i) {
    if (done()) return;
    std::this_thread::yield();
  }
  queue.sleep_until(done);
}

// The helpers beside the caller. They are never joined and a pool is never freed: threads that
// wait for work may outlive the program's static objects, and a child of fork has no threads.
class Pool {
 public:
  int size() const { return static_cast<int>(queues_.size()) + 1; }

  // Fewer where the system refuses more threads. Throws std::bad_alloc.
  void grow(int threads) {
    if (size() >= threads || refused_) return;
    queues_.reserve(static_cast<std::size_t>(threads));
    while (size() < threads && !refused_) {
      auto queue = std::make_unique<WaitQueue>();
      try {
        std::thread([this, worker = size(), own = queue.get()] { serve(worker, *own); }).detach();
        queues_.push_back(queue.release());
      } catch (const std::system_error&) {
        refused_ = true;
      }
    }
  }

  // How many workers a region has that begins now.
  int workers(int most, Nanoseconds time) { return pace_.workers(most, time); }
  int limit() const { return pace_.limit(); }
  void forget_lateness() { pace_ = Pace(); }

  // With `open`, helpers take part only if they come before the caller is done.
  void run(Threads::Body body, void* context, int workers, bool open, Nanoseconds start) noexcept {
    const Nanoseconds computed_before = pace_.is_watchful() ? thread_time() : -1;
    Barrier barrier(workers, &inside_);
    body_ = body;
    context_ = context;
    barrier_ = &barrier;
    came_.store(1, std::memory_order_relaxed);
    const std::uint64_t region = ++regions_ << kRegionShift;
    const auto all = static_cast<std::uint64_t>(workers);
    crew_.store(region | (open ? 0 : all - 1));
    ticket_.store(region | (open ? kOpen : 0) | all);
    for (int worker = 1; worker < workers; ++worker) queues_[worker - 1]->wake();
    body(context, 0, workers, barrier);
    crew_.fetch_and(kCount);  // nobody enters any more
    const Nanoseconds done = now();
    // Who is still inside, be it inside the barrier, is counted: the barrier outlives its use.
    Nanoseconds end = done;
    if (crew_.load() != 0) {
      wait_until([this] { return crew_.load() == 0; }, inside_);
      end = now();
    }
    const Nanoseconds waited = barrier.caller_waited() + end - done;
    Nanoseconds worked = end - start - waited;
    // A caller that had no processor itself would have had none alone.
    if (computed_before >= 0) worked = std::min(worked, thread_time() - computed_before);
    pace_.note(open ? came_.load(std::memory_order_relaxed) : workers, worked, waited, end);
  }

 private:
  // The words below hold a region's number above a count of workers and one flag.
  static constexpr int kRegionShift = 16;
  static constexpr std::uint64_t kOpen = 1u << 15, kCount = kOpen - 1;

  void serve(int worker, WaitQueue& queue) {
    for (std::uint64_t seen = 0;;) {
      std::uint64_t ticket = 0;
      wait_until(
          [&] {
            ticket = ticket_.load();
            return ticket != seen && worker < static_cast<int>(ticket & kCount);
          },
          queue);
      seen = ticket;
      if ((ticket & kOpen) && !enter(ticket >> kRegionShift)) continue;
      // Counted in: nothing below changes until this worker has counted itself out.
      body_(context_, worker, static_cast<int>(ticket & kCount), *barrier_);
      if ((crew_.fetch_sub(1) & kCount) == 1) inside_.wake();
    }
  }

  bool enter(std::uint64_t region) {
    std::uint64_t crew = crew_.load();
    while (crew >> kRegionShift == region)
      if (crew_.compare_exchange_weak(crew, crew + 1)) {
        came_.fetch_add(1, std::memory_order_relaxed);
        return true;
      }
    return false;
  }

  // On lines of their own, for all spin on them. A helper that the ticket does not count, or that
  // comes too late for an open region, passes over it without being waited for.
  alignas(64) std::atomic<std::uint64_t> ticket_{0};  // the region, open or not, its workers
  alignas(64) std::atomic<std::uint64_t> crew_{0};    // the region while it runs, helpers inside
  std::atomic<int> came_{0};  // the caller and the helpers that entered an open region
  // Written before these words, read by those whom they count.
  alignas(64) Threads::Body body_ = nullptr;
  void* context_ = nullptr;
  Barrier* barrier_ = nullptr;
  // The caller's own.
  std::uint64_t regions_ = 0;
  std::vector<WaitQueue*> queues_;
  bool refused_ = false;
  Pace pace_;
  // For waiting inside a region: at its barrier, or for its end.
  WaitQueue inside_;
};

// Not a mutex: a nested call finds it taken by its own thread, and a child of fork frees it.
std::atomic<bool> busy{false};
Pool* pool = nullptr;
std::atomic<int> wanted{0};

void forget_in_child() {
  pool = nullptr;
  busy.store(false);
}

// Before any pool exists, so that no fork can come between.
[[maybe_unused]] const bool registered = (after_fork_in_child(forget_in_child), true);

}  // namespace

bool Barrier::last_to_arrive() {
  if (arrived_.fetch_add(1) != members_ - 1) return false;
  arrived_.store(0, std::memory_order_relaxed);  // seen by all who see the new generation
  generation_.fetch_add(1);
  if (queue_ != nullptr) queue_->wake();
  return true;
}

void Barrier::sleep_through(unsigned generation) {
  const auto passed = [&] { return generation_.load() != generation; };
  if (passed()) return;
  const bool is_caller = caller_ == std::this_thread::get_id();
  const Nanoseconds start = is_caller ? now() : 0;
  wait_until(passed, *queue_);
  if (is_caller) caller_waited_ += now() - start;
}

int Threads::count() {
  int threads = wanted.load(std::memory_order_relaxed);
  if (threads == 0) {
    const int found = performance_processors();
    threads = wanted.compare_exchange_strong(threads, found) ? found : threads;
  }
  return threads;
}

void Threads::set_count(int threads) {
  wanted.store(threads < 1 ? 1 : threads < kMostThreads ? threads : kMostThreads);
}

namespace {

// Holds the pool for a call, if it is free.
class Hold {
 public:
  Hold() : held_(!busy.exchange(true, std::memory_order_acquire)) {}
  ~Hold() {
    if (held_) busy.store(false, std::memory_order_release);
  }
  Hold(const Hold&) = delete;
  Hold& operator=(const Hold&) = delete;
  explicit operator bool() const { return held_; }

 private:
  const bool held_;
};

// The pool with as many of `workers` as there are threads to be had; null for lack of memory.
Pool* pool_with(int& workers) {
  try {
    if (pool == nullptr) pool = new Pool;
    pool->grow(workers);
  } catch (const std::bad_alloc&) {
    if (pool == nullptr) return nullptr;
  }
  workers = std::min(workers, pool->size());
  return pool;
}

void run_alone(Threads::Body body, void* context) {
  Barrier alone(1, nullptr);
  body(context, 0, 1, alone);
}

void start(Threads::Body body, void* context, int at_most, bool open) {
  int workers = std::min(Threads::count(), at_most);
  if (workers <= 1) return run_alone(body, context);
  const Hold held;
  if (!held) return run_alone(body, context);
  const Nanoseconds time = now();
  if (pool != nullptr) workers = pool->workers(workers, time);
  Pool* const found = workers > 1 ? pool_with(workers) : nullptr;
  if (found == nullptr || workers <= 1) return run_alone(body, context);
  found->run(body, context, workers, open, time);
}

}  // namespace

void Threads::region(Body body, void* context, int at_most) {
  start(body, context, at_most, false);
}

void Threads::loop(Body body, void* context, int at_most) { start(body, context, at_most, true); }

int Threads::at_present() {
  const Hold held;
  return held && pool != nullptr ? std::min(count(), pool->limit()) : count();
}

void Threads::forget_lateness() {
  const Hold held;
  if (held && pool != nullptr) pool->forget_lateness();
}

}  // namespace anymamba
