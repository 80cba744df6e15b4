// What the tests share: CHECK, random numbers, and conversions written apart from the kernels'.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "base/threads.h"

namespace anymamba::test {

using std::int64_t;

inline int failures = 0;

// Says what failed, with the values that printf's arguments name. The first 20 times.
#define CHECK(condition, ...)                                   \
  do {                                                          \
    if (!(condition) && ++::anymamba::test::failures <= 20) {   \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                 \
      std::printf("\n");                                        \
    }                                                           \
  } while (0)

// What main returns.
inline int finish(const char* name) {
  if (failures == 0) std::printf("%s (%s): passed\n", name, kernels().isa);
  else std::printf("%s (%s): %d failed\n", name, kernels().isa, failures);
  return failures == 0 ? 0 : 1;
}

// What run() returns on one thread, after a check that it returns the same on more.
template <class Run>
auto on_any_threads(const std::string& what, const Run& run) {
  Threads::set_count(1);
  const auto result = run();
  for (const int threads : {2, 4}) {
    Threads::set_count(threads);
    CHECK(run() == result, "%s: %d threads give something else", what.c_str(), threads);
  }
  return result;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 2654435769u + 88172645463325252u) {}
  std::uint64_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return state_;
  }
  // In [-1, 1).
  double number() { return static_cast<double>(next() >> 11) / 4503599627370496.0 - 1.0; }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() >> 33) % n; }

 private:
  std::uint64_t state_;
};

inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A binary format with `exponent` and `mantissa` bits, by its definition.
struct Format {
  int exponent, mantissa;

  int bias() const { return (1 << (exponent - 1)) - 1; }
  std::uint32_t infinity() const { return ((1u << exponent) - 1u) << mantissa; }

  double value(std::uint32_t bits) const {
    const double sign = bits >> (exponent + mantissa) & 1u ? -1 : 1;
    const int field = static_cast<int>(bits >> mantissa & ((1u << exponent) - 1u));
    const std::uint32_t below = bits & ((1u << mantissa) - 1u);
    const double fraction = std::ldexp(static_cast<double>(below), -mantissa);
    if (field == (1 << exponent) - 1)
      return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                           : sign * std::numeric_limits<double>::infinity();
    return field == 0 ? sign * std::ldexp(fraction, 1 - bias())
                      : sign * std::ldexp(1 + fraction, field - bias());
  }

  // The nearest, ties to even; NaN is not for this.
  std::uint32_t nearest(double x) const {
    const std::uint32_t sign = std::signbit(x) ? 1u << (exponent + mantissa) : 0u;
    const double magnitude = std::fabs(x);
    if (std::isinf(magnitude)) return sign | infinity();
    int power = magnitude == 0 ? 1 - bias() : std::ilogb(magnitude);
    if (power < 1 - bias()) power = 1 - bias();
    // In units of the last place; nearbyint rounds ties to even.
    const double units = std::nearbyint(std::ldexp(magnitude, mantissa - power));
    const auto whole = static_cast<std::uint32_t>(units);
    const std::uint32_t bits =
        whole + (static_cast<std::uint32_t>(power + bias() - 1) << mantissa);
    return sign | (bits < infinity() ? bits : infinity());
  }
};

inline Format format_of(DType type) {
  return type == DType::f32 ? Format{8, 23} : type == DType::bf16 ? Format{8, 7} : Format{5, 10};
}

// Numbers of one type in memory that belongs to a test.
class Memory {
 public:
  Memory() = default;
  Memory(DType type, int64_t count)
      : type_(type), bytes_(static_cast<std::size_t>(count) * size_of(type), 0xEE) {}

  void* data() const { return const_cast<unsigned char*>(bytes_.data()); }
  DType type() const { return type_; }
  std::size_t size() const { return bytes_.size() / size_of(type_); }
  std::uint32_t bits(int64_t i) const {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &bytes_[static_cast<std::size_t>(i) * size_of(type_)], size_of(type_));
    return bits;
  }
  void set_bits(int64_t i, std::uint32_t bits) {
    std::memcpy(&bytes_[static_cast<std::size_t>(i) * size_of(type_)], &bits, size_of(type_));
  }
  double get(int64_t i) const { return format_of(type_).value(bits(i)); }
  void set(int64_t i, double x) { set_bits(i, format_of(type_).nearest(x)); }
  bool operator==(const Memory&) const = default;

 private:
  DType type_ = DType::f32;
  std::vector<unsigned char> bytes_;
};

enum class Layout { channels_last, channels_first, gaps, backwards };
constexpr int kLayouts = 4;

// (rows, steps, channels) in memory of its own, exactly as large as the layout needs; one number
// where that is none, for without data a tensor would count as absent.
class Tensor {
 public:
  Tensor(DType type, Layout layout, int64_t b, int64_t l, int64_t e)
      : rows(b), steps(l), channels(e), row_(l * e), step_(e), channel_(1) {
    if (layout == Layout::channels_first) step_ = 1, channel_ = l;
    if (layout == Layout::gaps) channel_ = 3, step_ = 3 * e + 2, row_ = step_ * l + 7;
    if (layout == Layout::backwards) step_ = -(e + 5), row_ = (e + 5) * l;
    int64_t size = 1;
    if (b * l * e > 0) {
      if (step_ < 0) first_ = -step_ * (l - 1);
      size += (b - 1) * row_ + (l - 1) * std::abs(step_) + (e - 1) * channel_;
    }
    memory = Memory(type, size);
  }

  Tensor3 view() const {
    char* const data = static_cast<char*>(memory.data()) + first_ * size_of(memory.type());
    return {data, memory.type(), row_, step_, channel_};
  }
  int64_t index(int64_t b, int64_t t, int64_t c) const {
    return first_ + b * row_ + t * step_ + c * channel_;
  }
  double get(int64_t b, int64_t t, int64_t c) const { return memory.get(index(b, t, c)); }
  bool operator==(const Tensor& other) const { return memory == other.memory; }

  // Stores what `number` returns, once for each.
  template <class Number>
  void fill(const Number& number) {
    numbers_.resize(memory.size());
    for (int64_t b = 0; b < rows; ++b)
      for (int64_t t = 0; t < steps; ++t)
        for (int64_t c = 0; c < channels; ++c) {
          memory.set(index(b, t, c), number());
          numbers_[index(b, t, c)] = get(b, t, c);
        }
  }
  // What `fill` stored there. References convert nothing in their loops, which sanitizers slow.
  double given(int64_t b, int64_t t, int64_t c) const { return numbers_[index(b, t, c)]; }

  int64_t rows, steps, channels;
  Memory memory;

 private:
  int64_t row_, step_, channel_, first_ = 0;
  std::vector<double> numbers_;
};

// The segments of a batch, with the lists that a view of them points to.
struct SegmentList {
  std::vector<int64_t> rows, starts, stops, in, out;
  bool reverse = false;

  void add(int64_t row, int64_t start, int64_t stop) {
    rows.push_back(row), starts.push_back(start), stops.push_back(stop);
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
  int64_t length(int64_t s) const { return stops[s] - starts[s]; }
  // The step at a position of segment s.
  int64_t step(int64_t s, int64_t p) const { return reverse ? stops[s] - 1 - p : starts[s] + p; }
  Segments view() const {
    return {count(), rows.data(), starts.data(), stops.data(), in.data(), out.data(), reverse};
  }
};

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};

// Half a unit in the last place of `type`, relative, and a little.
inline double rounding(DType type) {
  return type == DType::f32 ? 0 : type == DType::bf16 ? 0.00391 : 0.000489;
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

}  // namespace anymamba::test
