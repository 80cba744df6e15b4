// How fast this machine reads memory: the limit that decoding is held against.
#pragma once

#include <cstdint>

namespace anymamba {

// Bytes a second that all threads read together from a buffer of `bytes`; the best of `repeats`.
double read_bandwidth(std::int64_t bytes, int repeats);

}  // namespace anymamba
