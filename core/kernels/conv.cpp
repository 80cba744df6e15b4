// The causal depthwise convolution with bias and silu, forward and backward, and one step of it.
//
// Steps of a segment count by position: position 0 is where it begins (its last step if it runs in
// reverse), and the window holds the positions before it, -1 in its last column. So
//
//   y_p = act(bias + sum_j w_j input_{p - (k - 1) + j})
//
// Work is cut into blocks of channels and tiles of time. A tile is copied into a buffer of floats
// that stays in L1, computed there in place, and copied out: one kernel for all types and strides.
#include "kernels/conv.h"

#include "kernels/kernels.h"
#include "kernels/tile.h"
#include "simd/math.h"
#include "simd/scratch.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

constexpr int kColumns = kConvChannels, kSteps = kConvSteps;
constexpr int kChunk = 128;  // steps of a work item
// Backward holds two tiles, and reads k - 1 steps on either side of each.
constexpr int kBackwardColumns = 64;
constexpr int kBackwardSteps = 64;
// Sums over time are taken in at most this many parts, whatever the number of threads.
constexpr std::int64_t kParts = 16;

// All segments cut into chunks of at most `steps` positions, counted through.
class Chunks {
 public:
  Chunks(const Segments& segments, std::int64_t steps)
      : segments_(segments), steps_(steps), before_(segments.count + 1) {
    before_[0] = 0;
    for (std::int64_t s = 0; s < segments.count; ++s)
      before_[s + 1] = before_[s] + ceil_div(segments.stops[s] - segments.starts[s], steps);
  }

  std::int64_t count() const { return before_[segments_.count]; }

  struct Chunk {
    SegmentSlice slice;
    std::int64_t start, stop;  // positions
  };

  Chunk operator[](std::int64_t chunk) const {
    std::int64_t low = 0, high = segments_.count;  // before_[low] <= chunk < before_[high]
    while (high - low > 1) {
      const std::int64_t middle = (low + high) / 2;
      (before_[middle] <= chunk ? low : high) = middle;
    }
    const SegmentSlice slice = slice_of(segments_, low);
    const std::int64_t start = (chunk - before_[low]) * steps_;
    return {slice, start, smaller(start + steps_, slice.steps)};
  }

 private:
  const Segments& segments_;
  const std::int64_t steps_;
  const Scratch<std::int64_t> before_;  // (count + 1,) chunks before each segment
};

// A block's weights as the loops read them: (k + 1, columns), the taps and then the bias.
void load_taps(float* taps, const float* weight, const float* bias, std::int64_t k, Block block) {
  for (std::int64_t j = 0; j <= k; ++j)
    for (int c = 0; c < block.columns; ++c) {
      const std::int64_t channel = block.first + c;
      float* const tap = taps + j * block.columns + c;
      if (c >= block.channels) *tap = 0;
      else if (j < k) *tap = weight[channel * k + j];
      else *tap = bias == nullptr ? 0 : bias[channel];
    }
}

void fill_zeros(float* buffer, std::int64_t rows, Block block) {
  for (std::int64_t i = 0; i < rows * block.columns; i += kLanes) store(buffer + i, FloatVec{});
}

// inputs (count, columns): the inputs at positions from `position` on, the window's before 0.
void load_inputs(float* inputs, const Conv& conv, const SegmentSlice& slice, std::int64_t position,
                 std::int64_t count, Block block) {
  const std::int64_t old = smaller(count, larger(-position, 0));
  if (old > 0 && conv.initial.data != nullptr && slice.state_in >= 0) {
    const Window& w = conv.initial;
    const Tensor3 window = {w.data, w.type, w.state_stride, w.column_stride, w.channel_stride};
    load_tile(inputs, window, {slice.state_in, w.columns + position, 1, old}, block);
  } else {
    fill_zeros(inputs, old, block);
  }
  if (count > old)
    read_tile(inputs + old * block.columns, conv.x, part_of(slice, position + old, count - old),
              block);
}

// Calls f with the number of taps as a constant, 0 for those without a loop of their own.
template <class Function>
ANYMAMBA_INLINE void with_taps(std::int64_t k, const Function& f) {
  if (k == 2) f(Constant<int, 2>{});
  else if (k == 3) f(Constant<int, 3>{});
  else if (k == 4) f(Constant<int, 4>{});
  else f(Constant<int, 0>{});
}

// Calls each(t, bias + sum_j taps_j inputs_{t + j}) for the kLanes channels from column c on.
// inputs (k - 1 + steps, columns), taps (k + 1, columns). With K > 0 the taps and the last inputs
// are in registers; row t of inputs is no longer needed when each(t, .) is called.
template <int K, class Each>
ANYMAMBA_INLINE void correlate(const float* inputs, const float* taps, std::int64_t k, int columns,
                               int c, std::int64_t steps, const Each& each) {
  if constexpr (K > 0) {
    FloatVec tap[K], input[K];
    for (int j = 0; j < K; ++j) tap[j] = load(taps + j * columns + c);
    for (int j = 0; j < K - 1; ++j) input[j] = load(inputs + j * columns + c);
    const FloatVec bias = load(taps + K * columns + c);
    for (std::int64_t t = 0; t < steps; ++t) {
      input[K - 1] = load(inputs + (t + K - 1) * columns + c);
      FloatVec total = bias;
      for (int j = 0; j < K; ++j) total = fma(tap[j], input[j], total);
      each(t, total);
      for (int j = 0; j < K - 1; ++j) input[j] = input[j + 1];
    }
  } else {
    for (std::int64_t t = 0; t < steps; ++t) {
      FloatVec total = load(taps + k * columns + c);
      for (std::int64_t j = 0; j < k; ++j)
        total = fma(load(taps + j * columns + c), load(inputs + (t + j) * columns + c), total);
      each(t, total);
    }
  }
}

// inputs (k - 1 + steps, columns): its first `steps` rows become the outputs. The last k - 1 rows
// stay as they are, for the next tile, which is asked for.
void convolve(float* inputs, const float* taps, std::int64_t k, bool silu, std::int64_t steps,
              int columns, const TilesAhead& next) {
  with_taps(k, [&](auto constant) {
    constexpr int K = decltype(constant)::value;
    for (int c = 0; c < columns; c += kLanes) {
      Ahead x = next[2 * (c / kLanes)], y = next[2 * (c / kLanes) + 1];
      const auto each = [&](std::int64_t t, FloatVec total) {
        x.fetch_line();
        y.fetch_line();
        store(inputs + t * columns + c, silu ? silu_of(total) : total);
      };
      correlate<K>(inputs, taps, k, columns, c, steps, each);
    }
  });
}

void convolve_chunk(const Conv& conv, const Tensor3& y, const Chunks::Chunk& chunk, Block block) {
  const std::int64_t k = conv.k, past = k - 1;
  const int columns = block.columns;
  const Scratch<float> taps((k + 1) * columns), inputs((past + kSteps) * columns);
  load_taps(taps, conv.weight, conv.bias, k, block);
  load_inputs(inputs, conv, chunk.slice, chunk.start - past, past, block);
  for (std::int64_t p = chunk.start; p < chunk.stop; p += kSteps) {
    const std::int64_t steps = smaller(kSteps, chunk.stop - p);
    const SegmentSlice here = part_of(chunk.slice, p, steps);
    read_tile(inputs + past * columns, conv.x, here, block);
    const SegmentSlice next =
        part_of(chunk.slice, p + steps, smaller(kSteps, chunk.slice.steps - p - steps));
    TilesAhead tiles;
    for (const Tensor3* tensor : {&conv.x, &y}) tiles.add(*tensor, next, block);
    convolve(inputs, taps, k, conv.silu, steps, columns, tiles);
    store_tile(inputs, y, here, block);
    __builtin_memmove(inputs, inputs + steps * columns,
                      static_cast<std::size_t>(past * columns) * sizeof(float));
  }
}

// One number, the same bits where the types are the same.
ANYMAMBA_INLINE void copy_number(void* to, DType to_type, std::int64_t to_index, const void* from,
                                 DType from_type, std::int64_t from_index) {
  if (to_type != from_type) {
    write(to, to_type, to_index, read(from, from_type, from_index));
  } else if (to_type == DType::f32) {
    static_cast<float*>(to)[to_index] = static_cast<const float*>(from)[from_index];
  } else {
    static_cast<std::uint16_t*>(to)[to_index] = static_cast<const std::uint16_t*>(from)[from_index];
  }
}

// The last columns of (initial window, x). Columns in ascending order: where the final window lies
// in the initial window's memory, each is read before it is written.
void keep_window(const Conv& conv, const Window& final, const SegmentSlice& slice, Block block) {
  const Window& initial = conv.initial;
  for (std::int64_t column = 0; column < final.columns; ++column) {
    const std::int64_t position = slice.steps - final.columns + column;
    const std::int64_t old = initial.columns + position;  // the column it had, if before 0
    const bool known = initial.data != nullptr && slice.state_in >= 0 && old >= 0;
    const std::int64_t to = slice.state_out * final.state_stride + column * final.column_stride;
    for (std::int64_t c = block.first; c < block.first + block.channels; ++c) {
      const std::int64_t index = to + c * final.channel_stride;
      if (position >= 0)
        copy_number(final.data, final.type, index, conv.x.data, conv.x.type,
                    slice.row * conv.x.row_stride +
                        (slice.first + position * slice.direction) * conv.x.step_stride +
                        c * conv.x.channel_stride);
      else if (known)
        copy_number(final.data, final.type, index, initial.data, initial.type,
                    slice.state_in * initial.state_stride + old * initial.column_stride +
                        c * initial.channel_stride);
      else
        write(final.data, final.type, index, 0);
    }
  }
}

// inputs (k - 1 + steps, columns), gradients (steps, columns): the gradients of the outputs become
// those of the sums before silu, which are computed again for it.
void through_silu(float* gradients, const float* inputs, const float* taps, std::int64_t k,
                  std::int64_t steps, int columns) {
  with_taps(k, [=](auto constant) {
    constexpr int K = decltype(constant)::value;
    for (int c = 0; c < columns; c += kLanes)
      correlate<K>(inputs, taps, k, columns, c, steps, [=](std::int64_t t, FloatVec total) {
        float* const gradient = gradients + t * columns + c;
        store(gradient, load(gradient) * silu_slope_of(total));
      });
  });
}

// sums (k + 1, columns) += those over time of gradient_t input_{t + j}, and of gradient_t.
// inputs (k - 1 + steps, columns), gradients (steps, columns).
void add_weight_gradients(float* sums, const float* gradients, const float* inputs, std::int64_t k,
                          std::int64_t steps, int columns) {
  const auto add = [](float* sum, FloatVec v) { store(sum, load(sum) + v); };
  for (int c = 0; c < columns; c += kLanes) {
    FloatVec bias{};
    for (std::int64_t t = 0; t < steps; ++t) bias += load(gradients + t * columns + c);
    add(sums + k * columns + c, bias);
    for (std::int64_t j = 0; j < k; ++j) {
      FloatVec tap{};
      for (std::int64_t t = 0; t < steps; ++t)
        tap = fma(load(gradients + t * columns + c), load(inputs + (t + j) * columns + c), tap);
      add(sums + j * columns + c, tap);
    }
  }
}

// gradients (steps + k - 1, columns): its first `steps` rows become the gradients of the inputs,
// sum_j taps_j gradient_{i+k-1-j}.
void to_inputs(float* gradients, const float* taps, std::int64_t k, std::int64_t steps,
               int columns) {
  for (int c = 0; c < columns; c += kLanes)
    for (std::int64_t i = 0; i < steps; ++i) {
      FloatVec total{};
      for (std::int64_t j = 0; j < k; ++j)
        total = fma(load(taps + j * columns + c), load(gradients + (i + k - 1 - j) * columns + c),
                    total);
      store(gradients + i * columns + c, total);
    }
}

// What one thread needs for a block of channels in the backward pass.
struct Backward {
  Backward(const Conv& conv, Block block)
      : taps((conv.k + 1) * block.columns),
        inputs((kBackwardSteps + 2 * (conv.k - 1)) * block.columns),
        gradients((kBackwardSteps + 2 * (conv.k - 1)) * block.columns) {
    load_taps(taps, conv.weight, conv.bias, conv.k, block);
  }
  Scratch<float> taps, inputs, gradients;

  // What it takes.
  static std::int64_t scratch(const Conv& conv) {
    return Scratch<float>::in_arena((conv.k + 1) * kBackwardColumns) +
           2 * Scratch<float>::in_arena((kBackwardSteps + 2 * (conv.k - 1)) * kBackwardColumns);
  }
};

// The gradients of the sums before silu at positions [start, start + count), as far as the segment
// goes and zeros behind it; and the inputs from start - (k - 1) on that they were made of.
void load_gradients(float* gradients, float* inputs, const float* taps, const Conv& conv,
                    const Tensor3& dy, const SegmentSlice& slice, std::int64_t start,
                    std::int64_t count, Block block) {
  const std::int64_t there = smaller(count, slice.steps - start);
  load_inputs(inputs, conv, slice, start - (conv.k - 1), conv.k - 1 + there, block);
  read_tile(gradients, dy, part_of(slice, start, there), block);
  if (conv.silu) through_silu(gradients, inputs, taps, conv.k, there, block.columns);
  fill_zeros(gradients + there * block.columns, count - there, block);
}

// gradients (count, columns), for positions from `start` on, += what the final window passes back:
// its columns are copies of the last positions.
void add_from_window(float* gradients, const Window& final, const SegmentSlice& slice,
                     std::int64_t start, std::int64_t count, Block block) {
  if (final.data == nullptr || slice.state_out < 0) return;
  const std::int64_t before = slice.steps - final.columns;  // the position of column 0
  for (std::int64_t p = larger(start, before); p < smaller(start + count, slice.steps); ++p)
    for (int c = 0; c < block.channels; ++c)
      gradients[(p - start) * block.columns + c] +=
          read(final.data, final.type,
               slice.state_out * final.state_stride + (block.first + c) * final.channel_stride +
                   (p - before) * final.column_stride);
}

// One tile: its gradient of x is written, its part of the weights' gradients added to `sums`.
void backward_tile(const Conv& conv, const ConvGradients& d, Backward& b, float* sums,
                   const Chunks::Chunk& tile, Block block) {
  const std::int64_t k = conv.k, steps = tile.stop - tile.start;
  const SegmentSlice& slice = tile.slice;
  load_gradients(b.gradients, b.inputs, b.taps, conv, d.y, slice, tile.start,
                 steps + k - 1, block);
  add_weight_gradients(sums, b.gradients, b.inputs, k, steps, block.columns);
  to_inputs(b.gradients, b.taps, k, steps, block.columns);
  add_from_window(b.gradients, d.final, slice, tile.start, steps, block);
  store_tile(b.gradients, d.x, part_of(slice, tile.start, steps), block);
}

// The gradient of the window before a segment, added: segments may begin from the same one.
void backward_window(const Conv& conv, const ConvGradients& d, Backward& b,
                     const SegmentSlice& slice, Block block) {
  const std::int64_t past = conv.k - 1, columns = d.initial.columns;
  const Scratch<float> passed(columns * block.columns);
  fill_zeros(passed, columns, block);
  add_from_window(passed, d.final, slice, -columns, columns, block);
  // Position -past + i is row i, and no output lies before position 0.
  fill_zeros(b.gradients, past, block);
  load_gradients(b.gradients + past * block.columns, b.inputs, b.taps, conv, d.y, slice, 0,
                 past, block);
  to_inputs(b.gradients, b.taps, conv.k, past, block.columns);
  float* const out = static_cast<float*>(d.initial.data) + slice.state_in * d.initial.state_stride;
  for (std::int64_t column = 0; column < columns; ++column) {
    const std::int64_t row = column - (columns - past);
    for (int c = 0; c < block.channels; ++c)
      out[(block.first + c) * d.initial.channel_stride + column * d.initial.column_stride] +=
          passed[column * block.columns + c] +
          (row >= 0 ? b.gradients[row * block.columns + c] : 0);
  }
}

void backward_windows(const Conv& conv, const ConvGradients& d, Block block) {
  float* const out = static_cast<float*>(d.initial.data);
  for (std::int64_t state = 0; state < d.n_states; ++state)
    for (int c = 0; c < block.channels; ++c)
      for (std::int64_t column = 0; column < d.initial.columns; ++column)
        out[state * d.initial.state_stride + (block.first + c) * d.initial.channel_stride +
            column * d.initial.column_stride] = 0;
  Backward b(conv, block);
  for (std::int64_t s = 0; s < conv.segments.count; ++s) {
    const SegmentSlice slice = slice_of(conv.segments, s);
    if (slice.state_in >= 0) backward_window(conv, d, b, slice, block);
  }
}

// dweight (e, k) and dbias (e,) from the parts' sums (parts, k + 1, e), in the order of the parts.
void add_parts(const ConvGradients& d, const float* sums, std::int64_t parts, std::int64_t e,
               std::int64_t k, Block block) {
  for (std::int64_t c = block.first; c < block.first + block.channels; ++c)
    for (std::int64_t j = 0; j <= k; ++j) {
      float total = 0;
      for (std::int64_t part = 0; part < parts; ++part) total += sums[(part * (k + 1) + j) * e + c];
      if (j < k) d.weight[c * k + j] = total;
      else if (d.bias != nullptr) d.bias[c] = total;
    }
}

// One row of a step, some channels: sums (channels,) = bias + sum_j w_j input_j, in the order of many
// steps, and the window moves on. x is taken as it is, before the window's type rounds it.
// With K > 0 all lies as models keep it: channels side by side, each with a window of K columns.
template <DType X, DType M, int K>
void shift_row(float* __restrict sums, const ConvStep& step, const void* __restrict x,
               void* __restrict window, std::int64_t first, std::int64_t channels) {
  const std::int64_t k = K > 0 ? K : step.k, columns = K > 0 ? K : step.window.columns;
  const std::int64_t channel_stride = K > 0 ? K : step.window.channel_stride;
  const std::int64_t column_stride = K > 0 ? 1 : step.window.column_stride;
  const std::int64_t x_stride = K > 0 ? 1 : step.x.channel_stride;
  const float* __restrict const weight = step.weight;  // (e, k)
  for (std::int64_t c = 0; c < channels; ++c) {
    const std::int64_t channel = first + c, at = channel * channel_stride;
    float total = step.bias != nullptr ? step.bias[channel] : 0.0f;
    for (std::int64_t j = 0; j < k - 1; ++j)
      total = fma(weight[channel * k + j], read(window, M, at + (columns - (k - 1) + j) * column_stride), total);
    sums[c] = fma(weight[channel * k + k - 1], read(x, X, channel * x_stride), total);
    for (std::int64_t column = 0; column < columns - 1; ++column)
      copy_number(window, M, at + column * column_stride, window, M,
                  at + (column + 1) * column_stride);
    copy_number(window, M, at + (columns - 1) * column_stride, x, X, channel * x_stride);
  }
}

bool is_packed(const ConvStep& step) {
  return step.x.channel_stride == 1 && step.window.columns == step.k &&
         step.window.column_stride == 1 && step.window.channel_stride == step.k;
}

}  // namespace

void conv(const Conv& conv, const ConvResult& result) {
  const std::int64_t blocks = ceil_div(conv.e, kColumns);
  const Chunks chunks(conv.segments, kChunk);
  parallel_for(chunks.count() * blocks, conv_worker_scratch(conv.k), [&](std::int64_t item) {
    convolve_chunk(conv, result.y, chunks[item / blocks],
                   block_of(0, conv.e, kColumns, item % blocks));
  });
  if (result.final.data == nullptr) return;
  parallel_for(conv.segments.count * blocks, [&](std::int64_t item) {
    const SegmentSlice slice = slice_of(conv.segments, item / blocks);
    if (slice.state_out >= 0)
      keep_window(conv, result.final, slice, block_of(0, conv.e, kColumns, item % blocks));
  });
}

void conv_backward(const Conv& conv, const ConvGradients& gradients) {
  const std::int64_t e = conv.e, k = conv.k, blocks = ceil_div(e, kBackwardColumns);
  const Chunks tiles(conv.segments, kBackwardSteps);
  const std::int64_t parts = smaller(tiles.count(), kParts);
  const Scratch<float> sums(parts * (k + 1) * e);
  const std::int64_t own_scratch = Scratch<float>::in_arena((k + 1) * kBackwardColumns);
  parallel_for(parts * blocks, Backward::scratch(conv) + own_scratch, [&](std::int64_t item) {
    const std::int64_t part = item / blocks;
    const Block block = block_of(0, e, kBackwardColumns, item % blocks);
    Backward b(conv, block);
    const Scratch<float> own((k + 1) * block.columns);
    fill_zeros(own, k + 1, block);
    for (std::int64_t tile = tiles.count() * part / parts;
         tile < tiles.count() * (part + 1) / parts; ++tile)
      backward_tile(conv, gradients, b, own, tiles[tile], block);
    for (std::int64_t j = 0; j <= k; ++j)
      for (int c = 0; c < block.channels; ++c)
        sums[(part * (k + 1) + j) * e + block.first + c] = own[j * block.columns + c];
  });
  const std::int64_t passed = gradients.initial.columns * kBackwardColumns;
  const std::int64_t window_scratch = Backward::scratch(conv) + Scratch<float>::in_arena(passed);
  parallel_for(blocks, window_scratch, [&](std::int64_t item) {
    const Block block = block_of(0, e, kBackwardColumns, item);
    add_parts(gradients, sums, parts, e, k, block);
    if (gradients.initial.data != nullptr) backward_windows(conv, gradients, block);
  });
}

void conv_step(const ConvStep& step, std::int64_t first, std::int64_t last) {
  float sums[kColumns];
  const auto bytes = [](DType type) { return size_of(type); };
  for (std::int64_t row = 0; row < step.b; ++row)
    for (std::int64_t c = first; c < last; c += kColumns) {
      const int channels = static_cast<int>(smaller(kColumns, last - c));
      const char* const x = static_cast<const char*>(step.x.data) +
                            row * step.x.row_stride * bytes(step.x.type);
      char* const window = static_cast<char*>(step.window.data) +
                           slot_in(step.slot_of, row) * step.window.state_stride *
                               bytes(step.window.type);
      with_type(step.x.type, [&](auto x_type) {
        with_type(step.window.type, [&](auto window_type) {
          with_taps(is_packed(step) ? step.k : 0, [&](auto taps) {
            shift_row<decltype(x_type)::value, decltype(window_type)::value,
                      decltype(taps)::value>(sums, step, x, window, c, channels);
          });
        });
      });
      for (int i = channels; i % kLanes != 0; ++i) sums[i] = 0;
      if (step.silu)
        for (int i = 0; i < channels; i += kLanes) store(sums + i, silu_of(load(sums + i)));
      with_type(step.y.type, [&](auto type) {
        for (int i = 0; i < channels; ++i)
          write(step.y.data, decltype(type)::value,
                row * step.y.row_stride + (c + i) * step.y.channel_stride, sums[i]);
      });
    }
}

}  // namespace anymamba::ANYMAMBA_ISA
