// Matrix products of any size; those of few rows go to gemv.
//
// The blocked product follows Goto and van de Geijn. Of its two operands one is read a number at a
// time and broadcast ("left", in rows), the other by whole vectors ("right", in columns):
//
//   for each cut of k (depth)                                   at most kDepth steps
//     for each part of the rows                                 at most kBlockRows
//       packed (tiles, depth, kTileRows) = left                 floats, by all workers for all; in L2
//       for each block of the part of c                         a task, on any worker
//         for each kTileColumns columns of the block
//           panel (depth, kTileColumns) = right                 floats, in L1
//           for each kTileRows rows of the block                micro_kernel
//             sums (kTileRows, kTileVectors vectors)            in registers
//             for each step of k
//               sums += a packed number of each row x the panel's vectors
//             c (kTileRows, kTileColumns) += sums               or a buffer beside c
//
// Every number of c is summed as summation.h says, by one worker, in tiles of any size in the same
// way: results are the same for any number of threads and any cut of c.
#include "kernels/gemm_packing.h"
#include "kernels/kernels.h"
#include "kernels/summation.h"
#include "simd/lanes.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// Of the left operand in L2: 560 rows with AVX-512, about 900 KiB.
constexpr int kBlockRows = kGemmBlockRows;
static_assert(kBlockRows % kTileRows == 0);
static_assert((kBlockRows * kDepth + kTileColumns * kDepth) * 4 + 256 <= kGemmScratch);
constexpr int64_t kSumsRows = 512, kSumsColumns = 512;  // bounds of what is summed beside c
constexpr int64_t kPackedTiles = 5, kFinishedRows = 64;  // that a task packs, and moves to c
// Tasks for each worker, so that none waits long for another; fewer where rows are divided, for each
// packs all of its columns again.
constexpr int64_t kTasksEach = 8, kFewTasksEach = 2;
constexpr int64_t kTaskFlops = 1 << 20;  // less is not worth a hand-over to another thread
constexpr int64_t kTaskWeights = 1 << 16;  // the same where reading them is what takes the time
constexpr int kUnrolled = 4, kMostSteps = 16;  // of k, in one turn of the loop and between prefetches

struct Job {
  int64_t rows, columns, depth;
  Operand left, right;
  Matrix c;
  const float* bias;  // (columns,) or null
  bool accumulate;
  bool alone;  // on this thread
  bool in_order;
  bool pairs = false;
};

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

// Memory that is asked for ahead, into L2, a line of cache at a time: strips of `bytes` bytes,
// `stride` bytes apart. A burst of prefetches would block what else is under way.
struct Ahead {
  const char* strip = nullptr;
  int64_t strips = 0, stride = 0, bytes = 0;
  int64_t at = 0;  // within the strip

  int64_t lines() const { return strips * (ceil_div(bytes, kLine) + 1); }
  void fetch_line() {
    if (strips == 0) return;
    __builtin_prefetch(strip + at, 0, 2);
    if (at < bytes - 1) at = smaller(at + kLine, bytes - 1);
    else at = 0, strip += stride, --strips;
  }

  static constexpr int64_t kLine = 64;
};

// tile (rows, columns) of c = left (depth, kTileRows) transposed times right (depth, vectors *
// kLanes), + bias + old c.
struct Tile {
  const float *left, *right;
  int64_t depth;
  float* c;
  int64_t c_stride;
  const float* bias;
  bool add_old;
  bool pairs;
  Ahead* ahead;
  int64_t steps, lines;  // after so many steps of k it asks for so many lines of `ahead`
};

template <int R, int V, bool pairs>
void micro_kernel(const Tile& tile) {
  const float *left = tile.left, *right = tile.right;
  const int64_t depth = tile.depth;
  FloatVec sums[R][V] = {};
  Ahead ahead = *tile.ahead;
  for (int64_t p = 0, row = 0; p < depth; ++row) {
    // The memory of one more row of the tile, which may touch one line more than V.
    if (row < R) {
      float* const next = tile.c + row * tile.c_stride;
      __builtin_prefetch(next, 1);
      __builtin_prefetch(next + V * kLanes - 1, 1);
    }
    for (int64_t line = 0; line < tile.lines; ++line) ahead.fetch_line();
    const int64_t stop = smaller(depth, p + tile.steps);
#pragma GCC unroll 4
    for (; p < stop; ++p) {
      FloatVec b[V];  // a row of the panel
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) b[v] = load(right + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          if (pairs) sums[r][v] = fma_row_bf16_pairs(left, r, b[v], sums[r][v]);
          else if (kFactorsFromLanes || r % 2) sums[r][v] = fma_row(left, r, b[v], sums[r][v]);
          else sums[r][v] = fma(splat(left[r]), b[v], sums[r][v]);
      left += kTileRows;
      right += V * kLanes;
    }
  }
  *tile.ahead = ahead;
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

// What pack_right will read of the right operand.
Ahead ahead_of(const Operand& right, int64_t first_column, int64_t columns, int64_t first_depth,
               int64_t depth) {
  const int64_t size = size_of(right.type);
  const int64_t column = right.stride * size, step = right.depth_stride * size;
  const char* const start =
      static_cast<const char*>(right.data) + first_column * column + first_depth * step;
  if (right.depth_stride == 1) return {start, columns, column, depth * size};
  return {start, depth, step, columns * size};
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

// sums (rows, columns) = left (rows, depth) panel (depth, columns), for the columns of one panel. `high`
// rows a tile.
void run_panel(const float* left, int64_t rows, int64_t high, const float* panel, int64_t columns, int64_t depth,
               const Sums& sums, bool pairs, Ahead ahead) {
  const int vectors = static_cast<int>(ceil_div(columns, kLanes));
  const int64_t tiles = ceil_div(rows, high);
  const int64_t rate = smaller(depth / kTileRows, tiles * depth / larger(1, ahead.lines()));
  const int64_t steps = kUnrolled * larger(1, smaller(kMostSteps, rate) / kUnrolled);
  const int64_t lines = ceil_div(ahead.lines(), tiles * ceil_div(depth, steps));
  Tile tile = {left, panel, depth, sums.data, sums.stride, sums.bias, sums.add_old, pairs, &ahead, steps,
               lines};
  for (int64_t i = 0; i < rows; i += high, tile.left += panel_floats(depth)) {
    tile.c = sums.data + i * sums.stride;
    const int64_t tile_rows = smaller(high, rows - i);
    if (columns % kLanes == 0) run_micro_kernel(tile_rows, vectors, tile);
    else run_partial_tile(tile_rows, vectors, columns, tile);
  }
}

// A block of rows in L2.
int64_t row_step_of(int64_t rows) {
  return round_up(ceil_div(rows, ceil_div(rows, kBlockRows)), kTileRows);
}

// Calls body(task) for all tasks, each with `bytes` of scratch memory for its worker.
template <class Body>
void for_each_task(const Job& job, int64_t tasks, int64_t bytes, const Body& body) {
  if (!job.alone) return parallel_for(tasks, bytes, body);
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

// The floats that a part of so many rows or fewer takes when packed, and a panel.
int64_t packed_floats(const Job& job, int64_t rows) {
  return ceil_div(smaller(kBlockRows, rows), kTileRows) * panel_floats(depth_step_of(job.depth));
}

int64_t panel_bytes(const Job& job) {
  return Scratch<float>::in_arena(kTileColumns * depth_step_of(job.depth));
}

// The rows [first, first + count) of the left operand, packed by all workers, `high` a tile.
void pack_part(const Job& job, const Packing& packing, int64_t first, int64_t count, int64_t high, const Cut& cut,
               float* packed) {
  const int64_t tiles = job.alone ? ceil_div(count, high) : kPackedTiles, rows = tiles * high;
  for_each_task(job, ceil_div(count, rows), 0, [&](int64_t task) {
    const int64_t row = task * rows;
    packing.left(job.left, first + row, smaller(rows, count - row), high, cut.p, cut.depth,
                 packed + task * tiles * panel_floats(cut.depth));
  });
}

// The size of the blocks of (rows, columns) that tasks take, in tiles of `tile` rows. Each packs its own columns
// of the right operand, so that rows are divided only where there are too few columns.
Block task_block(const Job& job, int64_t rows, int64_t tile, int64_t columns, int64_t depth) {
  if (job.alone) return {0, rows, 0, columns};
  const int64_t workers = Threads::count();
  const int64_t most = smaller(kTasksEach * workers, 2 * rows * columns * depth / kTaskFlops);
  int64_t high = rows, wide = columns;
  while (wide > kTileColumns && ceil_div(columns, wide) < most)
    wide = round_up(ceil_div(wide, 2), kTileColumns);
  const int64_t few = smaller(most, kFewTasksEach * workers);
  while (high > tile && ceil_div(columns, wide) * ceil_div(rows, high) < few)
    high = round_up(ceil_div(high, 2), tile);
  return {0, high, 0, wide};
}

// A block of a part's packed rows, its rows and columns being counted within `sums`.
void run_block(const Job& job, const Packing& packing, const float* packed, int64_t high, const Block& block,
               int64_t first_column, const Cut& cut, const Sums& sums) {
  const int64_t rows = block.last_row - block.first_row;
  const Scratch<float> panel(kTileColumns * cut.depth);
  for (int64_t j = block.first_column; j < block.last_column; j += kTileColumns) {
    const int64_t width = smaller(kTileColumns, block.last_column - j), column = first_column + j;
    packing.right(job.right, column, width, cut.p, cut.depth, round_up(width, kLanes), panel);
    const int64_t next = j + kTileColumns;
    const int64_t next_width = larger(0, smaller(kTileColumns, block.last_column - next));
    const Ahead ahead = ahead_of(job.right, first_column + next, next_width, cut.p, cut.depth);
    const Sums of_panel = {sums.data + block.first_row * sums.stride + j, sums.stride,
                           sums.bias != nullptr ? sums.bias + j : nullptr, sums.add_old};
    run_panel(packed + block.first_row / high * panel_floats(cut.depth), rows, high, panel, width, cut.depth,
              of_panel, job.pairs, ahead);
  }
}

// The rows and columns `all` of c.
void run_blocks(const Job& job, const Block& all) {
  const Packing packing = packing_of(job.left.type, job.right.type);
  const int64_t rows = all.last_row - all.first_row, columns = all.last_column - all.first_column;
  const int64_t row_step = row_step_of(rows), depth_step = depth_step_of(job.depth);
  const bool in_place = sums_in_place(job);
  const int64_t stride = in_place ? job.c.row_stride : round_up(columns, 16);
  const Scratch<float> beside(in_place ? 0 : rows * stride), packed(packed_floats(job, rows));
  float* c = in_place ? static_cast<float*>(job.c.data) : static_cast<float*>(beside);
  if (in_place) c += all.first_row * stride + all.first_column;

  for (int64_t p = 0; p < job.depth; p += depth_step) {
    const Cut cut = {p, smaller(depth_step, job.depth - p)};
    const bool first = in_place && p == 0;
    const float* bias = first && job.bias != nullptr ? job.bias + all.first_column : nullptr;
    for (int64_t i = 0; i < rows; i += row_step) {
      const int64_t part = smaller(row_step, rows - i), tile = rows_of_tiles(part);
      pack_part(job, packing, all.first_row + i, part, tile, cut, packed);
      const Sums sums = {c + i * stride, stride, bias, p > 0 || (in_place && job.accumulate)};
      const Block size = task_block(job, part, tile, columns, cut.depth);
      const int64_t high = size.last_row, wide = size.last_column, across = ceil_div(columns, wide);
      for_each_task(job, across * ceil_div(part, high), panel_bytes(job), [&](int64_t task) {
        const int64_t row = task / across * high, column = task % across * wide;
        const Block block = {row, smaller(row + high, part), column, smaller(column + wide, columns)};
        run_block(job, packing, packed, tile, block, all.first_column, cut, sums);
      });
    }
  }
  if (in_place) return;
  for_each_task(job, ceil_div(rows, kFinishedRows), 0, [&](int64_t task) {
    const int64_t row = task * kFinishedRows, first = all.first_row + row;
    const int64_t last = smaller(first + kFinishedRows, all.last_row);
    finish(job, {first, last, all.first_column, all.last_column}, c + row * stride, stride);
  });
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

void run_blocks(Job job) {
  if (job.rows * job.columns * job.depth < kTaskFlops) job.alone = true;  // not worth two tasks
  const bool in_place = sums_in_place(job);
  const int64_t rows = in_place ? job.rows : smaller(job.rows, kSumsRows);
  const int64_t columns = in_place ? job.columns : smaller(job.columns, kSumsColumns);
  const int64_t beside = in_place ? 0 : rows * round_up(columns, 16);
  const int64_t workers = job.alone ? 1 : Threads::count();
  reserve_scratch(Scratch<float>::in_arena(beside) + Scratch<float>::in_arena(packed_floats(job, rows)) +
                  workers * panel_bytes(job));
  for (int64_t i = 0; i < job.rows; i += rows)
    for (int64_t j = 0; j < job.columns; j += columns)
      run_blocks(job, {i, smaller(i + rows, job.rows), j, smaller(j + columns, job.columns)});
}

// ---- Few rows of the left operand, spread over the workers by weight rows -----------------------

bool needs_copy(const Job& job) {
  const bool are_floats = job.left.type == DType::f32 && job.left.depth_stride == 1;
  return !are_floats && !multiplies_pairs(job.left, job.right, job.depth);
}

// Rows as gemv reads them: where they lie, or as floats in a copy, (rows, depth).
Operand rows_for_gemv(const Job& job, float* copy) {
  if (!needs_copy(job)) return job.left;
  const Operand& left = job.left;
  for (int64_t i = 0; i < job.rows; ++i)
    for (int64_t p = 0; p < job.depth; ++p)
      copy[i * job.depth + p] = read(left.data, left.type, i * left.stride + p * left.depth_stride);
  return {copy, DType::f32, job.depth, 1};
}

bool suits_gemv(const Job& job) { return job.rows <= kInOrderVectors && job.right.depth_stride == 1; }

// The floats of sums beside c for some of its columns.
int64_t gemv_sums(const Job& job, int64_t columns) { return sums_in_place(job) ? 0 : job.rows * columns; }

// The columns [first, last) of c.
void run_gemv(const Job& job, const Operand& x, int64_t first, int64_t last) {
  const bool in_place = sums_in_place(job);
  const Scratch<float> beside(gemv_sums(job, last - first));
  Gemv gemv;
  gemv.k = job.depth;
  gemv.weight = static_cast<const char*>(job.right.data) + first * job.right.stride * size_of(job.right.type);
  gemv.type = job.right.type, gemv.weight_row_stride = job.right.stride;
  gemv.x = x.data, gemv.x_type = x.type, gemv.x_row_stride = x.stride, gemv.m = job.rows;
  gemv.y = in_place ? static_cast<float*>(job.c.data) + first : static_cast<float*>(beside);
  gemv.y_row_stride = in_place ? job.c.row_stride : last - first;
  gemv.bias = in_place && job.bias != nullptr ? job.bias + first : nullptr;
  gemv.accumulate = in_place && job.accumulate;
  gemv.in_order = job.in_order;
  ANYMAMBA_ISA::gemv(gemv, 0, last - first);
  if (!in_place) finish(job, {0, job.rows, first, last}, gemv.y, gemv.y_row_stride);
}

void run_gemv(const Job& job) {
  const Scratch<float> copy(needs_copy(job) ? job.rows * job.depth : 0);
  const Operand x = rows_for_gemv(job, copy);
  const int64_t worth = job.columns * job.depth / kTaskWeights;
  const int64_t most = job.alone ? 1 : larger(1, smaller(kFewTasksEach * Threads::count(), worth));
  const int64_t width = smaller(round_up(ceil_div(job.columns, most), kLanes), kSumsRows * kSumsColumns / kLanes);
  const int64_t tasks = ceil_div(job.columns, width);
  const auto run = [&](int64_t task) {
    run_gemv(job, x, task * width, smaller((task + 1) * width, job.columns));
  };
  const int64_t bytes = Scratch<float>::in_arena(gemv_sums(job, width)) + gemv_scratch(1, job.depth);
  if (most > 1) return parallel_for(tasks, bytes, run);
  for (int64_t task = 0; task < tasks; ++task) run(task);
}

}  // namespace

void gemm(const Gemm& p) {
  if (p.m <= 0 || p.n <= 0) return;
  const Job job = {p.m, p.n, p.k,
                   {p.a.data, p.a.type, p.a.row_stride, p.a.column_stride},
                   {p.b.data, p.b.type, p.b.column_stride, p.b.row_stride},
                   p.c, p.bias, p.accumulate, p.alone, p.in_order};
  if (p.k <= 0) run_empty(job);
  else if (suits_gemv(job)) run_gemv(job);
  else run_blocks(multiplies_pairs(job.left, job.right, job.depth) ? as_pairs(job) : job);
}

}  // namespace anymamba::ANYMAMBA_ISA
