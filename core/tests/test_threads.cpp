// The pool of threads: regions, barriers, nested and concurrent calls, changes of size.
#include <algorithm>

#include "tests/regions.h"
#include "base/pace.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

void test_regions() {
  for (const int threads : {1, 2, 3, 4, 7, 2, 1, 4}) {
    Threads::set_count(threads);
    CHECK(Threads::count() == threads, "count is %d, not %d", Threads::count(), threads);
    for (const int at_most : {1, 2, 3, 100}) {
      std::vector<std::atomic<int>> calls(8);
      std::atomic<int> most{0};
      whole_region(
          [&](int worker, int workers, Barrier&) {
            calls[worker].fetch_add(1);
            most.store(workers);
          },
          at_most);
      const int expected = threads < at_most ? threads : at_most;
      CHECK(most.load() == expected, "%d workers, not %d", most.load(), expected);
      for (int worker = 0; worker < 8; ++worker)
        CHECK(calls[worker].load() == (worker < expected ? 1 : 0),
              "worker %d of %d ran %d times", worker, expected,
              calls[worker].load());
    }
    for (const std::int64_t items : {0, 1, 2, 3, 1000})
      CHECK(sums_up(items), "%d threads", threads);
  }
  Threads::set_count(0);
  CHECK(Threads::count() == 1, "a count of 0 is %d", Threads::count());
}

// Plain memory written by one worker and read by another in the next region: what a region
// promises about memory, for the thread sanitizer to look at.
void test_memory() {
  Threads::set_count(4);
  std::vector<std::int64_t> plain(64, 0);
  for (int round = 0; round < 300; ++round) {
    parallel_for(64, [&](std::int64_t i) { plain[i] += i; });
    if (round % 100 == 0) pause_ms(2);  // let them fall asleep
  }
  for (std::size_t i = 0; i < 64; ++i)
    CHECK(plain[i] == static_cast<std::int64_t>(300 * i), "%zu: %lld", i, (long long)plain[i]);
}

void test_barriers() {
  for (const int threads : {2, 3, 4}) {
    Threads::set_count(threads);
    std::vector<int> step(threads, 0);
    std::atomic<int> late{0};
    whole_region([&](int worker, int workers, Barrier& barrier) {
      for (int i = 1; i <= 500; ++i) {
        step[worker] = i;
        if (i % 100 == 0 && worker == i / 100 % workers) pause_ms(3);  // the others fall asleep
        barrier.wait();
        for (const int other : step) late += other != i;
        barrier.wait();
      }
    });
    CHECK(late.load() == 0, "%d times a worker passed before the others came", late.load());
  }
  Threads::set_count(1);
  whole_region([](int, int workers, Barrier& barrier) {
    CHECK(workers == 1, "%d workers", workers);
    barrier.wait();
    barrier.wait();
  });
}

void test_nested() {
  Threads::set_count(4);
  std::atomic<int> inner{0}, shared{0};
  whole_region([&](int, int, Barrier&) {
    whole_region([&](int worker, int workers, Barrier& barrier) {
      barrier.wait();
      inner.fetch_add(1);
      if (workers != 1 || worker != 0) shared.fetch_add(1);
    });
    parallel_for(10, [&](std::int64_t) { inner.fetch_add(1); });
  });
  CHECK(inner.load() == 4 * 11, "%d", inner.load());
  CHECK(shared.load() == 0, "%d nested calls had company", shared.load());
}

void test_many_small() {
  for (const int threads : {2, 4}) {
    Threads::set_count(threads);
    std::int64_t calls = 0;
    for (int i = 0; i < 4000; ++i) {
      std::atomic<int> workers_seen{0};
      whole_region([&](int, int, Barrier&) { workers_seen.fetch_add(1); }, 2 + i % 3);
      calls += workers_seen.load();
      if (i % 1000 == 0) pause_ms(2);
    }
    std::int64_t expected = 0;
    for (int i = 0; i < 4000; ++i) expected += std::min(threads, 2 + i % 3);
    CHECK(calls == expected, "%lld calls, not %lld", (long long)calls, (long long)expected);
  }
}

// Loops and regions in turn: a helper that comes late for a loop must not take it for the region
// behind it, and the loop's body is gone by then.
void test_late_helpers() {
  Threads::set_count(4);
  for (int i = 0; i < 3000; ++i) {
    std::vector<int> done(1 + i % 7, 0);
    parallel_for(static_cast<std::int64_t>(done.size()),
                 [&](std::int64_t item) { ++done[item]; });
    for (const int times : done) CHECK(times == 1, "an item was done %d times", times);
    if (i % 3 != 0) continue;
    std::atomic<int> met{0};
    whole_region([&](int, int, Barrier& barrier) {
      met.fetch_add(1);
      barrier.wait();
      CHECK(met.load() == 4, "%d of 4 met", met.load());
    });
  }
}

// The account of what workers save and what waiting for them costs.
void test_pace() {
  constexpr std::int64_t kMillisecond = 1'000'000;
  Pace pace;
  std::int64_t time = 0;
  CHECK(pace.workers(8, time) == 8, "as many as were asked for");
  pace.note(8, kMillisecond, 9 * kMillisecond, time);
  const int after = pace.workers(8, time);
  CHECK(after == 8 || after == 4, "%d", after);
  for (int i = 0; i < 3; ++i) pace.note(pace.workers(8, time), kMillisecond, 20 * kMillisecond, time);
  CHECK(pace.workers(8, time) == 1, "late workers are left out: %d", pace.workers(8, time));
  CHECK(pace.workers(1, time) == 1, "one is one");
  // After a time twice as many are tried, and if these come in time, more.
  for (const int expected : {2, 4, 8}) {
    time += 4000 * kMillisecond;
    CHECK(pace.workers(8, time) == expected, "%d, not %d", pace.workers(8, time), expected);
    pace.note(expected, kMillisecond, 0, time);
  }
  // One late step does no harm to those that were in time before.
  for (int i = 0; i < 200; ++i) pace.note(8, kMillisecond / 10, 0, time);
  pace.note(8, kMillisecond / 10, 4 * kMillisecond, time);
  CHECK(pace.workers(8, time) == 8, "%d", pace.workers(8, time));
  // A region in which nobody but the caller came tells nothing.
  pace.note(1, kMillisecond, 0, time);
  CHECK(pace.workers(8, time) == 8, "%d", pace.workers(8, time));
}

// Several of the program's own threads, some of them changing the count all the while.
void test_callers() {
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 1000; ++i) {
        if (caller == 0) Threads::set_count(1 + i % 5);
        if (!sums_up(1 + i % 50)) wrong.fetch_add(1);
        if (i % 300 == caller) pause_ms(1);
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(wrong.load() == 0, "%d sums are wrong", wrong.load());
}

}  // namespace

int main() {
  test_pace();
  test_regions();
  test_memory();
  test_barriers();
  test_nested();
  test_many_small();
  test_late_helpers();
  test_callers();
  return finish("threads");
}
