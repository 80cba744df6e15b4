// What the forward and the backward pass of the state space duality share: chunks, the scores of all
// heads of a group, and the decays of one head.
#pragma once

#include "kernels/scan_tiles.h"
#include "kernels/ssd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kSteps = kSsdSteps;

static_assert(kSteps % kLanes == 0 && kSsdChannels % kLanes == 0);

inline SegmentSlice chunk_of(const SegmentSlice& segment, std::int64_t index, std::int64_t q) {
  const std::int64_t start = index * q;
  return part_of(segment, start, smaller(q, segment.steps - start));
}

// c (m, n) = a b, or added to c, on this thread.
inline void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const Matrix& a, const Matrix& b,
                     float* c, std::int64_t c_stride, bool accumulate = false) {
  Gemm gemm = {m, n, k, a, b, {c, DType::f32, c_stride, 1}, nullptr, accumulate};
  gemm.alone = true;
  ANYMAMBA_ISA::gemm(gemm);
}

inline Matrix rows_of(const float* data, std::int64_t stride) {
  return {const_cast<float*>(data), DType::f32, stride, 1};
}

inline Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.type, matrix.column_stride, matrix.row_stride};
}

// Chunks of up to kSteps steps, counted through all segments. Where all segments are short, so are
// chunks.
class Chunks {
 public:
  explicit Chunks(const Segments& segments)
      : q_(smaller(longest(segments), kSteps)), count_(segments.count), first_(count_ + 1) {
    std::int64_t chunks = 0;
    for (std::int64_t s = 0; s < count_; ++s) {
      first_[s] = chunks;
      chunks += ceil_div(segments.stops[s] - segments.starts[s], q_);
    }
    first_[count_] = chunks;
  }

  std::int64_t q() const { return q_; }
  std::int64_t count() const { return first_[count_]; }
  std::int64_t first_of(std::int64_t segment) const { return first_[segment]; }
  std::int64_t count_of(std::int64_t segment) const { return first_[segment + 1] - first_[segment]; }

  // Chunk number `chunk` of all.
  SegmentSlice slice(const Segments& segments, std::int64_t chunk) const {
    std::int64_t low = 0, high = count_;
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (first_[middle] <= chunk ? low : high) = middle;
    }
    return chunk_of(slice_of(segments, low), chunk - first_[low], q_);
  }

  // At least 1.
  static std::int64_t longest(const Segments& segments) {
    std::int64_t steps = 1;
    for (std::int64_t s = 0; s < segments.count; ++s)
      steps = larger(steps, segments.stops[s] - segments.starts[s]);
    return steps;
  }

 private:
  const std::int64_t q_, count_;
  const Scratch<std::int64_t> first_;
};

// Scores C_t B_s (chunks, groups, q, q), computed by all workers.
class Scores {
 public:
  Scores(const Ssd& ssd, const Chunks& chunks)
      : q_(chunks.q()), groups_(ssd.groups), data_(chunks.count() * groups_ * q_ * q_) {
    parallel_with_arena(chunks.count() * groups_, ssd_worker_scratch(ssd.n),
                        [&](std::int64_t item, Arena& memory) {
      const UseArena products(memory);
      compute(ssd, chunks.slice(ssd.segments, item / groups_), item % groups_, of(item / groups_, item % groups_),
              memory);
    });
  }

  float* of(std::int64_t chunk, std::int64_t group) const {
    return data_ + (chunk * groups_ + group) * q_ * q_;
  }

 private:
  void compute(const Ssd& ssd, const SegmentSlice& slice, std::int64_t group, float* scores,
               Arena& memory) const {
    float* const B = memory.floats(kSteps * ssd.n);
    float* const C = memory.floats(kSteps * ssd.n);
    read_projection(B, ssd.B, slice, group, ssd.n);
    read_projection(C, ssd.C, slice, group, ssd.n);
    multiply(slice.steps, slice.steps, ssd.n, rows_of(C, ssd.n), transposed(rows_of(B, ssd.n)), scores, q_);
  }

  const std::int64_t q_, groups_;
  const Scratch<float> data_;
};

// The step sizes of a head through a chunk, and the sums of dt A, as powers of two. Differences of
// large sums must be good to the last bits: a sum has two floats, the second being what the first
// lacks.
struct Steps {
  float raw[kSteps];  // before softplus and limits
  float dt[kSteps], high[kSteps], low[kSteps];

  void read_from(const Ssd& ssd, const SegmentSlice& slice, std::int64_t head) {
    const Tensor3& from = ssd.dt;
    const std::int64_t start = slice.row * from.row_stride + slice.first * from.step_stride +
                               head * from.channel_stride;
    for (std::int64_t t = 0; t < slice.steps; ++t)
      raw[t] = read(from.data, from.type, start + t * slice.direction * from.step_stride);
    const float bias = ssd.dt_bias != nullptr ? ssd.dt_bias[head] : 0.0f;
    for (std::int64_t t = 0; t < slice.steps; t += kLanes) {
      const int some = static_cast<int>(smaller(kLanes, slice.steps - t));
      FloatVec size = load_some(raw + t, some) + splat(bias);
      store(raw + t, size);
      if (ssd.softplus) size = softplus_of(size);
      store(dt + t, clamp(size, ssd.low, ssd.high));
    }
    double sum = 0;
    for (std::int64_t t = 0; t < slice.steps; ++t) {
      sum += static_cast<double>(dt[t]) * static_cast<double>(ssd.A[head]) * 1.4426950408889634;
      high[t] = static_cast<float>(sum);
      low[t] = static_cast<float>(sum - static_cast<double>(high[t]));
    }
    for (std::int64_t t = slice.steps; t < round_up(slice.steps, kLanes); ++t) dt[t] = high[t] = low[t] = 0;
  }

  // exp(a_t - a_s) for a vector of s.
  FloatVec decays(std::int64_t t, std::int64_t s) const {
    return exp2_of((splat(high[t]) - load(high + s)) + (splat(low[t]) - load(low + s)));
  }

  float from_start(std::int64_t t) const { return exp2_of(splat(high[t]))[0]; }
};

// The numbers of a vector's lanes.
ANYMAMBA_INLINE FloatVec lane_numbers() {
  static constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

// Lanes s + i <= t.
ANYMAMBA_INLINE IntVec up_to(std::int64_t t, std::int64_t s) {
  return lane_numbers() <= splat(static_cast<float>(t - s));
}

// Asks for step t of a slice's tile, which will be read soon, or written.
template <bool kWrite = false>
ANYMAMBA_INLINE void prefetch_step(const Tensor3& tensor, const SegmentSlice& slice, const Block& block,
                                   std::int64_t t) {
  if (t >= slice.steps || tensor.channel_stride != 1) return;
  const std::int64_t size = size_of(tensor.type);
  const char* const first = static_cast<const char*>(tensor.data) +
                            size * (slice.row * tensor.row_stride + block.first +
                                    (slice.first + t * slice.direction) * tensor.step_stride);
  for (std::int64_t i = 0; i < size * block.channels; i += 64) __builtin_prefetch(first + i, kWrite, 2);
}

// out (n,) = row * factor.
ANYMAMBA_INLINE void scale_row(float* out, const float* row, float factor, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i) * splat(factor));
  for (; i < n; ++i) out[i] = row[i] * factor;
}

// h (n, columns) <- exp(a_q) h + B^T x weighted, over a chunk of q steps; B (q, n) is overwritten.
inline void advance_state(float* h, float* B, const float* x, const Steps& steps, std::int64_t q,
                          std::int64_t n, std::int64_t columns) {
  float to_end[kSteps];
  for (std::int64_t s = 0; s < q; s += kLanes) store(to_end + s, steps.decays(q - 1, s) * load(steps.dt + s));
  for (std::int64_t s = 0; s < q; ++s) scale_row(B + s * n, B + s * n, to_end[s], n);
  const FloatVec through = splat(steps.from_start(q - 1));
  for (std::int64_t i = 0; i < n * columns; i += kLanes) store(h + i, load(h + i) * through);
  multiply(n, columns, q, transposed(rows_of(B, n)), rows_of(x, columns), h, columns, true);
}

// D of each column of a head's block, zeros where there is none.
inline void read_skip(float* D, const Ssd& ssd, std::int64_t head, const Block& block) {
  for (int c = 0; c < block.columns; ++c) {
    D[c] = 0;
    if (ssd.D != nullptr && c < block.channels) D[c] = ssd.D[ssd.D_of_channels ? block.first + c : head];
  }
}

inline void read_states_or_zeros(float* out, const float* all, std::int64_t index, const Ssd& ssd,
                                 const Block& block) {
  if (all != nullptr && index >= 0)
    read_states(out, all + index * ssd.e() * ssd.n, block, ssd.n);
  else
    fill_zeros(out, ssd.n * block.columns);
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
