// The state space duality, forward: the paper's algorithm in chunks of q steps, whose sums over steps
// and states are matrix products. With a_t the sum of dt A from a chunk's start to its step t, and h
// the state before it,
//
//   y_t = sum over s <= t of (C_t B_s) exp(a_t - a_s) dt_s x_s  +  exp(a_t) C_t h
//   h  <- exp(a_q) h  +  sum over s of exp(a_q - a_s) dt_s x_s B_s
//
// The scores C_t B_s, the same for all heads of a group, are computed first, for all chunks. Then a
// work item takes up to 64 channels of one head through one segment. Per chunk it has
//
//   left (q, n + q)          [exp(a_t) C_t | the scores with their decays and dt]
//   right (n + q, columns)   [h transposed ; x]
//   y (q, columns) = left right                 one product for both terms
//   h (n, columns) += weighted B^T x            the rows of `right` that x takes being the operand
//
// so that channels lie along the vector.
#include "kernels/scan_tiles.h"
#include "kernels/ssd.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kSteps = kSsdSteps;

static_assert(kSteps % kLanes == 0 && kSsdChannels % kLanes == 0);

SegmentSlice chunk_of(const SegmentSlice& segment, std::int64_t index, std::int64_t q) {
  const std::int64_t start = index * q;
  return part_of(segment, start, smaller(q, segment.steps - start));
}

// c (m, n) = a b, or added to c, on this thread.
void multiply(std::int64_t m, std::int64_t n, std::int64_t k, const Matrix& a, const Matrix& b, float* c,
              std::int64_t c_stride, bool accumulate = false) {
  Gemm gemm = {m, n, k, a, b, {c, DType::f32, c_stride, 1}, nullptr, accumulate};
  gemm.alone = true;
  ANYMAMBA_ISA::gemm(gemm);
}

Matrix rows_of(const float* data, std::int64_t stride) {
  return {const_cast<float*>(data), DType::f32, stride, 1};
}

Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.type, matrix.column_stride, matrix.row_stride};
}

// ---- The scores of all chunks --------------------------------------------------------------------

// Scores (chunks, groups, q, q) of all segments' chunks, one segment's behind another's. Where all
// segments are short, so are chunks.
class Scores {
 public:
  explicit Scores(const Ssd& ssd)
      : q_(longest(ssd.segments)), groups_(ssd.groups), first_chunk_(ssd.segments.count + 1),
        data_(count_chunks(ssd.segments) * groups_ * q_ * q_) {}

  std::int64_t q() const { return q_; }
  std::int64_t chunks() const { return first_chunk_[count_]; }

  float* of(std::int64_t segment, std::int64_t chunk, std::int64_t group) const {
    return data_ + ((first_chunk_[segment] + chunk) * groups_ + group) * q_ * q_;
  }

  // The segment that has chunk number `chunk` of all.
  std::int64_t segment_of(std::int64_t chunk) const {
    std::int64_t low = 0, high = count_;
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (first_chunk_[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }

  std::int64_t first_of(std::int64_t segment) const { return first_chunk_[segment]; }

 private:
  static std::int64_t longest(const Segments& segments) {
    std::int64_t steps = 1;
    for (std::int64_t s = 0; s < segments.count; ++s)
      steps = larger(steps, segments.stops[s] - segments.starts[s]);
    return smaller(steps, kSteps);
  }

  std::int64_t count_chunks(const Segments& segments) {
    count_ = segments.count;
    std::int64_t chunks = 0;
    for (std::int64_t s = 0; s < count_; ++s) {
      first_chunk_[s] = chunks;
      chunks += ceil_div(segments.stops[s] - segments.starts[s], q_);
    }
    return first_chunk_[count_] = chunks;
  }

  const std::int64_t q_, groups_;
  std::int64_t count_ = 0;
  const Scratch<std::int64_t> first_chunk_;
  const Scratch<float> data_;
};

void compute_scores(const Ssd& ssd, const Scores& scores, std::int64_t segment, std::int64_t chunk,
                    std::int64_t group, Arena& memory) {
  const SegmentSlice slice = chunk_of(slice_of(ssd.segments, segment), chunk, scores.q());
  float* const B = memory.floats(kSteps * ssd.n);
  float* const C = memory.floats(kSteps * ssd.n);
  read_projection(B, ssd.B, slice, group, ssd.n);
  read_projection(C, ssd.C, slice, group, ssd.n);
  multiply(slice.steps, slice.steps, ssd.n, rows_of(C, ssd.n), transposed(rows_of(B, ssd.n)),
           scores.of(segment, chunk, group), scores.q());
}

// ---- A block of channels of a head ---------------------------------------------------------------

// The step sizes of a head through a chunk, and the sums of dt A, as powers of two. Differences of
// large sums must be good to the last bits: a sum has two floats, the second being what the first
// lacks.
struct Steps {
  float dt[kSteps], high[kSteps], low[kSteps];

  void read_from(const Ssd& ssd, const SegmentSlice& slice, std::int64_t head) {
    const Tensor3& from = ssd.dt;
    const std::int64_t start = slice.row * from.row_stride + slice.first * from.step_stride +
                               head * from.channel_stride;
    for (std::int64_t t = 0; t < slice.steps; ++t)
      dt[t] = read(from.data, from.type, start + t * slice.direction * from.step_stride);
    const float bias = ssd.dt_bias != nullptr ? ssd.dt_bias[head] : 0.0f;
    for (std::int64_t t = 0; t < slice.steps; t += kLanes) {
      const int some = static_cast<int>(smaller(kLanes, slice.steps - t));
      FloatVec size = load_some(dt + t, some) + splat(bias);
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

  // exp(a_t - a_s) dt_s for a vector of s.
  FloatVec weights(std::int64_t t, std::int64_t s) const {
    const FloatVec between = (splat(high[t]) - load(high + s)) + (splat(low[t]) - load(low + s));
    return exp2_of(between) * load(dt + s);
  }

  float from_start(std::int64_t t) const { return exp2_of(splat(high[t]))[0]; }
};

// The numbers of a vector's lanes.
ANYMAMBA_INLINE FloatVec lane_numbers() {
  static constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

// Row t of the scores with their decays and step sizes, (q,): zeros behind the diagonal.
ANYMAMBA_INLINE void weigh_scores(float* out, const float* scores, const Steps& steps, std::int64_t t,
                                  std::int64_t q) {
  float padded[kSteps];
  std::int64_t s = 0;
  for (; s <= t; s += kLanes) {
    const FloatVec found = load_some(scores + s, static_cast<int>(smaller(kLanes, q - s)));
    const IntVec seen = lane_numbers() <= splat(static_cast<float>(t - s));
    store(padded + s, select(seen, steps.weights(t, s) * found, FloatVec{}));
  }
  for (; s < q; s += kLanes) store(padded + s, FloatVec{});
  __builtin_memcpy(out, padded, static_cast<std::size_t>(q) * sizeof(float));
}

// out (n,) = row * factor.
ANYMAMBA_INLINE void scale_row(float* out, const float* row, float factor, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(row + i) * splat(factor));
  for (; i < n; ++i) out[i] = row[i] * factor;
}

class HeadBlock {
 public:
  HeadBlock(const Ssd& ssd, const SsdResult& result, std::int64_t head, const Block& block, Arena& memory)
      : ssd_(ssd), result_(result), head_(head), group_(head / (ssd.heads / ssd.groups)), block_(block),
        right_(memory.floats((ssd.n + kSteps) * block.columns)),
        left_(memory.floats(kSteps * (ssd.n + kSteps))), maps_(memory.floats(kSteps * ssd.n)),
        y_(memory.floats(kSteps * block.columns)), z_(memory.floats(kSteps * block.columns)) {}

  void run(const Scores& scores, std::int64_t index) {
    const SegmentSlice segment = slice_of(ssd_.segments, index);
    const std::int64_t size = ssd_.e() * ssd_.n;
    if (ssd_.initial != nullptr && segment.state_in >= 0)
      read_states(right_, ssd_.initial + segment.state_in * size, block_, ssd_.n);
    else
      fill_zeros(right_, ssd_.n * block_.columns);
    const std::int64_t chunks = ceil_div(segment.steps, scores.q());
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk)
      advance(chunk_of(segment, chunk, scores.q()), scores.of(index, chunk, group_), scores.q());
    if (result_.last != nullptr && segment.state_out >= 0)
      write_states(result_.last + segment.state_out * size, right_, block_, ssd_.n);
  }

 private:
  float* x() const { return right_ + ssd_.n * block_.columns; }

  void advance(const SegmentSlice& slice, const float* scores, std::int64_t scores_stride) {
    const std::int64_t q = slice.steps, n = ssd_.n, columns = block_.columns, width = n + q;
    steps_.read_from(ssd_, slice, head_);
    read_tile(x(), ssd_.x, slice, block_);
    read_projection(maps_, ssd_.C, slice, group_, n);
    for (std::int64_t t = 0; t < q; ++t) {
      scale_row(left_ + t * width, maps_ + t * n, steps_.from_start(t), n);
      weigh_scores(left_ + t * width + n, scores + t * scores_stride, steps_, t, q);
    }
    multiply(q, columns, width, rows_of(left_, width), rows_of(right_, columns), y_, columns);
    write_outputs(slice);
    advance_state(slice);
  }

  // y + D x, through the gate.
  void write_outputs(const SegmentSlice& slice) const {
    const float D = ssd_.D != nullptr ? ssd_.D[head_] : 0.0f;
    const std::int64_t count = slice.steps * block_.columns;
    if (ssd_.D != nullptr)
      for (std::int64_t i = 0; i < count; i += kLanes)
        store(y_ + i, fma(splat(D), load(x() + i), load(y_ + i)));
    if (ssd_.z) {
      read_tile(z_, ssd_.z, slice, block_);
      for (std::int64_t i = 0; i < count; i += kLanes)
        store(y_ + i, load(y_ + i) * silu_of(load(z_ + i)));
    }
    write_tile(y_, result_.y, slice, block_);
  }

  void advance_state(const SegmentSlice& slice) const {
    const std::int64_t q = slice.steps, n = ssd_.n, columns = block_.columns;
    float to_end[kSteps];
    for (std::int64_t s = 0; s < q; s += kLanes) store(to_end + s, steps_.weights(q - 1, s));
    read_projection(maps_, ssd_.B, slice, group_, n);
    for (std::int64_t s = 0; s < q; ++s) scale_row(maps_ + s * n, maps_ + s * n, to_end[s], n);
    const FloatVec through = splat(steps_.from_start(q - 1));
    for (std::int64_t i = 0; i < n * columns; i += kLanes) store(right_ + i, load(right_ + i) * through);
    multiply(n, columns, q, transposed(rows_of(maps_, n)), rows_of(x(), columns), right_, columns, true);
  }

  const Ssd& ssd_;
  const SsdResult& result_;
  const std::int64_t head_, group_;
  const Block block_;
  float *const right_, *const left_, *const maps_, *const y_, *const z_;
  Steps steps_;
};

}  // namespace

void ssd(const Ssd& ssd, const SsdResult& result) {
  const std::int64_t bytes = ssd_worker_scratch(ssd.n);
  const Scores scores(ssd);
  parallel_with_arena(scores.chunks() * ssd.groups, bytes, [&](std::int64_t item, Arena& memory) {
    const UseArena products(memory);
    const std::int64_t chunk = item / ssd.groups, segment = scores.segment_of(chunk);
    compute_scores(ssd, scores, segment, chunk - scores.first_of(segment), item % ssd.groups, memory);
  });
  const std::int64_t blocks = ceil_div(ssd.p, kSsdChannels);
  parallel_with_arena(ssd.segments.count * ssd.heads * blocks, bytes, [&](std::int64_t item, Arena& memory) {
    const UseArena products(memory);
    const std::int64_t head = item / blocks % ssd.heads;
    const Block block = block_of(head * ssd.p, (head + 1) * ssd.p, kSsdChannels, item % blocks);
    HeadBlock(ssd, result, head, block, memory).run(scores, item / blocks / ssd.heads);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
