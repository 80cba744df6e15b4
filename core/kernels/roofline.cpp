#include "kernels/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "base/threads.h"
#include "kernels/kernels.h"

namespace anymamba {
namespace {

// 64 bytes at a time, with the next page asked for ahead. Data stay in the outer caches if they fit,
// as a model's weights do.
std::uint64_t read_all(const std::uint64_t* data, std::int64_t count) {
  typedef std::uint64_t V __attribute__((vector_size(64)));
  V sums[4] = {};
  std::int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    __builtin_prefetch(data + i + 512, 0, 2);
    __builtin_prefetch(data + i + 520, 0, 2);
    __builtin_prefetch(data + i + 528, 0, 2);
    __builtin_prefetch(data + i + 536, 0, 2);
    for (int j = 0; j < 4; ++j) {
      V v;
      __builtin_memcpy(&v, data + i + 8 * j, sizeof v);
      sums[j] ^= v;
    }
  }
  const V all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  std::uint64_t total = 0;
  for (int j = 0; j < 8; ++j) total ^= all[j];
  for (; i < count; ++i) total ^= data[i];
  return total;
}

// What work(worker, workers) counts on all threads together, a second; the best of the repeats.
template <class Work>
double best_rate(int repeats, const Work& work) {
  double best = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    std::atomic<std::int64_t> done = 0;
    const auto start = std::chrono::steady_clock::now();
    parallel_region([&](int worker, int workers, Barrier&) { done += work(worker, workers); });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(done) / took.count());
  }
  return best;
}

// Some milliseconds, so that starting the threads costs nothing beside it.
constexpr std::int64_t kTurns = 1 << 20;

double peak(void (*loop)(std::int64_t, std::int64_t*), int repeats) {
  return best_rate(repeats, [&](int, int) {
    std::int64_t operations = 0;
    loop(kTurns, &operations);
    return operations;
  });
}

}  // namespace

double read_bandwidth(std::int64_t bytes, int repeats) {
  const std::int64_t count = bytes / 8;
  const std::vector<std::uint64_t> buffer(count, 1);
  volatile std::uint64_t sink = 0;
  return best_rate(repeats, [&](int worker, int workers) {
    const std::int64_t first = count * worker / workers, last = count * (worker + 1) / workers;
    sink = sink ^ read_all(buffer.data() + first, last - first);
    return (last - first) * 8;
  });
}

double peak_float_operations(int repeats) { return peak(kernels().fma_loop, repeats); }

double peak_byte_operations(int repeats) { return peak(kernels().dot4_loop, repeats); }

}  // namespace anymamba
