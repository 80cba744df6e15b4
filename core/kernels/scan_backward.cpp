// The gradients of the selective scan.
#include "kernels/scan_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

//
// With g_t the gradient of h_t, and a_t = exp(delta_t A):
//
//   g_t     = C_t du_t + a_{t+1} g_{t+1}        du = dy silu(z)
//   dB_t    = sum over channels of g_t dx_t     dC_t = sum over channels of h_t du_t
//   d(dx_t) = sum over states of g_t B_t
//   d(delta_t A) = a_t g_t h_{t-1}              whence ddelta sums A times it over the states,
//                                               and dA sums delta_t times it over the steps

constexpr int kPartials = 16;  // at most so many partial sums of a gradient are kept apart

struct Backward {
  Chunk chunk;
  float *raw, *x;          // (steps, columns): delta before softplus, and x
  float *du, *gate;        // (steps, columns): dy silu(z), and dy silu'(z)
  float *ddx, *ddelta;     // (steps, columns): the sums over states
  float *carry, *dA;       // (n, columns): a_{t+1} g_{t+1}, and the sum over steps so far
  float *decays, *states;  // (steps, kStates, kLanes), (steps + 1, kStates, kLanes): states at work
  float *dB, *dC;          // (steps, kStates, kLanes): sums over the block's vectors
  float *dD, *dbias;       // (columns)

  Backward(Arena& memory, std::int64_t n, int columns) : chunk(memory, n, columns) {
    for (float** tile : {&raw, &x, &du, &gate, &ddx, &ddelta}) *tile = memory.floats(kTile);
    for (float** each : {&carry, &dA}) *each = memory.floats(kColumns * n);
    for (float** each : {&decays, &dB, &dC}) *each = memory.floats(kChunkSteps * kStates * kLanes);
    states = memory.floats((kChunkSteps + 1) * kStates * kLanes);
    for (float** each : {&dD, &dbias}) *each = memory.floats(kColumns);
  }
  static std::int64_t bytes(std::int64_t n) {
    Arena counted;
    Backward(counted, n, kColumns);
    return counted.used();
  }
};

// Fills the tiles of a chunk: x, dy and z are read into x, du and gate.
void prepare(const Backward& f, const Scan& scan) {
  const Chunk& k = f.chunk;
  const bool gated = static_cast<bool>(scan.z);
  for (int t = 0; t < k.steps; ++t) {
    for (int c = 0; c < k.columns; c += kLanes) {
      const int at = t * k.columns + c;
      const FloatVec raw = load(f.raw + at) + load(k.bias + c), x = load(f.x + at);
      const FloatVec delta = scan.softplus ? softplus_of(raw) : raw;
      store(f.raw + at, raw);
      store(k.delta + at, delta);
      store(k.dx + at, delta * x);
      store(k.u + at, load(k.D + c) * x);
      store(f.ddx + at, FloatVec{});
      store(f.ddelta + at, FloatVec{});
      if (gated) {
        const FloatVec dy = load(f.du + at), z = load(f.gate + at), s = sigmoid_of(z);
        store(f.du + at, dy * z * s);
        store(f.gate + at, dy * s * fma(z, splat(1.0f) - s, splat(1.0f)));
      }
    }
  }
}

// States [i, i + M) of the vector at column c from the chunk's end to its beginning. decays and
// states are what advance() kept.
template <int M>
ANYMAMBA_INLINE void retreat(const Backward& f, std::int64_t i, int c) {
  const Chunk& k = f.chunk;
  FloatVec A[M], carry[M], dA[M], h[M];
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) {
    A[j] = load(k.A + (i + j) * k.columns + c);
    carry[j] = load(f.carry + (i + j) * k.columns + c);
    dA[j] = load(f.dA + (i + j) * k.columns + c);
    h[j] = load(f.states + (k.steps * M + j) * kLanes);
  }
  for (int t = k.steps - 1; t >= 0; --t) {
    const int at = t * k.columns + c;
    const FloatVec delta = load(k.delta + at), dx = load(k.dx + at), du = load(f.du + at);
    const float *B = k.B + t * k.n + i, *C = k.C + t * k.n + i;
    FloatVec ddx{}, ddelta{};
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
      const int here = (t * M + j) * kLanes;
      const FloatVec g = fma(splat(C[j]), du, carry[j]);
      store(f.dB + here, fma(g, dx, load(f.dB + here)));
      store(f.dC + here, fma(h[j], du, load(f.dC + here)));
      ddx = j == 0 ? g * splat(B[j]) : fma(g, splat(B[j]), ddx);
      carry[j] = g * load(f.decays + here);
      h[j] = load(f.states + here);
      const FloatVec ddelta_A = carry[j] * h[j];
      ddelta = j == 0 ? A[j] * ddelta_A : fma(A[j], ddelta_A, ddelta);
      dA[j] = fma(delta, ddelta_A, dA[j]);
    }
    store(f.ddx + at, load(f.ddx + at) + ddx);
    store(f.ddelta + at, load(f.ddelta + at) + ddelta);
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) {
    store(f.carry + (i + j) * k.columns + c, carry[j]);
    store(f.dA + (i + j) * k.columns + c, dA[j]);
  }
}

// out[t, j] += the sum of sums[t, j, :], for t < steps and j < M. Rows of out are `stride` apart.
template <int M>
void add_sums(float* out, std::int64_t stride, const float* sums, int steps) {
  for (int first = 0; first < steps * M; first += kLanes) {
    float totals[kLanes];
    store(totals, row_sums(sums + first * kLanes));
    for (int r = 0; r < kLanes && first + r < steps * M; ++r)
      out[(first + r) / M * stride + (first + r) % M] += totals[r];
  }
}

// States [i, i + M) of all columns; dB and dC point to the chunk's first step and state i.
template <int M>
void differentiate(const Backward& f, std::int64_t i, float* dB, float* dC, std::int64_t stride) {
  const Chunk& k = f.chunk;
  fill_zeros(f.dB, kChunkSteps * M * kLanes);
  fill_zeros(f.dC, kChunkSteps * M * kLanes);
  for (int c = 0; c < k.columns; c += kLanes) {
    advance<M, true>(k, i, c, f.decays, f.states);
    retreat<M>(f, i, c);
  }
  add_sums<M>(dB, stride, f.dB, k.steps);
  add_sums<M>(dC, stride, f.dC, k.steps);
}

// From the sums over states to the gradients of x, delta and z, left in dx, ddelta and gate; dD
// and dbias grow.
void finish(const Backward& f, const Scan& scan) {
  const Chunk& k = f.chunk;
  for (int t = 0; t < k.steps; ++t) {
    for (int c = 0; c < k.columns; c += kLanes) {
      const int at = t * k.columns + c;
      const FloatVec x = load(f.x + at), du = load(f.du + at), ddx = load(f.ddx + at);
      // A carries a factor log2(e), which comes off here.
      FloatVec ddelta = fma(load(f.ddelta + at), splat(1 / kLog2e), ddx * x);
      if (scan.softplus) ddelta = ddelta * sigmoid_of(load(f.raw + at));
      store(k.dx + at, fma(ddx, load(k.delta + at), load(k.D + c) * du));
      store(f.ddelta + at, ddelta);
      store(f.gate + at, load(f.gate + at) * load(k.u + at));
      store(f.dD + c, fma(du, x, load(f.dD + c)));
      store(f.dbias + c, load(f.dbias + c) + ddelta);
    }
  }
}

// One chunk. dB and dC are one part's (rows, steps, groups, n).
void backward_chunk(const Scan& scan, const ScanGradients& grads, Backward& f, const Block& b,
                    const SegmentSlice& slice, const float* checkpoint, float* dB, float* dC) {
  Chunk& k = f.chunk;
  k.steps = static_cast<int>(slice.steps);
  read_tile(f.raw, scan.delta, slice, b);
  read_tile(f.x, scan.x, slice, b);
  read_tile(f.du, grads.y, slice, b);
  if (scan.z) read_tile(f.gate, scan.z, slice, b);
  k.read_projections(scan, slice, b);
  load_checkpoint(k.h, checkpoint, b, scan.n);
  prepare(f, scan);
  const std::int64_t group = b.first / (scan.e / scan.groups);
  const std::int64_t start = ((slice.row * grads.steps + slice.first) * scan.groups + group) * scan.n;
  const std::int64_t stride = slice.direction * scan.groups * scan.n;
  std::int64_t i = 0;
  for (; i + kStates <= scan.n; i += kStates)
    differentiate<kStates>(f, i, dB + start + i, dC + start + i, stride);
  for (; i < scan.n; ++i) differentiate<1>(f, i, dB + start + i, dC + start + i, stride);
  finish(f, scan);
  if (grads.x) write_tile(k.dx, grads.x, slice, b);
  if (grads.delta) write_tile(f.ddelta, grads.delta, slice, b);
  if (scan.z && grads.z) write_tile(f.gate, grads.z, slice, b);
}

// Gradients that several work items add to are kept apart in parts, and added in one order
// afterwards: a part is some blocks of channels for B and C, some segments for A, D and the bias.
struct Partials {
  std::int64_t blocks, segments;               // in one part
  std::int64_t channel_parts, segment_parts;   // channel parts for each group
  std::int64_t shared;                         // floats of B's gradient
  Scratch<float> dB, dC;                       // (channel_parts, rows, steps, groups, n)
  Scratch<float> dA, dD, dbias;                // (segment_parts, e, n), (., e), (., e)

  Partials(const Scan& scan, const ScanGradients& grads)
      : blocks(larger(1, ceil_div(blocks_per_group(scan) * scan.groups, kPartials))),
        segments(ceil_div(scan.segments.count, kPartials)),
        channel_parts(ceil_div(blocks_per_group(scan), blocks)),
        segment_parts(segments == 0 ? 0 : ceil_div(scan.segments.count, segments)),
        shared(grads.rows * grads.steps * scan.groups * scan.n),
        dB(channel_parts * shared),
        dC(channel_parts * shared),
        dA(segment_parts * scan.e * scan.n),
        dD(segment_parts * scan.e),
        dbias(segment_parts * scan.e) {}
};

// All segments of one part for one block of channels.
void backward_block(const Scan& scan, const ScanGradients& grads, const Partials& partials,
                    std::int64_t segment_part, std::int64_t channel_part, const Block& b,
                    const std::int64_t* first_chunk, Arena& memory) {
  Backward f(memory, scan.n, b.columns);
  const std::int64_t e = scan.e, n = scan.n;
  f.chunk.read_parameters(scan, b);
  fill_zeros(f.dA, n * b.columns);
  fill_zeros(f.dD, b.columns);
  fill_zeros(f.dbias, b.columns);
  const std::int64_t stop = smaller(scan.segments.count, (segment_part + 1) * partials.segments);
  for (std::int64_t s = segment_part * partials.segments; s < stop; ++s) {
    const SegmentSlice segment = slice_of(scan.segments, s);
    read_states_or_zeros(f.carry, grads.last, segment.state_out, scan, b);
    for (std::int64_t chunk = chunks_of(segment) - 1; chunk >= 0; --chunk)
      backward_chunk(scan, grads, f, b, chunk_of(segment, chunk),
                     checkpoint_of(const_cast<float*>(grads.checkpoints), first_chunk[s] + chunk,
                                   scan, b),
                     partials.dB + channel_part * partials.shared,
                     partials.dC + channel_part * partials.shared);
    if (grads.initial != nullptr && segment.state_in >= 0)
      write_states(grads.initial + segment.state_in * e * n, f.carry, b, n);
  }
  write_states(partials.dA + segment_part * e * n, f.dA, b, n);
  for (int c = 0; c < b.channels; ++c) {
    partials.dD[segment_part * e + b.first + c] = f.dD[c];
    partials.dbias[segment_part * e + b.first + c] = f.dbias[c];
  }
}

constexpr std::int64_t kFloatsAtOnce = 4096;  // that one item clears or adds

void clear(float* p, std::int64_t count) {
  parallel_for(ceil_div(count, kFloatsAtOnce), [&](std::int64_t item) {
    const std::int64_t first = item * kFloatsAtOnce;
    fill_zeros(p + first, smaller(kFloatsAtOnce, count - first));
  });
}

// out (count) = the sum of partials (parts, count) over the parts.
void add_parts(float* out, const float* partials, std::int64_t parts, std::int64_t count) {
  if (out == nullptr) return;
  parallel_for(ceil_div(count, kFloatsAtOnce), [&](std::int64_t item) {
    const std::int64_t first = item * kFloatsAtOnce, stop = smaller(count, first + kFloatsAtOnce);
    fill_zeros(out + first, stop - first);
    for (std::int64_t part = 0; part < parts; ++part)
      for (std::int64_t i = first; i < stop; ++i) out[i] += partials[part * count + i];
  });
}

}  // namespace

void scan_backward(const Scan& scan, const ScanGradients& grads) {
  const std::int64_t e = scan.e, n = scan.n;
  const Scratch<std::int64_t> first_chunk(scan.segments.count);
  count_chunks(first_chunk, scan.segments);
  const Partials partials(scan, grads);
  clear(partials.dB, partials.channel_parts * partials.shared);
  clear(partials.dC, partials.channel_parts * partials.shared);
  if (grads.initial != nullptr) clear(grads.initial, grads.n_states * e * n);
  parallel_with_arena(
      partials.segment_parts * scan.groups * partials.channel_parts, Backward::bytes(n),
      [&](std::int64_t item, const Arena& empty) {
        const std::int64_t channel_part = item % partials.channel_parts;
        const std::int64_t group = item / partials.channel_parts % scan.groups;
        const std::int64_t segment_part = item / partials.channel_parts / scan.groups;
        const std::int64_t first = channel_part * partials.blocks;
        const std::int64_t stop = smaller(blocks_per_group(scan), first + partials.blocks);
        for (std::int64_t block = first; block < stop; ++block) {
          Arena memory = empty;
          backward_block(scan, grads, partials, segment_part, channel_part,
                         channel_block(scan, group, block), first_chunk, memory);
        }
      });
  add_parts(grads.B, partials.dB, partials.channel_parts, partials.shared);
  add_parts(grads.C, partials.dC, partials.channel_parts, partials.shared);
  add_parts(grads.A, partials.dA, partials.segment_parts, e * n);
  add_parts(grads.D, partials.dD, partials.segment_parts, e);
  add_parts(grads.delta_bias, partials.dbias, partials.segment_parts, e);
}

}  // namespace anymamba::ANYMAMBA_ISA
