// Rows that the workers of a region compute together between two barriers, so that a slow worker, on
// an efficiency core or beside another busy process, keeps the others waiting for a block of rows and
// not for its whole share.
//
// Each worker has a share, the same at every call: its caches may still hold that part of the weights.
// It takes blocks from the front of its share; when none are left, from the ends of the others' shares.
// A block's rows do not depend on who computes them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "base/threads.h"

namespace anymamba {

// What is left of each worker's share.
class Shares {
 public:
  explicit Shares(int workers) : left_(static_cast<std::size_t>(workers)) {}

  // Called before each block by who takes it, if there is one: for tests.
  static inline std::atomic<void (*)(int worker)> before_block{nullptr};

 private:
  friend class SharedRows;

  // On a line of its own, for its owner takes most of the blocks.
  struct alignas(64) Left {
    std::atomic<std::uint64_t> word{0};  // step << 16 | first block left << 8 | the one behind the last
  };

  std::vector<Left> left_;
};

// One worker's access to the shares of a region. All workers take the same steps in the same order,
// with a barrier between one and the next.
class SharedRows {
 public:
  SharedRows(Shares& shares, int worker, int workers) : shares_(shares), worker_(worker), workers_(workers) {}

  RowRange mine(std::int64_t count, std::int64_t unit = 16) const {
    return share(count, worker_, workers_, unit);
  }

  // Calls f(rows) for blocks of [0, count), until none are left. A row takes reading so many bytes;
  // borders are multiples of `unit`.
  template <class F>
  void for_blocks(std::int64_t count, std::int64_t row_bytes, const F& f, std::int64_t unit = 16) {
    ++step_;
    if (count == 0) return;
    if (workers_ == 1) return f(RowRange{0, count});
    for (int i = 0; i < workers_; ++i) {
      const int owner = (worker_ + i) % workers_;
      const RowRange rows = share(count, owner, workers_, unit);
      const int blocks = blocks_of(rows.last - rows.first, row_bytes, unit);
      for (int block; (block = take(owner, blocks)) >= 0;) {
        if (auto* const call = Shares::before_block.load(std::memory_order_relaxed)) call(worker_);
        const RowRange part = share(rows.last - rows.first, block, blocks, unit);
        f(RowRange{rows.first + part.first, rows.first + part.last});
      }
    }
  }

 private:
  // A block takes some microseconds, beside which taking it costs little; of a large share it is a
  // part that is worth waiting for.
  static constexpr std::int64_t kLeastBytes = 64 << 10, kMostBlocks = 16;

  // Of a share of so many rows.
  static int blocks_of(std::int64_t rows, std::int64_t row_bytes, std::int64_t unit) {
    const std::int64_t units = (rows + unit - 1) / unit;
    const std::int64_t worth = std::max<std::int64_t>(rows * row_bytes / kLeastBytes, 1);
    return static_cast<int>(std::min({units, worth, kMostBlocks}));
  }

  // A block of this step that nobody has taken; -1 if there is none. The barriers order what is
  // written, so that this need not.
  int take(int owner, int blocks) {
    std::atomic<std::uint64_t>& word = shares_.left_[static_cast<std::size_t>(owner)].word;
    std::uint64_t seen = word.load(std::memory_order_relaxed);
    for (;;) {
      const bool fresh = seen >> 16 != step_;  // nobody has taken any yet
      const int first = fresh ? 0 : static_cast<int>(seen >> 8 & 255);
      const int last = fresh ? blocks : static_cast<int>(seen & 255);
      if (first >= last) return -1;
      const bool own = owner == worker_;
      const auto left = static_cast<std::uint64_t>(own ? (first + 1) << 8 | last : first << 8 | (last - 1));
      if (word.compare_exchange_weak(seen, step_ << 16 | left, std::memory_order_relaxed))
        return own ? first : last - 1;
    }
  }

  Shares& shares_;
  const int worker_, workers_;
  std::uint64_t step_ = 0;
};

}  // namespace anymamba
