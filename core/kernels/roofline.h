// What the machine allows at most, measured: the limits that benchmarks stand beside.
#pragma once

#include <cstdint>

namespace anymamba {

// Bytes a second that all threads read together from a buffer; the best of the repeats.
double read_bandwidth(std::int64_t bytes, int repeats);

// Operations a second that all threads do together at most, a multiplication and an addition
// counting as two: of floats, and of bytes that are multiplied and summed in fours.
double peak_float_operations(int repeats);
double peak_byte_operations(int repeats);

}  // namespace anymamba
