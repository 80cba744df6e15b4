// What the tests of the pool of threads share.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "tests/check.h"

namespace anymamba::test {

// A region of as many workers as were asked for, however late they came before.
template <class F>
void whole_region(const F& body, int at_most = 1 << 20) {
  Threads::forget_lateness();
  parallel_region(body, at_most);
}

inline void pause_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Sums 1 to n over the workers; wrong if an item is lost or done twice.
inline bool sums_up(std::int64_t n) {
  std::atomic<std::int64_t> total{0};
  parallel_for(n, [&](std::int64_t i) { total.fetch_add(i + 1); });
  return total.load() == n * (n + 1) / 2;
}

}  // namespace anymamba::test
