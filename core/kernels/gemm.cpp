// Matrix products of any size; those of few rows go to gemv.
//
// The blocked product follows Goto and van de Geijn. Of its two operands one is read a number at a
// time and broadcast ("left", in rows), the other by whole vectors ("right", in columns):
//
//   for each block of c (rows, columns)                         a task, on any worker
//     for each cut of k (depth)                                 at most kDepth steps
//       for each part of the rows                               at most kBlockRows
//         packed (part, depth) = left                           floats, in L2
//         for each kTileColumns columns of the block
//           panel (depth, kTileColumns) = right                 floats, in L1
//           for each kTileRows rows of the part                 micro_kernel
//             sums (kTileRows, kTileVectors vectors)            in registers
//             for each step of k
//               sums += a packed number of each row x the panel's vectors
//             c (kTileRows, kTileColumns) += sums               or a buffer beside c
//
// How k is cut depends on k alone, and every number of c is summed in the order of k by one worker,
// in tiles of any size in the same way: results are the same for any number of threads and any cut
// of c.
#include "kernels/gemm_packing.h"
#include "kernels/kernels.h"
#include "simd/lanes.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Of k at a time: fewer passes over c against panels that leave L1. A panel takes 48 KiB with
// AVX-512, 24 KiB with AVX2.
constexpr int kDepth = 384;
// Of the left operand in L2: 560 rows with AVX-512, about 900 KiB.
constexpr int kBlockRows = 40 * kTileRows;
static_assert((kBlockRows * (kDepth + kRowPadding) + kTileColumns * kDepth) * 4 + 256 <= kGemmScratch);
constexpr int64_t kSumsRows = 512, kSumsColumns = 512;  // bounds of a block summed beside c
constexpr int64_t kTaskFlops = 1 << 20;  // less is not worth a hand-over to another thread
constexpr int64_t kTaskWeights = 1 << 16;  // the same where reading them is what takes the time
constexpr int64_t kGemvRows = 16, kGemvDepth = 1 << 15;  // beyond these, blocked

struct Job {
  int64_t rows, columns, depth;
  Operand left, right;
  Matrix c;
  const float* bias;  // (columns,) or null
  bool accumulate;
  int64_t most_tasks;
  bool pairs = false;
};

// Two bfloat16 neighbours along k as one number of 32 bits, where the processor multiplies such
// pairs: half as many of them, moved and packed as floats are. Only the sums know the difference.
bool multiplies_pairs(const Operand& left, const Operand& right, int64_t depth) {
  const auto in_pairs = [](const Operand& o) {
    return o.type == DType::bf16 && o.depth_stride == 1 && o.stride % 2 == 0 &&
           reinterpret_cast<std::uintptr_t>(o.data) % 4 == 0;
  };
  return kMultipliesPairs && in_pairs(left) && in_pairs(right) && depth % 2 == 0;
}

Job as_pairs(Job job) {
  for (Operand* operand : {&job.left, &job.right}) {
    operand->type = DType::f32;
    operand->stride /= 2;
  }
  job.depth /= 2;
  job.pairs = true;
  return job;
}

// A part of c.
struct Block {
  int64_t first_row, last_row, first_column, last_column;
};

// What the tiles of one panel prefetch into L2 for the next panel while they compute. It is spread
// over the loop of each tile, for a burst of prefetches would block it. There are `all` strips of
// memory, `stride` bytes apart; a tile takes `count` of them, each in `steps` steps of `step` bytes.
struct Prefetch {
  const char* data;
  int64_t all, count, stride, steps, step;
};

// tile (rows, columns) of c = left (rows, depth) right (depth, vectors * kLanes) + bias + old c.
struct Tile {
  LeftPanel left;
  const float* right;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* bias;
  bool add_old;
  bool pairs;
  Prefetch prefetch;
};

template <int R, int V, bool pairs>
void micro_kernel(const Tile& tile) {
  constexpr int kGroups = (R + 2) / 3;  // three rows share a pointer: x86 has few of them
  const int64_t stride = tile.left.stride, step = tile.left.depth_stride;
  const float *left[kGroups], *right = tile.right;
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) left[g] = tile.left.data + 3 * g * stride;
  // The tile's memory arrives during the sums. Each row of it may touch one line more than V.
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    __builtin_prefetch(tile.c + r * tile.c_stride, 1);
    __builtin_prefetch(tile.c + r * tile.c_stride + V * kLanes - 1, 1);
  }
  FloatVec sums[R][V] = {};
  // All steps of k, in as many parts as there are strips to prefetch.
  const char* strip = tile.prefetch.data;
  for (int64_t p = 0; p < tile.depth; strip += tile.prefetch.stride) {
    const int64_t stop = smaller(p + tile.prefetch.steps, tile.depth);
    const char* next = strip;
    const int64_t next_step = tile.prefetch.step;
    for (; p < stop; ++p) {
      __builtin_prefetch(next, 0, 2);
      next += next_step;
      FloatVec b[V];  // a row of the panel
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) b[v] = load(right + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const FloatVec a = splat(left[r / 3][r % 3 * stride]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          sums[r][v] = pairs ? fma_bf16_pairs(a, b[v], sums[r][v]) : fma(a, b[v], sums[r][v]);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kGroups; ++g) left[g] += step;
      right += V * kLanes;
    }
  }
  // The sums go to c.
  const int64_t c_stride = tile.c_stride;
  float* c = tile.c;
  const float* bias = tile.bias;
  const bool add_old = tile.add_old;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += c_stride)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      FloatVec sum = sums[r][v];
      if (bias != nullptr) sum += load(bias + v * kLanes);
      if (add_old) sum += load(c + v * kLanes);
      store(c + v * kLanes, sum);
    }
}

template <int R, int V, bool pairs>
ANYMAMBA_INLINE void micro_kernel_of(int64_t rows, const Tile& tile) {
  if (rows >= R) return micro_kernel<R, V, pairs>(tile);
  if constexpr (R > 1) micro_kernel_of<R - 1, V, pairs>(rows, tile);
}

template <bool pairs>
ANYMAMBA_INLINE void run_micro_kernel_of(int64_t rows, int vectors, const Tile& tile) {
  if (vectors == 2) micro_kernel_of<kTileRows, 2, pairs>(rows, tile);
  else micro_kernel_of<kTileRows, 1, pairs>(rows, tile);
}

void run_micro_kernel(int64_t rows, int vectors, const Tile& tile) {
  if (kMultipliesPairs && tile.pairs) run_micro_kernel_of<kMultipliesPairs>(rows, vectors, tile);
  else run_micro_kernel_of<false>(rows, vectors, tile);
}

// A tile of less than whole vectors is computed beside c.
void run_partial_tile(int64_t rows, int vectors, int64_t columns, const Tile& tile) {
  alignas(64) float sums[kTileRows * kTileColumns];
  Tile beside = tile;
  beside.c = sums;
  beside.c_stride = kTileColumns;
  beside.bias = nullptr;
  beside.add_old = false;
  run_micro_kernel(rows, vectors, beside);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      float* c = tile.c + i * tile.c_stride + j;
      float sum = sums[i * kTileColumns + j];
      if (tile.bias != nullptr) sum += tile.bias[j];
      if (tile.add_old) sum += *c;
      *c = sum;
    }
}

// The prefetches, over `tiles` tiles, of what pack_right will read.
Prefetch plan_prefetch(const Operand& right, int64_t first_column, int64_t columns, int64_t first_depth,
                   int64_t depth, int64_t tiles) {
  const int64_t size = size_of(right.type);
  const int64_t column = right.stride * size, step = right.depth_stride * size;
  const int64_t start = first_column * column + first_depth * step;
  const bool along_depth = right.depth_stride == 1;
  const int64_t all = along_depth ? columns : depth;
  const int64_t count = ceil_div(all, smaller(tiles, all));
  const int64_t steps = ceil_div(depth, smaller(count, depth));
  const int64_t bytes = (along_depth ? depth : columns) * size;
  const int64_t stride = along_depth ? column : step;
  return {static_cast<const char*>(right.data) + start, all, count, stride, steps,
          ceil_div(bytes, steps)};
}

// c (block) = sums (rows, stride) + biases + the old c.
void finish(const Job& job, const Block& block, const float* sums, int64_t stride) {
  const Matrix& c = job.c;
  const int64_t rows = block.last_row - block.first_row;
  const int64_t columns = block.last_column - block.first_column;
  const float* bias = job.bias ? job.bias + block.first_column : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t start =
        (block.first_row + i) * c.row_stride + block.first_column * c.column_stride;
    int64_t j = 0;
    if (c.column_stride == 1)
      for (; j + kLanes <= columns; j += kLanes) {
        FloatVec sum = load(sums + i * stride + j);
        if (bias != nullptr) sum += load(bias + j);
        if (job.accumulate) sum += read_vector(c.data, c.type, start + j);
        write_vector(c.data, c.type, start + j, sum);
      }
    for (; j < columns; ++j) {
      const int64_t index = start + j * c.column_stride;
      float sum = sums[i * stride + j];
      if (bias != nullptr) sum += bias[j];
      if (job.accumulate) sum += read(c.data, c.type, index);
      write(c.data, c.type, index, sum);
    }
  }
}

// Whether tiles are summed in c itself.
bool sums_in_place(const Job& job) {
  return job.c.type == DType::f32 && job.c.column_stride == 1;
}

// Where the tiles of a block are summed: in c, or in scratch if c is not made of rows of floats.
struct Sums {
  float* data;
  int64_t stride;
  const float* bias;
  bool add_old;
};

// sums (rows, columns) = left (rows, depth) panel (depth, columns), for the columns of one panel.
void run_panel(const LeftPanel& left, int64_t rows, const float* panel, int64_t columns,
               int64_t depth, const Sums& sums, bool pairs, const Prefetch& prefetch) {
  const int vectors = static_cast<int>(ceil_div(columns, kLanes));
  Tile tile = {left, panel, depth, sums.data, sums.stride, sums.bias, sums.add_old,
               pairs, prefetch};
  for (int64_t i = 0, strip = 0; i < rows; i += kTileRows, strip += prefetch.count) {
    tile.left.data = left.data + i * (left.stride == 1 ? depth : left.stride);
    tile.c = sums.data + i * sums.stride;
    const int64_t first_strip = smaller(strip, prefetch.all - prefetch.count);
    tile.prefetch.data = prefetch.data + first_strip * prefetch.stride;
    const int64_t tile_rows = smaller(kTileRows, rows - i);
    if (columns % kLanes == 0) run_micro_kernel(tile_rows, vectors, tile);
    else run_partial_tile(tile_rows, vectors, columns, tile);
  }
}

// How k is cut: it depends on nothing else, or sums would.
int64_t depth_step_of(const Job& job) {
  return round_up(ceil_div(job.depth, ceil_div(job.depth, kDepth)), 16);
}

// A block of rows in L2.
int64_t row_step_of(int64_t rows) {
  return round_up(ceil_div(rows, ceil_div(rows, kBlockRows)), kTileRows);
}

// The most floats that a block of so many rows or fewer takes: of packed rows, of a panel, and of
// sums beside c.
struct BlockScratch {
  int64_t left, panel, sums;
  BlockScratch(const Job& job, int64_t rows, int64_t columns)
      : left(smaller(kBlockRows, round_up(rows, kTileRows)) * (depth_step_of(job) + kRowPadding)),
        panel(kTileColumns * depth_step_of(job)),
        sums(sums_in_place(job) ? 0 : rows * round_up(columns, 16)) {}
  int64_t bytes() const {
    return Scratch<float>::in_arena(left) + Scratch<float>::in_arena(panel) +
           Scratch<float>::in_arena(sums);
  }
};

void run_block(const Job& job, const Block& block) {
  const Packing packing = packing_of(job.left.type, job.right.type);
  const int64_t rows = block.last_row - block.first_row;
  const int64_t columns = block.last_column - block.first_column;
  const int64_t row_step = row_step_of(rows), depth_step = depth_step_of(job);
  const bool in_place = sums_in_place(job);
  const int64_t stride = in_place ? job.c.row_stride : round_up(columns, 16);
  const BlockScratch sizes(job, rows, columns);
  const Scratch<float> beside(sizes.sums), left(sizes.left), panel(sizes.panel);
  float* c = in_place ? static_cast<float*>(job.c.data) : static_cast<float*>(beside);
  if (in_place) c += block.first_row * stride + block.first_column;

  for (int64_t p = 0; p < job.depth; p += depth_step) {
    const int64_t depth = smaller(depth_step, job.depth - p);
    for (int64_t i = 0; i < rows; i += row_step) {
      const int64_t part = smaller(row_step, rows - i);
      const LeftPanel packed = packing.left(job.left, block.first_row + i, part, p, depth, left);
      for (int64_t j = 0; j < columns; j += kTileColumns) {
        const int64_t width = smaller(kTileColumns, columns - j), column = block.first_column + j;
        packing.right(job.right, column, width, p, depth, round_up(width, kLanes), panel);
        const int64_t next = j + kTileColumns < columns ? kTileColumns : 0;
        const int64_t next_width = smaller(kTileColumns, columns - j - next);
        const Prefetch prefetch = plan_prefetch(job.right, column + next, next_width, p, depth,
                                         ceil_div(part, kTileRows));
        const float* bias = in_place && p == 0 && job.bias != nullptr ? job.bias + column : nullptr;
        const Sums sums = {c + i * stride + j, stride, bias, p > 0 || (in_place && job.accumulate)};
        run_panel(packed, part, panel, width, depth, sums, job.pairs, prefetch);
      }
    }
  }
  if (!in_place) finish(job, block, c, stride);
}

// Without any k the sums are zeros.
void run_empty(const Job& job) {
  for (int64_t i = 0; i < job.rows; ++i)
    for (int64_t j = 0; j < job.columns; ++j) {
      const int64_t index = i * job.c.row_stride + j * job.c.column_stride;
      float sum = job.accumulate ? read(job.c.data, job.c.type, index) : 0.0f;
      if (job.bias != nullptr) sum += job.bias[j];
      write(job.c.data, job.c.type, index, sum);
    }
}

// The size of the blocks for at least `tasks` of them, as far as they can be had. The left operand
// is packed again for each block of columns, the right one, which costs more, for each of rows.
Block first_block(const Job& job, int64_t tasks) {
  int64_t rows = job.rows, columns = job.columns;
  if (!sums_in_place(job)) {
    rows = smaller(rows, kSumsRows);
    columns = smaller(columns, kSumsColumns);
  }
  while (ceil_div(job.rows, rows) * ceil_div(job.columns, columns) < tasks) {
    if (rows > 4 * columns && rows > kTileRows)
      rows = round_up(ceil_div(rows, 2), kTileRows);
    else if (columns > kTileColumns)
      columns = round_up(ceil_div(columns, 2), kTileColumns);
    else
      break;
  }
  return {0, rows, 0, columns};
}

void run_blocks(const Job& job) {
  const int64_t worth = 2 * job.rows * job.columns * job.depth / kTaskFlops;
  const int64_t tasks = larger(1, smaller(job.most_tasks, worth));
  const Block size = first_block(job, tasks);
  const int64_t row_blocks = ceil_div(job.rows, size.last_row);
  const int64_t blocks = row_blocks * ceil_div(job.columns, size.last_column);
  const auto run = [&](int64_t task) {
    const int64_t row = task % row_blocks * size.last_row;
    const int64_t column = task / row_blocks * size.last_column;
    run_block(job, {row, smaller(row + size.last_row, job.rows), column,
                    smaller(column + size.last_column, job.columns)});
  };
  const int64_t bytes = BlockScratch(job, size.last_row, size.last_column).bytes();
  if (tasks > 1) return parallel_for(blocks, bytes, run);
  reserve_scratch(bytes);
  for (int64_t task = 0; task < blocks; ++task) run(task);
}

// ---- Few rows of the left operand, spread over the workers by weight rows -----------------------

bool are_floats(const Operand& left) { return left.type == DType::f32 && left.depth_stride == 1; }

// Left rows as rows of floats: themselves where they are, in x (rows, depth) otherwise.
LeftPanel rows_of_floats(const Operand& left, int64_t rows, int64_t depth, float* x) {
  if (are_floats(left)) return {static_cast<const float*>(left.data), left.stride, 1};
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < depth; ++p)
      x[i * depth + p] = read(left.data, left.type, i * left.stride + p * left.depth_stride);
  return {x, depth, 1};
}

bool suits_gemv(const Job& job) {
  return job.rows <= kGemvRows && job.right.depth_stride == 1 && job.depth <= kGemvDepth;
}

// The floats of sums beside c for some of its columns.
int64_t gemv_sums(const Job& job, int64_t columns) {
  return sums_in_place(job) && !job.accumulate ? 0 : job.rows * columns;
}

// The columns [first, last) of c.
void run_gemv(const Job& job, const LeftPanel& x, int64_t first, int64_t last) {
  const bool in_place = sums_in_place(job) && !job.accumulate;
  const int64_t size = size_of(job.right.type);
  const Scratch<float> beside(gemv_sums(job, last - first));
  float* const y = in_place ? static_cast<float*>(job.c.data) + first : static_cast<float*>(beside);
  const int64_t y_stride = in_place ? job.c.row_stride : last - first;
  const Gemv gemv = {job.depth,
                     static_cast<const char*>(job.right.data) + first * job.right.stride * size,
                     job.right.type, job.right.stride,
                     in_place && job.bias != nullptr ? job.bias + first : nullptr,
                     x.data, x.stride, y, y_stride, static_cast<int>(job.rows)};
  ANYMAMBA_ISA::gemv(gemv, 0, last - first);
  if (!in_place) finish(job, {0, job.rows, first, last}, y, y_stride);
}

void run_gemv(const Job& job) {
  const Scratch<float> converted(are_floats(job.left) ? 0 : job.rows * job.depth);
  const LeftPanel x = rows_of_floats(job.left, job.rows, job.depth, converted);
  const int64_t worth = job.columns * job.depth / kTaskWeights;
  const int64_t most = larger(1, smaller(job.most_tasks, worth));
  const int64_t width = smaller(ceil_div(job.columns, most), kSumsRows * kSumsColumns / kGemvRows);
  const int64_t tasks = ceil_div(job.columns, width);
  const auto run = [&](int64_t task) {
    run_gemv(job, x, task * width, smaller((task + 1) * width, job.columns));
  };
  if (most > 1)
    return parallel_for(tasks, Scratch<float>::in_arena(gemv_sums(job, width)), run);
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

}  // namespace

void gemm(const Gemm& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const Job job = {p.m, p.n, p.k,
                   {p.a.data, p.a.type, p.a.row_stride, p.a.column_stride},
                   {p.b.data, p.b.type, p.b.column_stride, p.b.row_stride},
                   p.c, p.bias, p.accumulate, p.alone ? 1 : 2 * Threads::count()};
  if (p.k <= 0) run_empty(job);
  else if (suits_gemv(job)) run_gemv(job);
  else run_blocks(multiplies_pairs(job.left, job.right, job.depth) ? as_pairs(job) : job);
}

}  // namespace anymamba::ANYMAMBA_ISA
