// What this processor's arithmetic can do at most: loops that do nothing else, for rooflines.
#include "kernels/kernels.h"
#include "simd/simd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Chains that do not wait for each other: two units, each with four or five cycles of latency.
constexpr int kChains = 12;

// The instruction that multiplies the most bytes, and how many for each lane.
#if ANYMAMBA_NEON_I8MM
constexpr int kMostProducts = 8;
ANYMAMBA_INLINE IntVec most_products(IntVec sum, ByteVec a, ByteVec b) { return multiply_matrices(sum, a, b); }
#else
constexpr int kMostProducts = 4;
ANYMAMBA_INLINE IntVec most_products(IntVec sum, ByteVec a, ByteVec b) { return dot4(sum, a, b); }
#endif

}  // namespace

void fma_loop(std::int64_t turns, std::int64_t* operations) {
  FloatVec sums[kChains];
  for (int c = 0; c < kChains; ++c) sums[c] = splat(static_cast<float>(c));
  const FloatVec factor = splat(0.999f), summand = splat(0.001f);
  for (std::int64_t turn = 0; turn < turns; ++turn) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sums[c] = fma(sums[c], factor, summand);
  }
  for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
  volatile float sink = sums[0][0];
  (void)sink;
  *operations = turns * kChains * kLanes * 2;
}

void dot4_loop(std::int64_t turns, std::int64_t* operations) {
  alignas(64) std::uint8_t bytes[(1 + kChains) * kBytes];
  for (int i = 0; i < (1 + kChains) * kBytes; ++i) bytes[i] = static_cast<std::uint8_t>(i % 100);
  const std::uint8_t* from = bytes;
  IntVec sums[kChains] = {};
  for (std::int64_t turn = 0; turn < turns; ++turn) {
    __asm__ volatile("" : "+r"(from));  // else products that do not change leave the loop
    const ByteVec a = load_bytes(from);
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      const ByteVec b = load_bytes(from + (1 + c) * kBytes);
      sums[c] = most_products(sums[c], a, b);
    }
  }
  for (int c = 1; c < kChains; ++c) sums[0] += sums[c];
  volatile std::int32_t sink = sums[0][0];
  (void)sink;
  *operations = turns * kChains * kLanes * kMostProducts * 2;
}

}  // namespace anymamba::ANYMAMBA_ISA
