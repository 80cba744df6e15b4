// What the forward and the backward scan share: tiles of a chunk, and the recurrence on them.
//
// Channels lie along the vector, and each channel's states are independent. A work item is a block
// of up to 64 channels of one group. It goes through time in chunks of kChunkSteps steps, small
// enough that all it reads of a chunk stays in the first two caches:
//
//   delta, dx = delta * x, u     (steps, columns)   u collects C h + D x; columns is the number of
//                                                   channels rounded up to whole vectors
//   B, C                         (steps, n)         of the block's group, as floats
//   A, h                         (n, columns)       states outside, so that a vector holds one state
//                                                   of kLanes channels
//
// Within a chunk a few states of one vector of channels go through all its steps in registers
// before the next few do, so any n runs the same code.
#pragma once

#include "base/subnormals.h"
#include "kernels/kernels.h"
#include "kernels/tile.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kColumns = kScanChannels;
constexpr int kTile = kChunkSteps * kColumns;
constexpr int kStates = 4;  // states in registers

static_assert(kColumns % kLanes == 0 && kChunkSteps % 16 == 0);

// Calls body(item, memory) for each item, on any worker, with an arena of `bytes`.
template <class Body>
void parallel_with_arena(std::int64_t items, std::int64_t bytes, const Body& body) {
  parallel_for(items, Scratch<char>::in_arena(bytes), [&](std::int64_t item) {
    const SubnormalsAreZeros fast;
    const Scratch<char> memory(bytes);
    Arena arena(memory, bytes);
    body(item, arena);
  });
}

// p may be null where there are none.
inline void fill_zeros(float* p, std::int64_t floats) {
  if (floats > 0) __builtin_memset(p, 0, static_cast<std::size_t>(floats) * sizeof(float));
}

// ---- Tiles -------------------------------------------------------------------------------------

inline std::int64_t blocks_per_group(const Scan& scan) {
  return ceil_div(scan.e / scan.groups, kColumns);
}

inline Block channel_block(const Scan& scan, std::int64_t group, std::int64_t index) {
  const std::int64_t width = scan.e / scan.groups;
  return block_of(group * width, (group + 1) * width, kColumns, index);
}

inline std::int64_t chunks_of(const SegmentSlice& segment) {
  return ceil_div(segment.steps, kChunkSteps);
}

inline SegmentSlice chunk_of(const SegmentSlice& segment, std::int64_t index) {
  const std::int64_t start = index * kChunkSteps;
  return part_of(segment, start, smaller(kChunkSteps, segment.steps - start));
}

// The sums of kLanes rows of kLanes floats, as one vector.
ANYMAMBA_INLINE FloatVec row_sums(const float* rows) {
  FloatVec m[kLanes];
  for (int i = 0; i < kLanes; ++i) m[i] = load(rows + i * kLanes);
  return sums_of_lanes(m);
}

// tile (steps, n) of B or C for one group.
inline void read_projection(float* tile, const Projection& p, const SegmentSlice& slice,
                            std::int64_t group, std::int64_t n) {
  const std::int64_t start =
      slice.row * p.row_stride + slice.first * p.step_stride + group * p.group_stride;
  const std::int64_t stride = p.step_stride * slice.direction;
  if (p.state_stride == 1) {
    for (std::int64_t t = 0; t < slice.steps; ++t) {
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes)
        store(tile + t * n + i, read_vector(p.data, p.type, start + t * stride + i));
      for (; i < n; ++i) tile[t * n + i] = read(p.data, p.type, start + t * stride + i);
    }
    return;
  }
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t t = 0; t < slice.steps; ++t)
      tile[t * n + i] = read(p.data, p.type, start + t * stride + i * p.state_stride);
}

// out (kLanes, kLanes) = in (kLanes, kLanes) transposed.
ANYMAMBA_INLINE void transpose_square(float* out, std::int64_t out_stride, const float* in,
                                      std::int64_t in_stride) {
  FloatVec m[kLanes];
  for (int i = 0; i < kLanes; ++i) m[i] = load(in + i * in_stride);
  transpose(m);
  for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, m[i]);
}

// out (n, columns) from the block's rows of in (e, n), zeros where there is no channel.
inline void read_states(float* out, const float* in, const Block& b, std::int64_t n) {
  in += b.first * n;
  const std::int64_t whole_c = b.channels / kLanes * kLanes, whole_n = n / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole_c; c += kLanes)
    for (std::int64_t i = 0; i < whole_n; i += kLanes)
      transpose_square(out + i * b.columns + c, b.columns, in + c * n + i, n);
  for (std::int64_t c = 0; c < b.columns; ++c)
    for (std::int64_t i = c < whole_c ? whole_n : 0; i < n; ++i)
      out[i * b.columns + c] = c < b.channels ? in[c * n + i] : 0.0f;
}

// The way back.
inline void write_states(float* out, const float* in, const Block& b, std::int64_t n) {
  out += b.first * n;
  const std::int64_t whole_c = b.channels / kLanes * kLanes, whole_n = n / kLanes * kLanes;
  for (std::int64_t c = 0; c < whole_c; c += kLanes)
    for (std::int64_t i = 0; i < whole_n; i += kLanes)
      transpose_square(out + c * n + i, n, in + i * b.columns + c, b.columns);
  for (std::int64_t c = 0; c < b.channels; ++c)
    for (std::int64_t i = c < whole_c ? whole_n : 0; i < n; ++i)
      out[c * n + i] = in[i * b.columns + c];
}

// The state a segment begins with, or the gradient of the one it leaves.
inline void read_states_or_zeros(float* out, const float* all, std::int64_t index,
                                 const Scan& scan, const Block& b) {
  if (all != nullptr && index >= 0)
    read_states(out, all + index * scan.e * scan.n, b, scan.n);
  else
    fill_zeros(out, scan.n * b.columns);
}

// out (columns), zeros behind the block's channels and where the parameter is absent.
inline void read_vector_of_channels(float* out, const float* parameter, const Block& b) {
  for (int c = 0; c < b.columns; ++c)
    out[c] = parameter != nullptr && c < b.channels ? parameter[b.first + c] : 0.0f;
}

// Checkpoints of a chunk: for each block (n, channels).
inline float* checkpoint_of(float* checkpoints, std::int64_t chunk, const Scan& scan, const Block& b) {
  return checkpoints + (chunk * scan.e + b.first) * scan.n;
}

inline void save_checkpoint(float* out, const float* h, const Block& b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    __builtin_memcpy(out + i * b.channels, h + i * b.columns, sizeof(float) * b.channels);
}

inline void load_checkpoint(float* h, const float* in, const Block& b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(h + i * b.columns, in + i * b.channels, sizeof(float) * b.channels);
    fill_zeros(h + i * b.columns + b.channels, b.columns - b.channels);
  }
}

// first_chunk[s]: how many chunks the segments before s have.
inline void count_chunks(std::int64_t* first_chunk, const Segments& segments) {
  std::int64_t chunks = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) {
    first_chunk[s] = chunks;
    chunks += chunks_of(slice_of(segments, s));
  }
}

// ---- The recurrence ----------------------------------------------------------------------------

// What both passes need of a chunk of a block's steps; see the top of this file.
struct Chunk {
  int steps = 0, columns;
  std::int64_t n;
  float *delta, *dx, *u;
  float *B, *C;
  float *A, *h;
  float *D, *bias;  // (columns)

  Chunk(Arena& memory, std::int64_t states, int width) : columns(width), n(states) {
    for (float** tile : {&delta, &dx, &u}) *tile = memory.floats(kTile);
    for (float** each : {&B, &C}) *each = memory.floats(kChunkSteps * n);
    for (float** each : {&A, &h}) *each = memory.floats(kColumns * n);
    for (float** each : {&D, &bias}) *each = memory.floats(kColumns);
  }

  void read_parameters(const Scan& scan, const Block& b) const {
    // A * log2(e), so that exp(delta A) is a power of two.
    read_states(A, scan.A, b, n);
    for (std::int64_t i = 0; i < n * columns; i += kLanes) store(A + i, load(A + i) * splat(kLog2e));
    read_vector_of_channels(D, scan.D, b);
    read_vector_of_channels(bias, scan.delta_bias, b);
  }

  void read_projections(const Scan& scan, const SegmentSlice& slice, const Block& b) const {
    const std::int64_t group = b.first / (scan.e / scan.groups);
    read_projection(B, scan.B, slice, group, n);
    read_projection(C, scan.C, slice, group, n);
  }
};

// C h over M states of kLanes channels.
template <int M>
ANYMAMBA_INLINE FloatVec sum_of_states(const FloatVec* h, const float* C) {
  FloatVec sum = h[0] * splat(C[0]);
#pragma GCC unroll 16
  for (int j = 1; j < M; ++j) sum = fma(h[j], splat(C[j]), sum);
  return sum;
}

// Takes states [i, i + M) of the vector at column c through the chunk. With kKeep it leaves each
// step's decay in decays (steps, M, kLanes) and the states in states (steps + 1, M, kLanes); without
// it, each step asks for memory ahead.
template <int M, bool kKeep>
ANYMAMBA_INLINE void advance(const Chunk& k, std::int64_t i, int c, float* decays, float* states,
                             Ahead ahead = {}) {
  FloatVec A[M], h[M];
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) {
    A[j] = load(k.A + (i + j) * k.columns + c);
    h[j] = load(k.h + (i + j) * k.columns + c);
    if (kKeep) store(states + j * kLanes, h[j]);
  }
  for (int t = 0; t < k.steps; ++t) {
    const FloatVec delta = load(k.delta + t * k.columns + c), dx = load(k.dx + t * k.columns + c);
    const float *B = k.B + t * k.n + i, *C = k.C + t * k.n + i;
    if (!kKeep) ahead.fetch_line();
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
      const FloatVec decay = exp2_of(delta * A[j]);
      h[j] = fma(decay, h[j], dx * splat(B[j]));
      if (kKeep) {
        store(decays + (t * M + j) * kLanes, decay);
        store(states + ((t + 1) * M + j) * kLanes, h[j]);
      }
    }
    float* u = k.u + t * k.columns + c;
    store(u, M == 1 ? fma(h[0], splat(C[0]), load(u)) : load(u) + sum_of_states<M>(h, C));
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) store(k.h + (i + j) * k.columns + c, h[j]);
}

}  // namespace
}  // namespace anymamba::ANYMAMBA_ISA
