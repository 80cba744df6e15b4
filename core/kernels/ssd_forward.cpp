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
#include "kernels/ssd_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Whether all numbers of a tile are finite; `count` is a multiple of kLanes.
bool are_finite(const float* tile, std::int64_t count) {
  FloatVec zeros{};
  for (std::int64_t i = 0; i < count; i += kLanes) zeros = fma(load(tile + i), FloatVec{}, zeros);
  return sum(zeros) == 0;
}

// Row t of the scores with their decays and step sizes, (q,): zeros behind the diagonal.
ANYMAMBA_INLINE void weigh_scores(float* out, const float* scores, const Steps& steps, std::int64_t t,
                                  std::int64_t q) {
  float padded[kSteps];
  std::int64_t s = 0;
  for (; s <= t; s += kLanes) {
    const FloatVec found = load_some(scores + s, static_cast<int>(smaller(kLanes, q - s)));
    const FloatVec weighted = steps.decays(t, s) * load(steps.dt + s) * found;
    store(padded + s, select(up_to(t, s), weighted, FloatVec{}));
  }
  for (; s < q; s += kLanes) store(padded + s, FloatVec{});
  __builtin_memcpy(out, padded, static_cast<std::size_t>(q) * sizeof(float));
}

class HeadBlock {
 public:
  HeadBlock(const Ssd& ssd, const SsdResult& result, std::int64_t head, const Block& block, Arena& memory)
      : ssd_(ssd), result_(result), head_(head), group_(head / (ssd.heads / ssd.groups)), block_(block),
        right_(memory.floats((ssd.n + kSteps) * block.columns)),
        left_(memory.floats(kSteps * (ssd.n + kSteps))), maps_(memory.floats(kSteps * ssd.n)),
        y_(memory.floats(kSteps * block.columns)), z_(memory.floats(kSteps * block.columns)) {
    read_skip(D_, ssd, head, block);
  }

  void run(const Chunks& chunks, const Scores& scores, std::int64_t index) {
    const SegmentSlice segment = slice_of(ssd_.segments, index);
    read_states_or_zeros(right_, ssd_.initial, segment.state_in, ssd_, block_);
    for (std::int64_t chunk = 0; chunk < chunks.count_of(index); ++chunk) {
      next_ = {};
      if (chunk + 1 < chunks.count_of(index)) next_ = chunk_of(segment, chunk + 1, chunks.q());
      advance(chunk_of(segment, chunk, chunks.q()), scores.of(chunks.first_of(index) + chunk, group_), chunks.q());
    }
    if (result_.last != nullptr && segment.state_out >= 0)
      write_states(result_.last + segment.state_out * ssd_.e() * ssd_.n, right_, block_, ssd_.n);
  }

 private:
  float* x() const { return right_ + ssd_.n * block_.columns; }

  void advance(const SegmentSlice& slice, const float* scores, std::int64_t scores_stride) {
    const std::int64_t q = slice.steps, n = ssd_.n, columns = block_.columns, width = n + q;
    read_tile(x(), ssd_.x, slice, block_);
    if (q > 1 && !are_finite(x(), q * columns)) {
      // Zeros above the diagonal times what is not finite would be NaN in steps before it.
      for (std::int64_t t = 0; t < q; ++t)
        advance(part_of(slice, t, 1), scores + t * scores_stride + t, scores_stride);
      return;
    }
    steps_.read_from(ssd_, slice, head_);
    read_projection(maps_, ssd_.C, slice, group_, n);
    for (std::int64_t t = 0; t < q; ++t) {
      prefetch_step(ssd_.x, next_, block_, t);
      prefetch_step<true>(result_.y, slice, block_, t);
      scale_row(left_ + t * width, maps_ + t * n, steps_.from_start(t), n);
      weigh_scores(left_ + t * width + n, scores + t * scores_stride, steps_, t, q);
    }
    multiply(q, columns, width, rows_of(left_, width), rows_of(right_, columns), y_, columns);
    write_outputs(slice);
    read_projection(maps_, ssd_.B, slice, group_, n);
    advance_state(right_, maps_, x(), steps_, q, n, columns);
  }

  // y + D x, through the gate.
  void write_outputs(const SegmentSlice& slice) const {
    const std::int64_t count = slice.steps * block_.columns;
    if (ssd_.D != nullptr)
      for (std::int64_t i = 0; i < count; i += block_.columns)
        for (int c = 0; c < block_.columns; c += kLanes)
          store(y_ + i + c, fma(load(D_ + c), load(x() + i + c), load(y_ + i + c)));
    if (ssd_.z) {
      read_tile(z_, ssd_.z, slice, block_);
      for (std::int64_t i = 0; i < count; i += kLanes)
        store(y_ + i, load(y_ + i) * silu_of(load(z_ + i)));
    }
    write_tile(y_, result_.y, slice, block_);
  }

  const Ssd& ssd_;
  const SsdResult& result_;
  const std::int64_t head_, group_;
  const Block block_;
  float *const right_, *const left_, *const maps_, *const y_, *const z_;
  float D_[kSsdChannels];
  Steps steps_;
  SegmentSlice next_;  // the chunk after this one
};

}  // namespace

void ssd(const Ssd& ssd, const SsdResult& result) {
  const Chunks chunks(ssd.segments);
  const Scores scores(ssd, chunks);
  const std::int64_t blocks = ceil_div(ssd.p, kSsdChannels), bytes = ssd_worker_scratch(ssd.n);
  parallel_with_arena(ssd.segments.count * ssd.heads * blocks, bytes, [&](std::int64_t item, Arena& memory) {
    const UseArena products(memory);
    const std::int64_t head = item / blocks % ssd.heads;
    const Block block = block_of(head * ssd.p, (head + 1) * ssd.p, kSsdChannels, item % blocks);
    HeadBlock(ssd, result, head, block, memory).run(chunks, scores, item / blocks / ssd.heads);
  });
}

}  // namespace anymamba::ANYMAMBA_ISA
