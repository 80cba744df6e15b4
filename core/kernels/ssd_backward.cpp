// The gradients of the state space duality, chunk by chunk in reverse.
//
// In the notation of ssd_forward.cpp, with L[t, s] = (C_t B_s) exp(a_t - a_s) dt_s for s <= t, with
// h the state before a chunk of q steps, G the gradient of the one after it, and du = dy silu(z):
//
//   P       = du x^T                                  the gradient of L
//   dx      = L^T du  +  exp(a_q - a_s) dt_s B_s G
//   dB_s    = sum over heads of exp(a_q - a_s) dt_s x_s G^T  +  sum over t of dscores[t, s] C_t
//   dC_t    = sum over heads of exp(a_t) du_t h^T            +  sum over s of dscores[t, s] B_s
//   dscores = sum over heads of P[t, s] exp(a_t - a_s) dt_s
//   G      <- exp(a_q) G  +  sum over t of exp(a_t) C_t du_t
//
// A step's dt A is part of all decays that reach across it. What these get is summed over just
// those, the largest terms, which a step gives to itself, being in none of them:
//
//   d(dt_r A) = sum over s < r <= t of P[t, s] L[t, s]  +  sum over t >= r of exp(a_t) C_t h du_t
//             + sum over s < r of exp(a_q - a_s) dt_s B_s G x_s  +  exp(a_q) <G, h>
//
// A work item takes some heads of a group through some segments. It first recomputes the states
// between chunks. Sums over heads are kept apart for each item and added in one order at the end.
#include <new>

#include "kernels/ssd_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kHeadParts = 8, kSegmentParts = 16;  // at most so many partial sums are kept apart

// What items leave of the gradients that several of them share.
struct Partials {
  std::int64_t heads, head_parts;        // of a group: in a part, and how many parts
  std::int64_t segments, segment_parts;  // the same
  std::int64_t q, stride, n, groups, chunks;
  Scratch<float> B, C;        // (head_parts, chunks, groups, q, n)
  Scratch<float> scores;      // (head_parts, chunks, groups, q, stride)
  Scratch<double> A, dt_bias; // (segment_parts, h)
  Scratch<float> D;           // (segment_parts, e)

  Partials(const Ssd& ssd, const Chunks& all)
      : heads(ceil_div(ssd.heads / ssd.groups, kHeadParts)),
        head_parts(ceil_div(ssd.heads / ssd.groups, heads)),
        segments(larger(1, ceil_div(ssd.segments.count, kSegmentParts))),
        segment_parts(ceil_div(ssd.segments.count, segments)), q(all.q()), stride(round_up(q, kLanes)),
        n(ssd.n), groups(ssd.groups), chunks(all.count()), B(head_parts * chunks * groups * q * n),
        C(head_parts * chunks * groups * q * n), scores(head_parts * chunks * groups * q * stride),
        A(segment_parts * ssd.heads), dt_bias(segment_parts * ssd.heads), D(segment_parts * ssd.e()) {}

  // Which tile of B, C and scores a part of the heads has for a chunk.
  std::int64_t tile(std::int64_t part, std::int64_t chunk, std::int64_t group) const {
    return (part * chunks + chunk) * groups + group;
  }
};

// The sum of a_i b_i, and out = a factor, or added to it.
ANYMAMBA_INLINE float dot_and_add(float* out, const float* a, const float* b, float factor, std::int64_t n,
                                  bool add) {
  FloatVec products{};
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    products = fma(load(a + i), load(b + i), products);
    const FloatVec scaled = load(a + i) * splat(factor);
    store(out + i, add ? load(out + i) + scaled : scaled);
  }
  if (const int rest = static_cast<int>(n - i); rest > 0) {
    const FloatVec last = load_some(a + i, rest);
    products = fma(last, load_some(b + i, rest), products);
    const FloatVec scaled = last * splat(factor);
    store_some(out + i, add ? load_some(out + i, rest) + scaled : scaled, rest);
  }
  return sum(products);
}

// The tiles of a chunk that all heads of an item use in turn.
struct Tiles {
  float *B, *C;              // (q, n)
  float *scaled_B, *scaled_C, *maps;  // (q, n): with a head's decays, and gradients of maps
  float *x, *du, *gate, *y, *dx;      // (q, columns)
  float *weights, *products;          // (q, kSteps): L and P

  Tiles(Arena& memory, std::int64_t n, std::int64_t columns) {
    for (float** tile : {&B, &C, &scaled_B, &scaled_C, &maps}) *tile = memory.floats(kSteps * n);
    for (float** tile : {&x, &du, &gate, &y, &dx}) *tile = memory.floats(kSteps * columns);
    for (float** tile : {&weights, &products}) *tile = memory.floats(kSteps * kSteps);
  }
};

// One head on its way through a segment.
class Head {
 public:
  Head(const Ssd& ssd, const SsdGradients& gradients, const Partials& partials, std::int64_t head,
       std::int64_t most_chunks, Arena& memory)
      : ssd_(ssd), gradients_(gradients), partials_(partials), head_(head), n_(ssd.n),
        block_{head * ssd.p, static_cast<int>(ssd.p), columns_of(ssd)},
        next_{smaller(head + 1, ssd.heads - 1) * ssd.p, block_.channels, block_.columns},
        states_(memory.floats(most_chunks * n_ * block_.columns)), carry_(memory.floats(n_ * block_.columns)),
        D_(memory.floats(block_.columns)), dD_(memory.floats(block_.columns)) {
    read_skip(D_, ssd, head, block_);
    fill_zeros(dD_, block_.columns);
  }

  static int columns_of(const Ssd& ssd) { return static_cast<int>(round_up(ssd.p, kLanes)); }

  // The states before each chunk, and the gradient of the last one.
  void enter(const SegmentSlice& segment, std::int64_t chunks, const Tiles& tiles) {
    const std::int64_t size = n_ * block_.columns, group = head_ / (ssd_.heads / ssd_.groups);
    read_states_or_zeros(carry_, gradients_.last, segment.state_out, ssd_, block_);
    if (chunks == 0) return;
    read_states_or_zeros(states_, ssd_.initial, segment.state_in, ssd_, block_);
    for (std::int64_t chunk = 0; chunk + 1 < chunks; ++chunk) {
      const SegmentSlice slice = chunk_of(segment, chunk, partials_.q);
      float* const next = states_ + (chunk + 1) * size;
      __builtin_memcpy(next, states_ + chunk * size, static_cast<std::size_t>(size) * sizeof(float));
      steps_.read_from(ssd_, slice, head_);
      read_tile(tiles.x, ssd_.x, slice, block_);
      read_projection(tiles.scaled_B, ssd_.B, slice, group, n_);
      advance_state(next, tiles.scaled_B, tiles.x, steps_, slice.steps, n_, block_.columns);
    }
  }

  void leave(const SegmentSlice& segment) const {
    if (gradients_.initial != nullptr && segment.state_in >= 0)
      write_states(gradients_.initial + segment.state_in * ssd_.e() * n_, carry_, block_, n_);
  }

  void save(std::int64_t segment_part) const {
    partials_.A[segment_part * ssd_.heads + head_] = dA_;
    partials_.dt_bias[segment_part * ssd_.heads + head_] = dbias_;
    float* const D = partials_.D + segment_part * ssd_.e() + block_.first;
    for (int c = 0; c < block_.channels; ++c) D[c] = dD_[c];
  }

  // A chunk, whose gradients of B, C and scores are added to a tile's, or start them.
  void go_back(const SegmentSlice& slice, std::int64_t chunk, const float* scores, std::int64_t tile, bool add,
               const Tiles& k) {
    q_ = slice.steps;
    h_ = states_ + chunk * n_ * block_.columns;
    const std::int64_t columns = block_.columns;
    steps_.read_from(ssd_, slice, head_);
    for (std::int64_t s = 0; s < q_; s += kLanes) store(to_end_ + s, steps_.decays(q_ - 1, s));
    read_inputs(slice, k);
    const Matrix x = rows_of(k.x, columns), du = rows_of(k.du, columns);
    multiply(q_, q_, columns, du, transposed(x), k.products, kSteps);
    go_through_scores(slice, scores, partials_.scores + tile * partials_.q * partials_.stride, add, k);
    go_through_maps(partials_.B + tile * partials_.q * n_, partials_.C + tile * partials_.q * n_, add, k);
    if (ssd_.z) write_gate(slice, k);
    multiply(q_, columns, q_, transposed(rows_of(k.weights, kSteps)), du, k.dx, columns);
    multiply(q_, columns, n_, rows_of(k.scaled_B, n_), rows_of(carry_, columns), k.dx, columns, true);
    write_input(slice, k);
    write_steps(slice, retreat(k));
  }

 private:
  void read_inputs(const SegmentSlice& slice, const Tiles& k) const {
    read_tile(k.x, ssd_.x, slice, block_);
    read_tile(k.du, gradients_.y, slice, block_);
    if (!ssd_.z) return;
    read_tile(k.gate, ssd_.z, slice, block_);
    for (std::int64_t i = 0; i < q_ * block_.columns; i += kLanes) {
      const FloatVec dy = load(k.du + i), z = load(k.gate + i);
      store(k.du + i, dy * silu_of(z));
      store(k.gate + i, dy * silu_slope_of(z));
    }
  }

  // L from the scores, what P gives to the scores and to step sizes, and for each step the sum of
  // P L over the pairs around it.
  void go_through_scores(const SegmentSlice& slice, const float* scores, float* dscores, bool add, const Tiles& k) {
    FloatVec to_dt[kSteps / kLanes] = {}, across[kSteps / kLanes] = {};
    float sums[kSteps * kLanes];
    for (std::int64_t t = q_ - 1; t >= 0; --t) {
      prefetch_step(ssd_.x, slice, next_, t);
      prefetch_step(gradients_.y, slice, next_, t);
      prefetch_step<true>(gradients_.x, slice, block_, t);
      FloatVec pairs{};
      std::int64_t s = 0;
      for (int j = 0; s <= t; s += kLanes, ++j) {
        const IntVec seen = up_to(t, s);
        const FloatVec decay = steps_.decays(t, s), dt = load(steps_.dt + s);
        const FloatVec weight = decay * load_some(scores + t * partials_.q + s, static_cast<int>(smaller(kLanes, q_ - s)));
        const FloatVec product = load(k.products + t * kSteps + s);
        store(k.weights + t * kSteps + s, select(seen, weight * dt, FloatVec{}));
        float* const to = dscores + t * partials_.stride + s;
        const FloatVec dscore = select(seen, decay * dt * product, FloatVec{});
        store(to, add ? load(to) + dscore : dscore);
        const FloatVec given = select(seen, weight * product, FloatVec{});
        to_dt[j] += given;
        across[j] = fma(given, dt, across[j]);
        pairs += select(up_to(t - 1, s), across[j], FloatVec{});
      }
      for (; s < q_; s += kLanes) {
        store(k.weights + t * kSteps + s, FloatVec{});
        if (!add) store(dscores + t * partials_.stride + s, FloatVec{});
      }
      store(sums + t * kLanes, pairs);
    }
    fill_zeros(sums + q_ * kLanes, (round_up(q_, kLanes) - q_) * kLanes);
    for (std::int64_t t = 0; t < q_; t += kLanes) {
      store(pairs_ + t, row_sums(sums + t * kLanes));
      store(to_dt_ + t, to_dt[t / kLanes]);
    }
  }

  // What the states on both sides give to B, C and the decays; B and C with the head's decays.
  void go_through_maps(float* dB, float* dC, bool add, const Tiles& k) {
    const std::int64_t columns = block_.columns;
    multiply(q_, n_, columns, rows_of(k.du, columns), transposed(rows_of(h_, columns)), k.maps, n_);
    for (std::int64_t t = 0; t < q_; ++t) {
      const float decay = steps_.from_start(t);
      from_state_[t] = decay * dot_and_add(dC + t * n_, k.maps + t * n_, k.C + t * n_, decay, n_, add);
      scale_row(k.scaled_C + t * n_, k.C + t * n_, decay, n_);
    }
    multiply(q_, n_, columns, rows_of(k.x, columns), transposed(rows_of(carry_, columns)), k.maps, n_);
    for (std::int64_t s = 0; s < q_; ++s) {
      const float weight = to_end_[s] * steps_.dt[s];
      to_state_[s] = dot_and_add(dB + s * n_, k.maps + s * n_, k.B + s * n_, weight, n_, add);
      scale_row(k.scaled_B + s * n_, k.B + s * n_, weight, n_);
    }
  }

  // dz = dy silu'(z) (y + D x), for which y is computed again.
  void write_gate(const SegmentSlice& slice, const Tiles& k) const {
    const std::int64_t columns = block_.columns;
    multiply(q_, columns, n_, rows_of(k.scaled_C, n_), rows_of(h_, columns), k.y, columns);
    multiply(q_, columns, q_, rows_of(k.weights, kSteps), rows_of(k.x, columns), k.y, columns, true);
    for (std::int64_t i = 0; i < q_ * columns; i += columns)
      for (std::int64_t c = 0; c < columns; c += kLanes)
        store(k.gate + i + c, load(k.gate + i + c) * fma(load(D_ + c), load(k.x + i + c), load(k.y + i + c)));
    write_tile(k.gate, gradients_.z, slice, block_);
  }

  void write_input(const SegmentSlice& slice, const Tiles& k) const {
    const std::int64_t columns = block_.columns;
    if (ssd_.D != nullptr)
      for (std::int64_t i = 0; i < q_ * columns; i += columns)
        for (std::int64_t c = 0; c < columns; c += kLanes) {
          const FloatVec du = load(k.du + i + c);
          store(k.dx + i + c, fma(load(D_ + c), du, load(k.dx + i + c)));
          store(dD_ + c, fma(du, load(k.x + i + c), load(dD_ + c)));
        }
    write_tile(k.dx, gradients_.x, slice, block_);
  }

  // The gradient of the state before the chunk; returns what the decay through all of it gets.
  double retreat(const Tiles& k) const {
    const std::int64_t columns = block_.columns, size = n_ * columns;
    const FloatVec through = splat(steps_.from_start(q_ - 1));
    FloatVec products{};
    for (std::int64_t i = 0; i < size; i += kLanes) {
      const FloatVec decayed = load(carry_ + i) * through;
      products = fma(decayed, load(h_ + i), products);
      store(carry_ + i, decayed);
    }
    multiply(n_, columns, q_, transposed(rows_of(k.scaled_C, n_)), rows_of(k.du, columns), carry_, columns, true);
    return static_cast<double>(sum(products));
  }

  // From d(dt_r A) to the gradients of A, and through limits and softplus to those of dt and its bias.
  void write_steps(const SegmentSlice& slice, double through) {
    float raw[kSteps], found[kSteps];
    double after = 0, before = 0;
    for (std::int64_t t = 0; t < q_; ++t) after += static_cast<double>(from_state_[t]);
    for (std::int64_t r = 0; r < q_; ++r) {
      const double dproduct = static_cast<double>(pairs_[r]) + after + before + through;
      after -= static_cast<double>(from_state_[r]);
      before += static_cast<double>(to_state_[r]) * static_cast<double>(to_end_[r] * steps_.dt[r]);
      dA_ += dproduct * static_cast<double>(steps_.dt[r]);
      raw[r] = to_dt_[r] + to_state_[r] * to_end_[r] + static_cast<float>(dproduct * static_cast<double>(ssd_.A[head_]));
    }
    for (std::int64_t r = 0; r < q_; r += kLanes) {
      const FloatVec size = load(steps_.raw + r);
      const FloatVec unlimited = ssd_.softplus ? softplus_of(size) : size;
      const FloatVec slope = ssd_.softplus ? sigmoid_of(size) : splat(1.0f);
      const IntVec inside = (unlimited >= splat(ssd_.low)) & (unlimited <= splat(ssd_.high));
      store(found + r, select(inside, load(raw + r) * slope, FloatVec{}));
    }
    const Tensor3& to = gradients_.dt;
    const std::int64_t start = slice.row * to.row_stride + slice.first * to.step_stride + head_ * to.channel_stride;
    for (std::int64_t r = 0; r < q_; ++r) {
      write(to.data, to.type, start + r * slice.direction * to.step_stride, found[r]);
      dbias_ += static_cast<double>(found[r]);
    }
  }

  const Ssd& ssd_;
  const SsdGradients& gradients_;
  const Partials& partials_;
  const std::int64_t head_, n_;
  const Block block_, next_;  // this head's and the next one's
  float *const states_, *const carry_;  // (chunks, n, columns) before each chunk, and G
  float *const D_, *const dD_;          // (columns)
  double dA_ = 0, dbias_ = 0;
  Steps steps_;
  std::int64_t q_ = 0;
  const float* h_ = nullptr;
  float to_end_[kSteps], pairs_[kSteps], to_dt_[kSteps], from_state_[kSteps], to_state_[kSteps];
};

// What an item's arena holds.
std::int64_t worker_bytes(const Ssd& ssd, std::int64_t heads, std::int64_t q) {
  const std::int64_t chunks = ceil_div(Chunks::longest(ssd.segments), q);
  const std::int64_t columns = Head::columns_of(ssd);
  const std::int64_t own = (chunks + 1) * ssd.n * columns + 2 * columns;
  const std::int64_t tiles = kSteps * (5 * ssd.n + 5 * columns + 2 * kSteps);
  return 4 * (heads * own + tiles) + heads * (static_cast<std::int64_t>(sizeof(Head)) + 256) +
         kGemmScratch + 4096;
}

// Takes the memory of all at once: it stays with this thread until its next call.
void reserve_memory(const Ssd& ssd) {
  std::int64_t steps = 0;
  for (std::int64_t s = 0; s < ssd.segments.count; ++s) steps += ssd.segments.stops[s] - ssd.segments.starts[s];
  const std::int64_t tiles = (steps / kSteps + ssd.segments.count) * ssd.groups * kHeadParts;
  const std::int64_t shared = 4 * tiles * kSteps * (2 * ssd.n + kSteps);
  const std::int64_t parameters = kSegmentParts * (16 * ssd.heads + 4 * ssd.e());
  const std::int64_t q = smaller(Chunks::longest(ssd.segments), kSteps);
  const std::int64_t heads = ceil_div(ssd.heads / ssd.groups, kHeadParts);
  reserve_scratch(ssd_caller_scratch(steps, ssd.segments.count, ssd.groups) + shared + parameters + 1024 +
                  Threads::count() * in_arena(worker_bytes(ssd, heads, q)));
}

struct Item {
  std::int64_t segment_part, group, head_part;
};

// Some heads through some segments.
void go_back(const Ssd& ssd, const SsdGradients& gradients, const Chunks& chunks, const Scores& scores,
             const Partials& partials, const Item& item, Arena& memory) {
  const std::int64_t of_group = ssd.heads / ssd.groups, first = item.head_part * partials.heads;
  const std::int64_t count = smaller(partials.heads, of_group - first);
  const std::int64_t most_chunks = ceil_div(Chunks::longest(ssd.segments), partials.q);
  const Tiles tiles(memory, ssd.n, Head::columns_of(ssd));
  Head* const heads = static_cast<Head*>(memory.take(count * static_cast<std::int64_t>(sizeof(Head))));
  for (std::int64_t i = 0; i < count; ++i)
    new (heads + i) Head(ssd, gradients, partials, item.group * of_group + first + i, most_chunks, memory);
  const UseArena products(memory);
  const std::int64_t stop = smaller(ssd.segments.count, (item.segment_part + 1) * partials.segments);
  for (std::int64_t s = item.segment_part * partials.segments; s < stop; ++s) {
    const SegmentSlice segment = slice_of(ssd.segments, s);
    const std::int64_t own = chunks.count_of(s);
    for (std::int64_t i = 0; i < count; ++i) heads[i].enter(segment, own, tiles);
    for (std::int64_t chunk = own - 1; chunk >= 0; --chunk) {
      const SegmentSlice slice = chunk_of(segment, chunk, chunks.q());
      const std::int64_t number = chunks.first_of(s) + chunk;
      read_projection(tiles.B, ssd.B, slice, item.group, ssd.n);
      read_projection(tiles.C, ssd.C, slice, item.group, ssd.n);
      for (std::int64_t i = 0; i < count; ++i)
        heads[i].go_back(slice, chunk, scores.of(number, item.group),
                         partials.tile(item.head_part, number, item.group), i > 0, tiles);
    }
    for (std::int64_t i = 0; i < count; ++i) heads[i].leave(segment);
  }
  for (std::int64_t i = 0; i < count; ++i) heads[i].save(item.segment_part);
}

// tile (count,) = the sum of all parts' tiles.
void add_parts(float* tile, const float* all, const Partials& partials, std::int64_t chunk, std::int64_t group,
               std::int64_t tile_size, std::int64_t count) {
  fill_zeros(tile, count);
  for (std::int64_t part = 0; part < partials.head_parts; ++part) {
    const float* const from = all + partials.tile(part, chunk, group) * tile_size;
    for (std::int64_t i = 0; i < count; ++i) tile[i] += from[i];
  }
}

// A chunk's gradients of B and C from those of all heads and of the scores.
void finish_maps(const Ssd& ssd, const SsdGradients& gradients, const Partials& partials,
                 const SegmentSlice& slice, std::int64_t chunk, std::int64_t group, Arena& memory) {
  const std::int64_t n = ssd.n, q = slice.steps, stride = partials.stride;
  float* const scores = memory.floats(q * stride);
  float* const map = memory.floats(q * n);
  float* const found = memory.floats(q * n);
  const UseArena products(memory);
  add_parts(scores, partials.scores, partials, chunk, group, partials.q * stride, q * stride);
  const Matrix dscores = rows_of(scores, stride);
  for (const bool of_B : {true, false}) {
    add_parts(found, of_B ? partials.B : partials.C, partials, chunk, group, partials.q * n, q * n);
    read_projection(map, of_B ? ssd.C : ssd.B, slice, group, n);
    multiply(q, n, q, of_B ? transposed(dscores) : dscores, rows_of(map, n), found, n, true);
    float* const to = of_B ? gradients.B : gradients.C;
    for (std::int64_t t = 0; t < q; ++t) {
      const std::int64_t step = slice.row * gradients.steps + slice.first + t * slice.direction;
      __builtin_memcpy(to + (step * ssd.groups + group) * n, found + t * n, static_cast<std::size_t>(n) * sizeof(float));
    }
  }
}

// The gradients of parameters from the parts of the segments.
void finish_parameters(const Ssd& ssd, const SsdGradients& gradients, const Partials& partials) {
  for (std::int64_t h = 0; h < ssd.heads; ++h) {
    double A = 0, dt_bias = 0, D = 0;
    for (std::int64_t part = 0; part < partials.segment_parts; ++part) {
      A += partials.A[part * ssd.heads + h];
      dt_bias += partials.dt_bias[part * ssd.heads + h];
    }
    for (std::int64_t c = h * ssd.p; c < (h + 1) * ssd.p; ++c) {
      double of_channel = 0;
      for (std::int64_t part = 0; part < partials.segment_parts; ++part)
        of_channel += static_cast<double>(partials.D[part * ssd.e() + c]);
      if (gradients.D != nullptr && ssd.D_of_channels) gradients.D[c] = static_cast<float>(of_channel);
      D += of_channel;
    }
    gradients.A[h] = static_cast<float>(A);
    if (gradients.dt_bias != nullptr) gradients.dt_bias[h] = static_cast<float>(dt_bias);
    if (gradients.D != nullptr && !ssd.D_of_channels) gradients.D[h] = static_cast<float>(D);
  }
}

}  // namespace

void ssd_backward(const Ssd& ssd, const SsdGradients& gradients) {
  reserve_memory(ssd);
  const Chunks chunks(ssd.segments);
  const Scores scores(ssd, chunks);
  const Partials partials(ssd, chunks);
  const std::int64_t maps = gradients.rows * gradients.steps * ssd.groups * ssd.n;
  fill_zeros(gradients.B, maps);
  fill_zeros(gradients.C, maps);
  if (gradients.initial != nullptr) fill_zeros(gradients.initial, gradients.n_states * ssd.e() * ssd.n);
  parallel_with_arena(partials.segment_parts * ssd.groups * partials.head_parts, worker_bytes(ssd, partials.heads, partials.q),
                      [&](std::int64_t item, Arena& memory) {
                        const std::int64_t rest = item / partials.head_parts;
                        go_back(ssd, gradients, chunks, scores, partials,
                                {rest / ssd.groups, rest % ssd.groups, item % partials.head_parts}, memory);
                      });
  const std::int64_t bytes = 4 * kSteps * (kSteps + 2 * ssd.n) + kGemmScratch + 4096;
  parallel_with_arena(chunks.count() * ssd.groups, bytes, [&](std::int64_t item, Arena& memory) {
    const std::int64_t chunk = item / ssd.groups;
    finish_maps(ssd, gradients, partials, chunks.slice(ssd.segments, chunk), chunk, item % ssd.groups, memory);
  });
  finish_parameters(ssd, gradients, partials);
}

}  // namespace anymamba::ANYMAMBA_ISA
