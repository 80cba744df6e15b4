// One pool of threads for all kernels.
//
// A worker that runs out of work spins briefly, then yields, then sleeps: pure spinning collapses
// beside another busy process. The pool is made at first use, again in a child after fork, and
// grows when more threads are wanted. A call from a second program thread while the pool is busy,
// or from inside a region, runs on the calling thread alone; results never depend on the number of
// threads. Beside other busy processes, where waiting for workers takes longer than they save, fewer
// take part for a while. A body must not throw, and a region must not fork.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace anymamba {

class WaitQueue;

// All workers of a region meet here. Reusable. It keeps the time that the thread which made it, the
// caller of the region, waits for the others.
class Barrier {
 public:
  Barrier(int members, WaitQueue* queue)
      : members_(members), queue_(queue), caller_(std::this_thread::get_id()) {}
  void wait() { wait([] {}); }

  // Calls `meanwhile` again and again until the others come.
  template <class Meanwhile>
  void wait(const Meanwhile& meanwhile) {
    const unsigned generation = generation_.load();
    if (last_to_arrive()) return;
    for (int i = 0; i < kPatience && generation_.load() == generation; ++i) meanwhile();
    sleep_through(generation);
  }

  // Nanoseconds, without waits that were short.
  std::int64_t caller_waited() const { return caller_waited_; }

 private:
  static constexpr int kPatience = 4096;

  bool last_to_arrive();
  void sleep_through(unsigned generation);

  const int members_;
  WaitQueue* const queue_;  // where they sleep when the others take long
  const std::thread::id caller_;
  std::int64_t caller_waited_ = 0;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
};

class Threads {
 public:
  using Body = void (*)(void* context, int worker, int workers, Barrier& barrier);

  // How many threads run a region at most, the caller included. 1 or more.
  static int count();
  static void set_count(int threads);

  // Runs body(context, worker, workers, barrier) on every worker at once, the caller being
  // worker 0, and returns when all are done. `at_most` limits the number of workers; beside other
  // busy processes there may be fewer.
  static void region(Body body, void* context, int at_most);

  // The same for a body that hands out its work as it goes and uses no barrier: workers that have
  // not come by the time the caller returns from it are left out. Beside other busy processes a
  // worker may need milliseconds to come.
  static void loop(Body body, void* context, int at_most);

  // How many workers a region has at most at present, and a way to forget why: for tests.
  static int at_present();
  static void forget_lateness();
};

// Rows [first, last).
struct RowRange {
  std::int64_t first, last;
};

// A worker's share of `count` rows, in units of 16 so that workers do not share cache lines.
inline RowRange share(std::int64_t count, int worker, int workers, std::int64_t unit = 16) {
  const std::int64_t units = (count + unit - 1) / unit;
  const auto border = [&](int w) {
    const std::int64_t row = units * w / workers * unit;
    return row < count ? row : count;
  };
  return {border(worker), border(worker + 1)};
}

// Calls body(worker, workers, barrier) on every worker at once.
template <class F>
inline void parallel_region(const F& body, int at_most = 1 << 20) {
  Threads::region(
      [](void* context, int worker, int workers, Barrier& barrier) {
        (*static_cast<const F*>(context))(worker, workers, barrier);
      },
      const_cast<F*>(&body), at_most);
}

// Calls body(item) for each item in [0, items), in any order and on any worker.
template <class F>
inline void parallel_for(std::int64_t items, const F& body) {
  if (items <= 0) return;
  std::atomic<std::int64_t> next{0};
  auto work = [&] {
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i);
  };
  Threads::loop(
      [](void* context, int, int, Barrier&) { (*static_cast<decltype(work)*>(context))(); }, &work,
      static_cast<int>(items < (1 << 20) ? items : (1 << 20)));
}

}  // namespace anymamba
