// The selective scan. Channels lie along the vector, and each channel's states are independent.
//
// A work item is a block of up to 64 channels of one group. It walks through time in chunks of
// kChunkSteps steps, small enough that all it reads of a chunk stays in the first two caches:
//
//   delta, dx = delta * x, u     (steps, columns)   u collects C h + D x; columns is the number of
//                                                   channels rounded up to whole vectors
//   B, C                         (steps, n)         of the block's group, as floats
//   A, h                         (n, columns)       states outside, so that a vector is kLanes channels
//
// Within a chunk a few states of one vector of channels go through all its steps in registers
// before the next few do, so any n runs the same code.
#include "kernels/scan.h"

#include "kernels/kernels.h"
#include "base/subnormals.h"
#include "simd/math.h"
#include "simd/scratch.h"
#include "simd/tile.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kColumns = 64;    // channels of a block
constexpr int kTile = kChunkSteps * kColumns;
constexpr int kPartials = 16;   // at most so many partial sums of a gradient are kept apart
constexpr int kStates = 4;            // states in registers

static_assert(kColumns % kLanes == 0 && kChunkSteps % 16 == 0);

// ---- Memory ------------------------------------------------------------------------------------

// Cuts a worker's memory into pieces, each on a cache line's border.
class Pieces {
 public:
  explicit Pieces(float* memory) : next_(memory) {}
  float* take(std::int64_t floats) {
    float* piece = next_;
    next_ += ceil_div(floats, 16) * 16;
    return piece;
  }

 private:
  float* next_;
};

// Calls body(item, pieces) for each item, on any worker, with `floats` floats that are the
// worker's own.
template <class Body>
void parallel_with_pieces(std::int64_t items, std::int64_t floats, const Body& body) {
  parallel_for(items, Scratch<float>::in_arena(floats), [&](std::int64_t item) {
    const SubnormalsAreZeros fast;
    const Scratch<float> memory(floats);
    body(item, Pieces(memory));
  });
}

void fill_zeros(float* p, std::int64_t floats) {
  __builtin_memset(p, 0, static_cast<std::size_t>(floats) * sizeof(float));
}

// ---- Vectors as rows of a matrix ---------------------------------------------------------------

// The sums of kLanes rows of kLanes floats, as one vector.
ANYMAMBA_INLINE FloatVec row_sums(const float* rows) {
  FloatVec m[kLanes];
  for (int i = 0; i < kLanes; ++i) m[i] = load(rows + i * kLanes);
  return sums_of_lanes(m);
}

// out (kLanes, kLanes) = in (kLanes, kLanes) transposed; rows are so far apart as the strides say.
ANYMAMBA_INLINE void transpose_square(float* out, std::int64_t out_stride, const float* in,
                                      std::int64_t in_stride) {
  FloatVec m[kLanes];
  for (int i = 0; i < kLanes; ++i) m[i] = load(in + i * in_stride);
  transpose(m);
  for (int i = 0; i < kLanes; ++i) store(out + i * out_stride, m[i]);
}

// ---- Blocks, walks and the tiles they need -----------------------------------------------------

struct Block {
  std::int64_t group, first;  // its group, its first channel
  int channels, columns;
};

std::int64_t blocks_per_group(const Scan& scan) { return ceil_div(scan.e / scan.groups, kColumns); }

Block block_of(const Scan& scan, std::int64_t group, std::int64_t index) {
  const std::int64_t width = scan.e / scan.groups, before = index * kColumns;
  const int channels = static_cast<int>(smaller(kColumns, width - before));
  return {group, group * width + before, channels, (channels + kLanes - 1) / kLanes * kLanes};
}

// A stretch of steps of a row, in the order of the recurrence.
struct SegmentSlice {
  std::int64_t row, first, direction, steps;

  SegmentSlice chunk(std::int64_t index) const {
    const std::int64_t before = index * kChunkSteps;
    return {row, first + before * direction, direction, smaller(kChunkSteps, steps - before)};
  }
  std::int64_t chunks() const { return ceil_div(steps, kChunkSteps); }
};

SegmentSlice slice_of(const Segments& s, std::int64_t i) {
  const std::int64_t steps = s.stops[i] - s.starts[i];
  if (s.reverse) return {s.rows[i], s.stops[i] - 1, -1, steps};
  return {s.rows[i], s.starts[i], 1, steps};
}

void read_tile(float* tile, const Tensor3& tensor, const SegmentSlice& w, const Block& b) {
  load_tile(tile, b.columns, tensor, w.row, w.first, w.direction, static_cast<int>(w.steps),
            b.first, b.channels);
}

void write_tile(const float* tile, const Tensor3& tensor, const SegmentSlice& w, const Block& b) {
  store_tile(tile, b.columns, tensor, w.row, w.first, w.direction, static_cast<int>(w.steps),
             b.first, b.channels);
}

// tile (steps, n) of B or C for one group.
void read_projection(float* tile, const Projection& p, const SegmentSlice& w, std::int64_t group,
                     std::int64_t n) {
  const std::int64_t start =
      w.row * p.row_stride + w.first * p.step_stride + group * p.group_stride;
  const std::int64_t stride = p.step_stride * w.direction;
  if (p.state_stride == 1) {
    for (std::int64_t t = 0; t < w.steps; ++t) {
      std::int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes)
        store(tile + t * n + i, read_vector(p.data, p.type, start + t * stride + i));
      for (; i < n; ++i) tile[t * n + i] = read(p.data, p.type, start + t * stride + i);
    }
    return;
  }
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t t = 0; t < w.steps; ++t)
      tile[t * n + i] = read(p.data, p.type, start + t * stride + i * p.state_stride);
}

// out (n, columns) from the block's rows of in (e, n), zeros where there is no channel.
void read_states(float* out, const float* in, const Block& b, std::int64_t n) {
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
void write_states(float* out, const float* in, const Block& b, std::int64_t n) {
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
void read_states_or_zeros(float* out, const float* all, std::int64_t index, const Scan& scan,
                          const Block& b) {
  if (all != nullptr && index >= 0)
    read_states(out, all + index * scan.e * scan.n, b, scan.n);
  else
    fill_zeros(out, scan.n * b.columns);
}

// A * log2(e) as (n, columns), so that exp(delta A) is a power of two.
void read_A(float* out, const Scan& scan, const Block& b) {
  read_states(out, scan.A, b, scan.n);
  for (std::int64_t i = 0; i < scan.n * b.columns; i += kLanes)
    store(out + i, load(out + i) * splat(kLog2e));
}

// out (columns), zeros behind the block's channels and where the parameter is absent.
void read_parameter(float* out, const float* parameter, const Block& b) {
  for (int c = 0; c < b.columns; ++c)
    out[c] = parameter != nullptr && c < b.channels ? parameter[b.first + c] : 0.0f;
}

// Checkpoints of a chunk: for each block (n, channels).
float* checkpoint_of(float* checkpoints, std::int64_t chunk, const Scan& scan, const Block& b) {
  return checkpoints + (chunk * scan.e + b.first) * scan.n;
}

void save_checkpoint(float* out, const float* h, const Block& b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i)
    __builtin_memcpy(out + i * b.channels, h + i * b.columns, sizeof(float) * b.channels);
}

void load_checkpoint(float* h, const float* in, const Block& b, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(h + i * b.columns, in + i * b.channels, sizeof(float) * b.channels);
    fill_zeros(h + i * b.columns + b.channels, b.columns - b.channels);
  }
}

// first_chunk[s]: how many chunks the segments before s have.
void count_chunks(Scratch<std::int64_t>& first_chunk, const Segments& segments) {
  std::int64_t chunks = 0;
  for (std::int64_t s = 0; s < segments.count; ++s) {
    first_chunk[s] = chunks;
    chunks += scan_chunks(segments, s);
  }
}

// Asks for part `part` of `parts` of a tile that will be read or written later. Its rows are far
// apart, which hardware does not foresee.
void prefetch_tile(const Tensor3& tensor, const SegmentSlice& w, const Block& b, std::int64_t part,
                   std::int64_t parts) {
  const bool by_step = tensor.channel_stride == 1;
  if (!tensor || w.steps == 0 || (!by_step && tensor.step_stride != 1)) return;
  const std::int64_t size = static_cast<std::int64_t>(size_of(tensor.type));
  const std::int64_t lowest = w.direction > 0 ? w.first : w.first - (w.steps - 1);
  const char* start = static_cast<const char*>(tensor.data) +
                      (w.row * tensor.row_stride + lowest * tensor.step_stride +
                       b.first * tensor.channel_stride) * size;
  const std::int64_t rows = by_step ? w.steps : b.channels;
  const std::int64_t bytes = (by_step ? b.channels : w.steps) * size;
  const std::int64_t stride = (by_step ? tensor.step_stride : tensor.channel_stride) * size;
  for (std::int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row)
    for (std::int64_t byte = 0; byte < bytes; byte += 64)
      __builtin_prefetch(start + row * stride + byte, 0, 2);
}

// ---- The recurrence ----------------------------------------------------------------------------

// What both passes need of a chunk; see the top of this file.
struct Chunk {
  int steps, columns;
  std::int64_t n;
  float *delta, *dx, *u;
  float *B, *C;
  float *A, *h;
};

// Takes states [i, i + M) of the vector at column c through the chunk. With kKeep it leaves each
// step's decay in decays (steps, M, kLanes) and the states in states (steps + 1, M, kLanes).
template <int M, bool kKeep>
ANYMAMBA_INLINE void advance(const Chunk& k, std::int64_t i, int c, float* decays, float* states) {
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
    FloatVec sum{};
#pragma GCC unroll 16
    for (int j = 0; j < M; ++j) {
      const FloatVec decay = exp2_of(delta * A[j]);
      h[j] = fma(decay, h[j], dx * splat(B[j]));
      sum = j == 0 ? h[j] * splat(C[j]) : fma(h[j], splat(C[j]), sum);
      if (kKeep) {
        store(decays + (t * M + j) * kLanes, decay);
        store(states + ((t + 1) * M + j) * kLanes, h[j]);
      }
    }
    float* u = k.u + t * k.columns + c;
    store(u, load(u) + sum);
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; ++j) store(k.h + (i + j) * k.columns + c, h[j]);
}

// ---- Forward -----------------------------------------------------------------------------------

struct Forward {
  Chunk chunk;
  float *D, *bias;  // (columns)

  Forward(Pieces pieces, const Scan& scan, const Block& b) {
    chunk.columns = b.columns;
    chunk.n = scan.n;
    chunk.delta = pieces.take(kTile);
    chunk.dx = pieces.take(kTile);
    chunk.u = pieces.take(kTile);
    chunk.B = pieces.take(kChunkSteps * scan.n);
    chunk.C = pieces.take(kChunkSteps * scan.n);
    chunk.A = pieces.take(kColumns * scan.n);
    chunk.h = pieces.take(kColumns * scan.n);
    D = pieces.take(kColumns);
    bias = pieces.take(kColumns);
  }
  static std::int64_t floats(std::int64_t n) {
    return 3 * kTile + 2 * kChunkSteps * n + 2 * kColumns * n + 2 * kColumns;
  }
};

// delta = softplus(delta + bias), u = D x, dx = delta x. On entry dx is x.
void prepare(const Forward& f, bool softplus) {
  const Chunk& k = f.chunk;
  for (int t = 0; t < k.steps; ++t) {
    for (int c = 0; c < k.columns; c += kLanes) {
      const int at = t * k.columns + c;
      const FloatVec raw = load(k.delta + at) + load(f.bias + c), x = load(k.dx + at);
      const FloatVec delta = softplus ? softplus_of(raw) : raw;
      store(k.delta + at, delta);
      store(k.dx + at, delta * x);
      store(k.u + at, load(f.D + c) * x);
    }
  }
}

// All states of all columns. Between vectors the next chunk's tensors are asked for.
void advance_all(const Scan& scan, const ScanResult& result, const Chunk& k, const Block& b,
                 const SegmentSlice& next) {
  const std::int64_t parts = k.columns / kLanes;
  for (int c = 0; c < k.columns; c += kLanes) {
    for (const Tensor3* tensor : {&scan.x, &scan.delta, &scan.z, &result.y})
      prefetch_tile(*tensor, next, b, c / kLanes, parts);
    std::int64_t i = 0;
    for (; i + kStates <= k.n; i += kStates) advance<kStates, false>(k, i, c, nullptr, nullptr);
    for (; i < k.n; ++i) advance<1, false>(k, i, c, nullptr, nullptr);
  }
}

// u *= silu(z), z being read over delta, which is spent.
void apply_gate(const Scan& scan, const Chunk& k, const SegmentSlice& w, const Block& b) {
  float* z = k.delta;
  read_tile(z, scan.z, w, b);
  for (int at = 0; at < k.steps * k.columns; at += kLanes)
    store(k.u + at, load(k.u + at) * silu_of(load(z + at)));
}

// One segment of one block of channels.
void scan_block(const Scan& scan, const ScanResult& result, std::int64_t segment, const Block& b,
                float* checkpoints, Pieces pieces) {
  Forward f(pieces, scan, b);
  Chunk& k = f.chunk;
  const Segments& segments = scan.segments;
  const SegmentSlice slice = slice_of(segments, segment);
  read_A(k.A, scan, b);
  read_parameter(f.D, scan.D, b);
  read_parameter(f.bias, scan.delta_bias, b);
  read_states_or_zeros(k.h, scan.initial, segments.state_in[segment], scan, b);
  for (std::int64_t chunk = 0; chunk < slice.chunks(); ++chunk) {
    const SegmentSlice w = slice.chunk(chunk);
    k.steps = static_cast<int>(w.steps);
    if (checkpoints != nullptr)
      save_checkpoint(checkpoint_of(checkpoints, chunk, scan, b), k.h, b, scan.n);
    read_tile(k.delta, scan.delta, w, b);
    read_tile(k.dx, scan.x, w, b);
    read_projection(k.B, scan.B, w, b.group, scan.n);
    read_projection(k.C, scan.C, w, b.group, scan.n);
    prepare(f, scan.softplus);
    advance_all(scan, result, k, b, chunk + 1 < slice.chunks() ? slice.chunk(chunk + 1) : SegmentSlice{});
    if (scan.z) apply_gate(scan, k, w, b);
    write_tile(k.u, result.y, w, b);
  }
  const std::int64_t state_out = segments.state_out[segment];
  if (result.last != nullptr && state_out >= 0)
    write_states(result.last + state_out * scan.e * scan.n, k.h, b, scan.n);
}

// ---- Backward ----------------------------------------------------------------------------------
//
// With g_t the gradient of h_t, and a_t = exp(delta_t A):
//
//   g_t     = C_t du_t + a_{t+1} g_{t+1}        du = dy silu(z)
//   dB_t    = sum over channels of g_t dx_t     dC_t = sum over channels of h_t du_t
//   d(dx_t) = sum over states of g_t B_t
//   d(delta_t A) = a_t g_t h_{t-1}              whence ddelta sums A times it over the states,
//                                               and dA sums delta_t times it over the steps

struct Backward {
  Chunk chunk;
  float *raw, *x;        // (steps, columns): delta before softplus, and x
  float *du, *gate;      // (steps, columns): dy silu(z), and dy silu'(z)
  float *ddx, *ddelta;   // (steps, columns): the sums over states
  float *carry, *dA;     // (n, columns): a_{t+1} g_{t+1}, and the sum over steps so far
  float *decays, *states;  // (steps, kStates, kLanes) and (steps + 1, kStates, kLanes) of the states at work
  float *dB, *dC;        // (steps, kStates, kLanes): sums over the block's vectors
  float *D, *bias, *dD, *dbias;  // (columns)

  Backward(Pieces pieces, const Scan& scan, const Block& b) {
    chunk.columns = b.columns;
    chunk.n = scan.n;
    for (float** tile : {&chunk.delta, &chunk.dx, &chunk.u, &raw, &x, &du, &gate, &ddx, &ddelta})
      *tile = pieces.take(kTile);
    for (float** tile : {&chunk.B, &chunk.C}) *tile = pieces.take(kChunkSteps * scan.n);
    for (float** each : {&chunk.A, &chunk.h, &carry, &dA}) *each = pieces.take(kColumns * scan.n);
    for (float** each : {&decays, &dB, &dC}) *each = pieces.take(kChunkSteps * kStates * kLanes);
    states = pieces.take((kChunkSteps + 1) * kStates * kLanes);
    for (float** each : {&D, &bias, &dD, &dbias}) *each = pieces.take(kColumns);
  }
  static std::int64_t floats(std::int64_t n) {
    return 9 * kTile + 2 * kChunkSteps * n + 4 * kColumns * n + (4 * kChunkSteps + 2) * kStates * kLanes + 4 * kColumns;
  }
};

// Fills the tiles of a chunk: x, dy and z are read into x, du and gate.
void prepare(const Backward& f, const Scan& scan) {
  const Chunk& k = f.chunk;
  const bool gated = static_cast<bool>(scan.z);
  for (int t = 0; t < k.steps; ++t) {
    for (int c = 0; c < k.columns; c += kLanes) {
      const int at = t * k.columns + c;
      const FloatVec raw = load(f.raw + at) + load(f.bias + c), x = load(f.x + at);
      const FloatVec delta = scan.softplus ? softplus_of(raw) : raw;
      store(f.raw + at, raw);
      store(k.delta + at, delta);
      store(k.dx + at, delta * x);
      store(k.u + at, load(f.D + c) * x);
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
      store(k.dx + at, fma(ddx, load(k.delta + at), load(f.D + c) * du));
      store(f.ddelta + at, ddelta);
      store(f.gate + at, load(f.gate + at) * load(k.u + at));
      store(f.dD + c, fma(du, x, load(f.dD + c)));
      store(f.dbias + c, load(f.dbias + c) + ddelta);
    }
  }
}

// One chunk. dB and dC are one lane's (rows, steps, groups, n).
void backward_chunk(const Scan& scan, const ScanGradients& grads, Backward& f, const Block& b,
                    const SegmentSlice& w, const float* checkpoint, float* dB, float* dC) {
  Chunk& k = f.chunk;
  k.steps = static_cast<int>(w.steps);
  read_tile(f.raw, scan.delta, w, b);
  read_tile(f.x, scan.x, w, b);
  read_tile(f.du, grads.y, w, b);
  if (scan.z) read_tile(f.gate, scan.z, w, b);
  read_projection(k.B, scan.B, w, b.group, scan.n);
  read_projection(k.C, scan.C, w, b.group, scan.n);
  load_checkpoint(k.h, checkpoint, b, scan.n);
  prepare(f, scan);
  const std::int64_t start = ((w.row * grads.steps + w.first) * scan.groups + b.group) * scan.n;
  const std::int64_t stride = w.direction * scan.groups * scan.n;
  std::int64_t i = 0;
  for (; i + kStates <= scan.n; i += kStates) differentiate<kStates>(f, i, dB + start + i, dC + start + i, stride);
  for (; i < scan.n; ++i) differentiate<1>(f, i, dB + start + i, dC + start + i, stride);
  finish(f, scan);
  if (grads.x) write_tile(k.dx, grads.x, w, b);
  if (grads.delta) write_tile(f.ddelta, grads.delta, w, b);
  if (scan.z && grads.z) write_tile(f.gate, grads.z, w, b);
}

// Gradients that several work items add to are kept apart, lane by lane, and added in one order
// afterwards: a lane is some blocks of channels for B and C, some segments for A, D and the bias.
struct Lanes {
  std::int64_t blocks, segments;  // in one lane
  std::int64_t channel, segment;  // how many lanes (channel lanes for each group)
  std::int64_t shared;            // floats of B's gradient
  Scratch<float> dB, dC;          // (channel, rows, steps, groups, n)
  Scratch<float> dA, dD, dbias;   // (segment, e, n), (segment, e), (segment, e)

  Lanes(const Scan& scan, const ScanGradients& grads)
      : blocks(larger(1, ceil_div(blocks_per_group(scan) * scan.groups, kPartials))),
        segments(ceil_div(scan.segments.count, kPartials)),
        channel(ceil_div(blocks_per_group(scan), blocks)),
        segment(segments == 0 ? 0 : ceil_div(scan.segments.count, segments)),
        shared(grads.rows * grads.steps * scan.groups * scan.n),
        dB(channel * shared),
        dC(channel * shared),
        dA(segment * scan.e * scan.n),
        dD(segment * scan.e),
        dbias(segment * scan.e) {}
};

// All segments of one lane for one block of channels.
void backward_block(const Scan& scan, const ScanGradients& grads, Lanes& lanes,
                    std::int64_t segment_lane, std::int64_t channel_lane, const Block& b,
                    Scratch<std::int64_t>& first_chunk, Pieces pieces) {
  Backward f(pieces, scan, b);
  const std::int64_t e = scan.e, n = scan.n;
  const Segments& segments = scan.segments;
  read_A(f.chunk.A, scan, b);
  read_parameter(f.D, scan.D, b);
  read_parameter(f.bias, scan.delta_bias, b);
  fill_zeros(f.dA, n * b.columns);
  fill_zeros(f.dD, b.columns);
  fill_zeros(f.dbias, b.columns);
  const std::int64_t stop = smaller(segments.count, (segment_lane + 1) * lanes.segments);
  for (std::int64_t s = segment_lane * lanes.segments; s < stop; ++s) {
    const SegmentSlice slice = slice_of(segments, s);
    read_states_or_zeros(f.carry, grads.last, segments.state_out[s], scan, b);
    for (std::int64_t chunk = slice.chunks() - 1; chunk >= 0; --chunk)
      backward_chunk(scan, grads, f, b, slice.chunk(chunk),
                     checkpoint_of(const_cast<float*>(grads.checkpoints), first_chunk[s] + chunk,
                                   scan, b),
                     lanes.dB + channel_lane * lanes.shared,
                     lanes.dC + channel_lane * lanes.shared);
    if (grads.initial != nullptr && segments.state_in[s] >= 0)
      write_states(grads.initial + segments.state_in[s] * e * n, f.carry, b, n);
  }
  write_states(lanes.dA + segment_lane * e * n, f.dA, b, n);
  for (int c = 0; c < b.channels; ++c) {
    lanes.dD[segment_lane * e + b.first + c] = f.dD[c];
    lanes.dbias[segment_lane * e + b.first + c] = f.dbias[c];
  }
}

constexpr std::int64_t kSpan = 4096;  // floats that one item clears or adds

void clear(float* p, std::int64_t count) {
  parallel_for(ceil_div(count, kSpan), [&](std::int64_t item) {
    fill_zeros(p + item * kSpan, smaller(kSpan, count - item * kSpan));
  });
}

// out (count) = the sum over lanes of partials (lanes, count).
void add_lanes(float* out, const float* partials, std::int64_t lanes, std::int64_t count) {
  if (out == nullptr) return;
  parallel_for(ceil_div(count, kSpan), [&](std::int64_t item) {
    const std::int64_t first = item * kSpan, stop = smaller(count, first + kSpan);
    fill_zeros(out + first, stop - first);
    for (std::int64_t lane = 0; lane < lanes; ++lane)
      for (std::int64_t i = first; i < stop; ++i) out[i] += partials[lane * count + i];
  });
}

}  // namespace

void scan(const Scan& scan, const ScanResult& result) {
  const std::int64_t per_group = blocks_per_group(scan), blocks = per_group * scan.groups;
  Scratch<std::int64_t> first_chunk(scan.segments.count);
  count_chunks(first_chunk, scan.segments);
  parallel_with_pieces(
      scan.segments.count * blocks, Forward::floats(scan.n), [&](std::int64_t item, Pieces pieces) {
        const std::int64_t s = item / blocks, block = item % blocks;
        float* checkpoints = result.checkpoints;
        if (checkpoints != nullptr) checkpoints += first_chunk[s] * scan.e * scan.n;
        scan_block(scan, result, s, block_of(scan, block / per_group, block % per_group),
                   checkpoints, pieces);
      });
}

void scan_backward(const Scan& scan, const ScanGradients& grads) {
  const std::int64_t e = scan.e, n = scan.n;
  Scratch<std::int64_t> first_chunk(scan.segments.count);
  count_chunks(first_chunk, scan.segments);
  Lanes lanes(scan, grads);
  clear(lanes.dB, lanes.channel * lanes.shared);
  clear(lanes.dC, lanes.channel * lanes.shared);
  if (grads.initial != nullptr) clear(grads.initial, grads.n_states * e * n);
  parallel_with_pieces(
      lanes.segment * scan.groups * lanes.channel, Backward::floats(n),
      [&](std::int64_t item, Pieces pieces) {
        const std::int64_t channel_lane = item % lanes.channel;
        const std::int64_t group = item / lanes.channel % scan.groups;
        const std::int64_t segment_lane = item / lanes.channel / scan.groups;
        const std::int64_t first = channel_lane * lanes.blocks;
        const std::int64_t stop = smaller(blocks_per_group(scan), first + lanes.blocks);
        for (std::int64_t block = first; block < stop; ++block)
          backward_block(scan, grads, lanes, segment_lane, channel_lane,
                         block_of(scan, group, block), first_chunk, pieces);
      });
  add_lanes(grads.B, lanes.dB, lanes.channel, lanes.shared);
  add_lanes(grads.C, lanes.dC, lanes.channel, lanes.shared);
  add_lanes(grads.A, lanes.dA, lanes.segment, e * n);
  add_lanes(grads.D, lanes.dD, lanes.segment, e);
  add_lanes(grads.delta_bias, lanes.dbias, lanes.segment, e);
}

// ---- One step ----------------------------------------------------------------------------------

namespace {

// Up to kLanes channels of one row and one group. Here a vector holds states of one channel, as the
// state lies in memory; B and C are (n) rounded up to whole vectors with zeros.
void step_channels(const ScanStep& step, std::int64_t row, std::int64_t first, int channels,
                   const float* B, const float* C) {
  float x[kLanes], delta[kLanes], z[kLanes], products[kLanes * kLanes];
  load_tile(x, kLanes, step.x, row, 0, 1, 1, first, channels);
  load_tile(delta, kLanes, step.delta, row, 0, 1, 1, first, channels);
  if (step.delta_bias != nullptr)
    store(delta, load(delta) + load_some(step.delta_bias + first, channels));
  if (step.softplus) store(delta, softplus_of(load(delta)));
  const FloatVec inputs = load(x);
  store(x, load(delta) * inputs);
  store(delta, load(delta) * splat(kLog2e));
  for (int c = 0; c < channels; ++c) {
    const float* A = step.A + (first + c) * step.n;
    float* h = step.state + row * step.state_row_stride + (first + c) * step.n;
    FloatVec y{};
    for (std::int64_t i = 0; i < step.n; i += kLanes) {
      const int count = static_cast<int>(smaller(kLanes, step.n - i));
      const bool whole = count == kLanes;
      const FloatVec decay = exp2_of(splat(delta[c]) * (whole ? load(A + i) : load_some(A + i, count)));
      const FloatVec before = whole ? load(h + i) : load_some(h + i, count);
      const FloatVec after = fma(decay, before, splat(x[c]) * load(B + i));
      whole ? store(h + i, after) : store_some(h + i, after, count);
      y = fma(after, load(C + i), y);
    }
    store(products + c * kLanes, y);
  }
  fill_zeros(products + channels * kLanes, (kLanes - channels) * kLanes);
  FloatVec y = row_sums(products);
  if (step.D != nullptr) y = fma(load_some(step.D + first, channels), inputs, y);
  if (step.z) {
    load_tile(z, kLanes, step.z, row, 0, 1, 1, first, channels);
    y = y * silu_of(load(z));
  }
  store(x, y);
  store_tile(x, kLanes, step.y, row, 0, 1, 1, first, channels);
}

}  // namespace

void scan_step(const ScanStep& step, std::int64_t first, std::int64_t last) {
  const std::int64_t width = step.e / step.groups, padded = ceil_div(step.n, kLanes) * kLanes;
  Scratch<float> projections(2 * padded);
  float *B = projections, *C = B + padded;
  const SubnormalsAreZeros fast;
  fill_zeros(B, 2 * padded);
  for (std::int64_t row = 0; row < step.b; ++row) {
    for (std::int64_t c = first; c < last;) {
      const std::int64_t group = c / width, stop = smaller(last, (group + 1) * width);
      const SegmentSlice here{row, 0, 1, 1};
      read_projection(B, step.B, here, group, step.n);
      read_projection(C, step.C, here, group, step.n);
      for (; c < stop; c += kLanes)
        step_channels(step, row, c, static_cast<int>(smaller(kLanes, stop - c)), B, C);
      c = stop;
    }
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
