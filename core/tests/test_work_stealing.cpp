// Rows that workers compute together: each once, whoever is slow.
#include "base/work_stealing.h"

#include "tests/regions.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

constexpr std::int64_t kRowBytes = 8 << 10;  // so that a share of 256 rows is 16 blocks

std::atomic<int> blocks_of_slow{0};

void slow_down_worker_1(int worker) {
  if (worker != 1) return;
  ++blocks_of_slow;
  pause_ms(5);
}

void test_each_row_once() {
  for (const int threads : {1, 2, 3, 5}) {
    Threads::set_count(threads);
    for (const std::int64_t count : {0, 1, 15, 16, 17, 100, 1000, 5003}) {
      Shares shares(threads);
      std::vector<std::atomic<int>> times(static_cast<std::size_t>(count));
      constexpr int kSteps = 50;
      whole_region([&](int worker, int workers, Barrier& barrier) {
        SharedRows rows(shares, worker, workers);
        for (int step = 1; step <= kSteps; ++step) {
          const std::int64_t unit = step % 2 == 0 ? 4 : 16, bytes = kRowBytes << step % 5;
          rows.for_blocks(count, bytes, [&](RowRange some) {
            CHECK(some.first % unit == 0 && some.first < some.last, "rows from %d", static_cast<int>(some.first));
            for (std::int64_t row = some.first; row < some.last; ++row) ++times[static_cast<std::size_t>(row)];
          }, unit);
          barrier.wait();
          for (const auto& done : times)
            CHECK(done == step, "a row was computed %d times in %d steps", done.load(), step);
          barrier.wait();
        }
      });
    }
  }
}

void test_slow_worker() {
  constexpr int kThreads = 4, kSteps = 10, kBlocks = 16;
  Threads::set_count(kThreads);
  Shares shares(kThreads);
  blocks_of_slow = 0;
  std::atomic<int> blocks{0};
  Shares::before_block = slow_down_worker_1;
  whole_region([&](int worker, int workers, Barrier& barrier) {
    SharedRows rows(shares, worker, workers);
    for (int step = 0; step < kSteps; ++step) {
      rows.for_blocks(256 * kThreads, kRowBytes, [&](RowRange) { ++blocks; });
      barrier.wait();
    }
  });
  Shares::before_block = nullptr;
  CHECK(blocks == kThreads * kSteps * kBlocks, "%d blocks", blocks.load());
  // Alone it would be 16 a step.
  CHECK(blocks_of_slow <= 4 * kSteps, "the slow worker took %d blocks", blocks_of_slow.load());
}

// Where all are equally fast, nearly every block is computed by the worker that had it before.
void test_own_share_first() {
  Threads::set_count(2);
  Shares shares(2);
  std::atomic<int> own{0}, all{0};
  whole_region([&](int worker, int workers, Barrier& barrier) {
    SharedRows rows(shares, worker, workers);
    for (int step = 0; step < 20; ++step) {
      const RowRange mine = rows.mine(512);
      barrier.wait();
      rows.for_blocks(512, kRowBytes, [&](RowRange some) {
        pause_ms(1);
        ++all;
        own += mine.first <= some.first && some.last <= mine.last;
      });
    }
  });
  CHECK(own > all * 2 / 3, "%d of %d blocks", own.load(), all.load());
}

}  // namespace

int main() {
  test_each_row_once();
  test_slow_worker();
  test_own_share_first();
  return finish("work stealing");
}
