// Memory that is asked for while a loop goes on.
#pragma once

#include <cstdint>

namespace anymamba {

// Neighbouring lines of cache, which come into L2: it can wait for more of them at a time than L1 can.
// One stream through memory arrives faster than several beside each other.
struct Stream {
  const char *next = nullptr, *end = nullptr;

  void fetch_lines(std::int64_t bytes) {
    if (next >= end) return;
    for (std::int64_t byte = 0; byte < bytes; byte += kLine) __builtin_prefetch(next + byte, 0, 2);
    next += bytes;
  }

  static constexpr std::int64_t kLine = 64;
};

// What comes behind `bytes` bytes at p, as much again, as far as `left` bytes from p on go.
inline Stream stream_behind(const void* p, std::int64_t bytes, std::int64_t left) {
  const char* const next = static_cast<const char*>(p) + bytes;
  return {next, next + (left - bytes < bytes ? left - bytes : bytes)};
}

}  // namespace anymamba
