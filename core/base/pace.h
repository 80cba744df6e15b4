// How many workers pay at present.
//
// With a processor for each, w workers are up to w times as fast as one. Beside other busy processes
// a worker may have no processor for milliseconds while the others wait for it, and a small model
// has some thirty barriers a token: then more workers take longer than fewer.
//
// An account is kept of what the workers save over half as many, less what the caller waits for
// them. Where it is overdrawn, half as many work from then on, until after a time that makes up for
// what was lost twice as many are tried again. So at most a few percent are lost to trying, however
// busy the machine is. What was saved before covers a single late step on an idle machine.
#pragma once

#include <algorithm>
#include <cstdint>

namespace anymamba {

class Pace {
 public:
  using Nanoseconds = std::int64_t;

  // The number of workers of a region that begins now and has use for `most`.
  int workers(int most, Nanoseconds now) {
    if (limit_ < most && now >= retry_) {
      limit_ *= 2;
      balance_ = 0;
      retry_ = now + kTrial;
    }
    return std::min(limit_, most);
  }

  // Whether it matters how long a region worked and not only that nobody came late.
  bool is_watchful() const { return balance_ < kMostCredit; }

  // A region has ended: `came` workers took part, the caller worked so long and waited so long.
  void note(int came, Nanoseconds worked, Nanoseconds waited, Nanoseconds now) {
    const int fewer = std::max(1, came / 2);
    balance_ = std::min(kMostCredit, balance_ + worked * (came - fewer) / fewer - waited);
    if (balance_ >= 0 || came == 1) return;
    limit_ = fewer;
    retry_ = now + std::clamp(-balance_ * kHoldPerLoss, kLeastHold, kMostHold);
    balance_ = 0;
  }

  int limit() const { return limit_; }

 private:
  static constexpr Nanoseconds kMillisecond = 1'000'000;
  static constexpr Nanoseconds kMostCredit = 10 * kMillisecond;  // a few late steps
  static constexpr Nanoseconds kTrial = 5 * kMillisecond;  // with twice as many, before four times
  static constexpr Nanoseconds kHoldPerLoss = 40;  // loses 2.5 percent
  static constexpr Nanoseconds kLeastHold = 20 * kMillisecond, kMostHold = 3000 * kMillisecond;

  int limit_ = 1 << 20;
  Nanoseconds balance_ = kMostCredit / 2;
  Nanoseconds retry_ = 0;
};

}  // namespace anymamba
