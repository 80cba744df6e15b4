#include "model/decode_step.h"

#include <algorithm>

#include "base/work_stealing.h"
#include "model/layer_inputs.h"
#include "model/vectors.h"

namespace anymamba {
namespace {

constexpr std::int64_t kScanBlock = 64;  // channels
constexpr std::int64_t kNarrowUnit = 4;   // rows of x_proj, which are few, are shared out by
constexpr std::int64_t kBarriers = 4;     // of a layer
// What a worker should have to do between two barriers, in bytes read from memory: a barrier takes
// as long as reading some thousand.
constexpr std::int64_t kWorkBetweenBarriers = 24 << 10;

// The activations of one step, shared by the workers.
struct Buffers {
  std::vector<float> hidden, projected, convolved, rBC, delta, y;
  Buffers(const Model& m, std::int64_t b)
      : hidden(b * m.d), projected(b * m.projected()), convolved(b * m.conv_channels()),
        rBC(b * m.x_projected()), delta(b * m.dt_projected()), y(b * m.e) {}
};

// A worker's own memory: float32 forms of a layer's small tensors, of which it fills its own rows,
// normed vectors of its own, which are cheaper than waiting for another's, and rounded ones. And its
// access to the rows that all compute together.
struct WorkerScratch {
  float *normed, *rBC, *normed_y;  // (b, d), (b, r + 2n), and with heads (b, e)
  SmallTensors small;
  VectorRounding rounding;
  SharedRows rows;

  WorkerScratch(const Model& m, std::int64_t b, bool bf16_products, Arena& memory, const SharedRows& rows)
      : normed(memory.floats(b * m.d)), rBC(memory.floats(b * m.x_projected())),
        normed_y(memory.floats(m.has_heads() ? b * m.e : 0)), small(m, memory),
        rounding(b, widest(m), bf16_products, m.in_order, memory), rows(rows) {}

  // What a worker needs, the scratch memory of the kernels included that it calls: norm,
  // gemv, quantized_gemv, and scan_step or ssd_step.
  static std::int64_t bytes(const Model& m, std::int64_t b, bool bf16_products) {
    constexpr std::int64_t kVector = 16, kNormRows = 16;
    Arena counted;
    Shares none(0);
    WorkerScratch(m, b, bf16_products, counted, SharedRows(none, 0, 1));
    for (std::int64_t row = 0; row < b; row += kNormRows) counted.floats(3 * (widest(m) + 2 * kVector));
    counted.floats(2 * (m.n + kVector));
    counted.take(std::max(gemv_scratch(b, widest(m)), quantized_worker_scratch(widest(m))));
    return counted.used();
  }

 private:
  static std::int64_t widest(const Model& m) { return std::max({m.d, m.e, m.r, m.n}); }
};

std::int64_t bytes_of(const Weight& weight, std::int64_t n, std::int64_t k) {
  const int bits = weight.quantized.bits;
  return bits != 0 ? n * k * bits / 8 : n * k * size_of(weight.type);
}

// As many workers as have enough to do between two barriers. Each vector beyond the first is
// reckoned as a byte for each weight.
int workers_worth(const Model& m, std::int64_t b) {
  const std::int64_t wide = m.x_projected(), delta = m.dt_projected();
  std::int64_t bytes = bytes_of(m.head, m.v, m.d), weights = m.v * m.d;
  for (const Layer& layer : m.layers) {
    bytes += bytes_of(layer.in_proj, m.projected(), m.d) + bytes_of(layer.x_proj, wide, m.e) +
             bytes_of(layer.dt_proj, delta, m.r) + bytes_of(layer.out_proj, m.d, m.e);
    weights += m.d * (m.projected() + m.e) + m.e * wide + delta * m.r;
  }
  const auto barriers = kBarriers * static_cast<std::int64_t>(m.layers.size()) + 1;
  const std::int64_t between = (bytes + weights * (b - 1)) / barriers;
  return static_cast<int>(std::clamp<std::int64_t>(between / kWorkBetweenBarriers, 1, 1 << 20));
}

Tensor3 rows_of(float* data, std::int64_t row_stride) {
  return {data, DType::f32, row_stride, 0, 1};
}

class DecodeStep {
 public:
  DecodeStep(const Model& model, const States& state, std::int64_t b, Buffers& buffers, float* logits)
      : kernels_(kernels()), m_(model), state_(state), b_(b), buf_(buffers), logits_(logits) {}

  // What one worker does; the barriers separate what all must have finished.
  void run(Barrier& barrier, WorkerScratch& own) {
    const auto n_layer = static_cast<std::int64_t>(m_.layers.size());
    for (std::int64_t index = 0; index < n_layer; ++index) {
      const Layer& layer = m_.layers[index];
      rms_norm(b_, m_.d, {buf_.hidden.data(), DType::f32, m_.d}, layer.norm, own.small.norm, m_.eps,
               {own.normed, DType::f32, m_.d});
      mix(index, barrier, own);
      Prefetch to_next = index + 1 < n_layer
          ? Prefetch(m_.layers[index + 1].in_proj, m_.d, own.rows.mine(m_.has_heads() ? m_.projected() : m_.e))
          : Prefetch(m_.head, m_.d, own.rows.mine(m_.v));
      barrier.wait([&] { to_next.fetch_line(); });
    }
    rms_norm(b_, m_.d, {buf_.hidden.data(), DType::f32, m_.d}, m_.norm, own.small.norm, m_.eps,
             {own.normed, DType::f32, m_.d});
    const Product head(m_.head, {own.normed, b_, m_.d, m_.d, own.rounding});
    own.rows.for_blocks(m_.v, row_bytes(m_.head, m_.d),
                        [&](RowRange rows) { head.write(rows, nullptr, {logits_, m_.v}); });
  }

  // hidden (b, d) += a layer's mixer of `normed`, of which this worker computes some columns.
  void mix(std::int64_t index, Barrier& barrier, WorkerScratch& own) {
    const Layer& layer = m_.layers[index];
    Prefetch to_out_proj(layer.out_proj, m_.e, own.rows.mine(m_.d));
    const float* const y = m_.has_heads() ? mix_heads(index, barrier, own, to_out_proj)
                                          : mix_channels(index, barrier, own, to_out_proj);
    const Product out(layer.out_proj, {y, b_, m_.e, m_.e, own.rounding});
    own.rows.for_blocks(m_.d, row_bytes(layer.out_proj, m_.e), [&](RowRange rows) {
      const float* bias = floats(layer.out_proj_bias, own.small.out_proj_bias, rows);
      out.write(rows, bias, {buf_.hidden.data(), m_.d, true});
    });
  }

 private:
  std::int64_t wide() const { return m_.x_projected(); }

  // What a row of a weight takes to be read, as it counts for the size of blocks: a product of matrices,
  // as which many vectors are multiplied, is worth it for more rows.
  std::int64_t row_bytes(const Weight& weight, std::int64_t k) const {
    constexpr std::int64_t kFewVectors = 8;
    return bytes_of(weight, 1, k) / (b_ <= kFewVectors ? 1 : 4);
  }

  // y (b, e) of Mamba: what goes into out_proj, which `to_out_proj` prefetches meanwhile.
  const float* mix_channels(std::int64_t index, Barrier& barrier, WorkerScratch& own, Prefetch& to_out_proj) {
    const Layer& layer = m_.layers[index];
    const Product in(layer.in_proj, {own.normed, b_, m_.d, m_.d, own.rounding});
    own.rows.for_blocks(m_.e, 2 * row_bytes(layer.in_proj, m_.d), [&](RowRange channels) {
      // x and z of the same channels.
      in_project(layer, in, own, channels);
      in_project(layer, in, own, {m_.e + channels.first, m_.e + channels.last});
      convolve(layer, index, own, channels);
    });
    Prefetch to_x_proj(layer.x_proj, m_.e, own.rows.mine(wide(), kNarrowUnit));
    barrier.wait([&] { to_x_proj.fetch_line(); });
    const Product narrow(layer.x_proj, {buf_.convolved.data(), b_, m_.e, m_.e, own.rounding});
    const auto write_narrow = [&](RowRange rows) { narrow.write(rows, nullptr, {buf_.rBC.data(), wide()}); };
    own.rows.for_blocks(wide(), row_bytes(layer.x_proj, m_.e), write_narrow, kNarrowUnit);
    Prefetch to_dt_proj(layer.dt_proj, m_.r, own.rows.mine(m_.e));
    barrier.wait([&] { to_dt_proj.fetch_line(); });
    float* const rBC = normed_rBC(layer, own);
    const Product delta(layer.dt_proj, {rBC, b_, m_.r, wide(), own.rounding});
    const std::int64_t channel_bytes = bytes_of(layer.dt_proj, 1, m_.r) + (2 * b_ + 1) * m_.n * 4;
    own.rows.for_blocks(m_.e, channel_bytes,
                        [&](RowRange channels) { scan(layer, index, delta, own, channels, rBC); });
    barrier.wait([&] { to_out_proj.fetch_line(); });
    return buf_.y.data();
  }

  // The same of Mamba-2. Its convolution has all that is between z and the step sizes.
  const float* mix_heads(std::int64_t index, Barrier& barrier, WorkerScratch& own, Prefetch& to_out_proj) {
    const Layer& layer = m_.layers[index];
    const Product in(layer.in_proj, {own.normed, b_, m_.d, m_.d, own.rounding});
    own.rows.for_blocks(m_.projected(), row_bytes(layer.in_proj, m_.d), [&](RowRange rows) {
      in_project(layer, in, own, rows);
      const std::int64_t first = std::max(rows.first, m_.e) - m_.e;
      const std::int64_t last = std::min(rows.last, m_.e + m_.conv_channels()) - m_.e;
      if (first < last) convolve(layer, index, own, {first, last});
    });
    const SsdStep step = {ssd_of(m_, layer, own.small, activations(nullptr)), b_, rows_of(buf_.y.data(), m_.e),
                          states_of(m_, state_, index), m_.e * m_.n, state_.slot_of};
    const float* const first_state = step.state + slot_in(step.slot_of, 0) * step.state_stride;
    const RowRange mine = own.rows.mine(m_.e);
    Prefetch to_state(first_state + mine.first * m_.n, (mine.last - mine.first) * m_.n);
    barrier.wait([&] { to_state.fetch_line(); });
    own.rows.for_blocks(m_.e, 2 * b_ * m_.n * 4,
                        [&](RowRange channels) { kernels_.ssd_step(step, channels.first, channels.last); });
    barrier.wait([&] { to_out_proj.fetch_line(); });
    if (layer.gated_norm.data == nullptr) return buf_.y.data();
    // Of all channels: a group's norm needs them, and computing is cheaper than waiting again.
    norm_groups(m_, layer, own.small, b_, buf_.projected.data(), buf_.y.data(),
                {own.normed_y, DType::f32, m_.e});
    return own.normed_y;
  }

  // What x_proj gave, (b, r + 2n); after the layer's norms, where it has them.
  float* normed_rBC(const Layer& layer, WorkerScratch& own) {
    if (layer.dt_norm.data == nullptr) return buf_.rBC.data();
    norm_rBC(m_, layer, own.small, b_, buf_.rBC.data(), own.rBC);
    return own.rBC;
  }

  // Rows of what in_proj gives.
  void in_project(const Layer& layer, const Product& in, WorkerScratch& own, RowRange rows) {
    const float* bias = floats(layer.in_proj_bias, own.small.in_proj_bias, rows);
    in.write(rows, bias, {buf_.projected.data(), m_.projected()});
    scale_projected(m_, layer, own.small, b_, buf_.projected.data(), rows);
  }

  // Channels of the convolution, of which this worker has computed the inputs.
  void convolve(const Layer& layer, std::int64_t index, WorkerScratch& own, RowRange channels) {
    const ConvStep conv = {conv_of(m_, layer, own.small, activations(nullptr), channels), b_,
                           rows_of(buf_.convolved.data(), m_.conv_channels()),
                           window_of(m_, state_, index), state_.slot_of};
    kernels_.conv_step(conv, channels.first, channels.last);
  }

  // The step size of these channels, then their state space with D and gate. One row goes
  // through some channels at a time, so that reading the next ones' numbers and computing overlap;
  // of more rows each keeps to its own range of memory.
  void scan(const Layer& layer, std::int64_t index, const Product& delta, WorkerScratch& own, RowRange channels,
            float* rBC) {
    const ScanStep scan = {scan_of(m_, layer, own.small, activations(rBC), channels), b_,
                           rows_of(buf_.y.data(), m_.e), states_of(m_, state_, index),
                           m_.e * m_.n, state_.slot_of};
    const float* const first_state = scan.state + slot_in(scan.slot_of, 0) * scan.state_stride;
    const std::int64_t block = b_ == 1 ? kScanBlock : channels.last - channels.first;
    for (std::int64_t first = channels.first; first < channels.last; first += block) {
      const RowRange some{first, std::min(first + block, channels.last)};
      const RowRange next{some.last, std::min(some.last + block, channels.last)};
      fetch(layer.A != nullptr ? Array{layer.A, DType::f32} : layer.A_log, next);
      fetch({first_state, DType::f32}, next);
      delta.write(some, nullptr, {buf_.delta.data(), m_.e});
      compute_A(m_, layer, own.small, some);
      kernels_.scan_step(scan, some.first, some.last);
    }
  }

  Activations activations(float* rBC) const {
    return {rows_of(buf_.projected.data(), m_.projected()),
            rows_of(buf_.convolved.data(), m_.conv_channels()), rows_of(rBC, wide()),
            rows_of(buf_.delta.data(), m_.e)};
  }

  // Prefetches the rows of an array (e, n).
  void fetch(Array array, RowRange rows) const {
    const char* const last = static_cast<const char*>(at(array, rows.last * m_.n));
    for (const char* p = static_cast<const char*>(at(array, rows.first * m_.n)); p < last; p += 64)
      __builtin_prefetch(p);
  }

  const Kernels& kernels_;
  const Model& m_;
  const States& state_;
  const std::int64_t b_;
  Buffers& buf_;
  float* const logits_;
};

}  // namespace

void decode_step(const Model& model, const States& state, std::int64_t b,
                 const std::int64_t* tokens, const float* hidden, float* logits,
                 bool bf16_products) {
  if (b == 0) return;
  Buffers buffers(model, b);
  embed(model, tokens, hidden, b, buffers.hidden.data());
  DecodeStep step(model, state, b, buffers, logits);
  const int most = std::min(Threads::count(), workers_worth(model, b));
  Shares shares(most);
  parallel_region(
      WorkerScratch::bytes(model, b, bf16_products),
      [&](int worker, int workers, Barrier& barrier, Arena& memory) {
        WorkerScratch own(model, b, bf16_products, memory, SharedRows(shares, worker, workers));
        step.run(barrier, own);
      },
      most);
}

void mixer_step(const Model& model, const States& state, const Rows& x, const Rows& y,
                std::int64_t b, bool bf16_products) {
  if (b == 0) return;
  Buffers buffers(model, b);
  DecodeStep step(model, state, b, buffers, nullptr);
  const int most = std::min(Threads::count(), workers_worth(model, b));
  Shares shares(most);
  parallel_region(
      WorkerScratch::bytes(model, b, bf16_products),
      [&](int worker, int workers, Barrier& barrier, Arena& memory) {
        WorkerScratch own(model, b, bf16_products, memory, SharedRows(shares, worker, workers));
        for (std::int64_t row = 0; row < b; ++row)
          kernels().to_float32(at({x.data, x.type}, row * x.row_stride), x.type, own.normed + row * model.d,
                          model.d);
        step.mix(0, barrier, own);
      },
      most);
  for (std::int64_t row = 0; row < b; ++row) {
    const auto offset = row * y.row_stride * size_of(y.type);
    kernels().convert(buffers.hidden.data() + row * model.d, DType::f32,
                      static_cast<char*>(y.data) + offset, y.type, model.d);
  }
}

}  // namespace anymamba
