#include "model/decode_step.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"
#include "base/arena.h"

namespace anymamba {
namespace {

constexpr int kMostVectors = 16;        // that gemv takes at once
constexpr std::int64_t kScanBlock = 64;  // channels
constexpr std::int64_t kWeightRows = 32;  // read from memory once, then used for all vectors
constexpr std::int64_t kBarriers = 4;     // of a layer
// What a worker should have to do between two barriers, in bytes read from memory: a barrier takes
// as long as reading some thousand.
constexpr std::int64_t kWorkBetweenBarriers = 24 << 10;

// The weight rows that a worker will read next. They are fetched into its second cache while it
// waits for others or computes, when memory would stand idle.
class Ahead {
 public:
  Ahead(const Weight& weight, std::int64_t k, RowRange rows) {
    const QuantizedWeight& quantized = weight.quantized;
    const bool whole = quantized.bits != 0;
    const std::int64_t row = whole ? k * quantized.bits / 8
                                   : weight.row_stride * size_of(weight.type);
    next_ = (whole ? reinterpret_cast<const char*>(quantized.q)
                   : static_cast<const char*>(weight.data)) + rows.first * row;
    end_ = next_ + std::min((rows.last - rows.first) * row, kMost);
  }
  void fetch(int lines) {
    for (; lines > 0 && next_ < end_; --lines, next_ += 64) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr std::int64_t kMost = 128 << 10;
  const char *next_, *end_;
};

// A worker's vectors as weights want them: rounded to 8 bits by a quantized one, or to bfloat16.
struct Rounded {
  static constexpr int kSmallestGroup = 32;
  const bool bf16_products;
  std::int8_t* q;
  float* scales;
  std::int32_t* sums;
  std::uint16_t* narrow;
  float* wide;

  // Room for b vectors (k,) of `most` numbers at most.
  Rounded(std::int64_t b, std::int64_t most, bool bf16_products, Arena& memory)
      : bf16_products(bf16_products), q(static_cast<std::int8_t*>(memory.take(b * most))),
        scales(memory.floats(b * most / kSmallestGroup)),
        sums(static_cast<std::int32_t*>(memory.take(b * most / kSmallestGroup * 4))),
        narrow(static_cast<std::uint16_t*>(memory.take(bf16_products ? most * 2 : 0))),
        wide(memory.floats(bf16_products ? b * most : 0)) {}

  // Vectors x (b, k) that went through bfloat16, (b, k) without gaps.
  const float* through_bf16(const float* x, std::int64_t stride, std::int64_t b, std::int64_t k) {
    for (std::int64_t row = 0; row < b; ++row) {
      kernels().convert(x + row * stride, DType::f32, narrow, DType::bf16, k);
      kernels().to_float32(narrow, DType::bf16, wide + row * k, k);
    }
    return wide;
  }

  QuantizedActivations rows(const float* x, std::int64_t stride, std::int64_t b, std::int64_t k, int group) {
    const QuantizedActivations rows = {b, k, group, q, scales, sums};
    kernels().quantize_activations(x, stride, rows, 0, b);
    return rows;
  }
};

// Vectors x (b, k), and the worker's room for rounding them.
struct Vectors {
  const float* data;
  std::int64_t b, k, stride;
  Rounded& rounded;
};

// y (b, .) = x weight^T + bias for the weight's rows [first, last).
void project(const Weight& weight, const Vectors& x, const float* bias, float* y,
             std::int64_t y_stride, RowRange rows) {
  if (const QuantizedWeight& quantized = weight.quantized; quantized.bits != 0) {
    const QuantizedActivations rounded = x.rounded.rows(x.data, x.stride, x.b, x.k, quantized.group);
    return kernels().quantized_gemv({quantized, rounded, bias, y, y_stride}, rows.first, rows.last);
  }
  const bool rounds = operand_type(weight, x.rounded.bf16_products) == DType::bf16;
  const float* const data = rounds ? x.rounded.through_bf16(x.data, x.stride, x.b, x.k) : x.data;
  const std::int64_t stride = rounds ? x.k : x.stride;
  const std::int64_t block = x.b <= kMostVectors ? rows.last - rows.first : kWeightRows;
  for (std::int64_t first = rows.first; first < rows.last; first += block) {
    const std::int64_t last = std::min(rows.last, first + block);
    for (std::int64_t row = 0; row < x.b; row += kMostVectors) {
      Gemv product;
      product.k = x.k;
      product.weight = weight.data;
      product.type = weight.type;
      product.weight_row_stride = weight.row_stride;
      product.bias = bias;
      product.x = data + row * stride;
      product.x_row_stride = stride;
      product.y = y + row * y_stride;
      product.y_row_stride = y_stride;
      product.m = static_cast<int>(std::min<std::int64_t>(kMostVectors, x.b - row));
      kernels().gemv(product, first, last);
    }
  }
}

// The buffers of one step, shared by the workers.
struct Buffers {
  std::vector<float> hidden, xz, x, rBC, delta, y, change;
  Buffers(const Model& m, std::int64_t b)
      : hidden(b * m.d), xz(b * 2 * m.e), x(b * m.e), rBC(b * (m.r + 2 * m.n)), delta(b * m.e),
        y(b * m.e), change(b * m.d) {}
};

// A worker's own memory: float32 forms of a layer's small tensors, of which it fills its own rows,
// and rounded vectors.
struct Own {
  float *normed;  // (b, d): every worker's own, which is cheaper than waiting for one
  float *rBC;     // (b, r + 2n), normed: as above
  float *norm, *dt_norm, *B_norm, *C_norm;
  float *in_proj_bias, *conv_weight, *conv_bias, *dt_bias, *A, *D, *out_proj_bias;
  Rounded rounded;
  Own(const Model& m, std::int64_t b, bool bf16_products, Arena& memory)
      : normed(memory.floats(b * m.d)), rBC(memory.floats(b * (m.r + 2 * m.n))),
        norm(memory.floats(m.d)), dt_norm(memory.floats(m.r)), B_norm(memory.floats(m.n)),
        C_norm(memory.floats(m.n)), in_proj_bias(memory.floats(2 * m.e)), conv_weight(memory.floats(m.e * m.k)),
        conv_bias(memory.floats(m.e)), dt_bias(memory.floats(m.e)), A(memory.floats(m.e * m.n)),
        D(memory.floats(m.e)), out_proj_bias(memory.floats(m.d)),
        rounded(b, widest(m), bf16_products, memory) {}

  // What a worker needs, the scratch memory of the kernels included that it calls: norm,
  // quantized_gemv and scan_step.
  static std::int64_t bytes(const Model& m, std::int64_t b, bool bf16_products) {
    constexpr std::int64_t kVector = 16, kNormRows = 16;
    Arena counted;
    Own(m, b, bf16_products, counted);
    for (std::int64_t row = 0; row < b; row += kNormRows) counted.floats(2 * (widest(m) + 2 * kVector));
    counted.floats(2 * b * (widest(m) / Rounded::kSmallestGroup + kVector));
    counted.floats(2 * (m.n + kVector));
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
  const std::int64_t wide = m.r + 2 * m.n;
  std::int64_t bytes = bytes_of(m.head, m.v, m.d), weights = m.v * m.d;
  for (const Layer& layer : m.layers) {
    bytes += bytes_of(layer.in_proj, 2 * m.e, m.d) + bytes_of(layer.x_proj, wide, m.e) +
             bytes_of(layer.dt_proj, m.e, m.r) + bytes_of(layer.out_proj, m.d, m.e);
    weights += m.e * (3 * m.d + wide + m.r);
  }
  const auto barriers = kBarriers * static_cast<std::int64_t>(m.layers.size()) + 1;
  const std::int64_t between = (bytes + weights * (b - 1)) / barriers;
  return static_cast<int>(std::clamp<std::int64_t>(between / kWorkBetweenBarriers, 1, 1 << 20));
}

Tensor3 rows_of(float* data, std::int64_t row_stride) {
  return {data, DType::f32, row_stride, 0, 1};
}

class Step {
 public:
  Step(const Model& model, const States& state, std::int64_t b, Buffers& buffers,
       float* logits, bool bf16_products)
      : kernels_(kernels()), m_(model), state_(state), b_(b), buf_(buffers), logits_(logits),
        bf16_products_(bf16_products) {}

  // What one worker does; the barriers separate what all must have finished.
  void run(int worker, int workers, Barrier& barrier, Own& own) {
    for (std::size_t index = 0; index < m_.layers.size(); ++index) {
      const Layer& layer = m_.layers[index];
      const RowRange rows = share(m_.d, worker, workers);
      norm({buf_.hidden.data(), DType::f32, m_.d}, m_.d, layer.norm, own.norm, m_.eps,
           {own.normed, DType::f32, m_.d});
      mix(index, worker, workers, barrier, own);
      add_back(rows);
      Ahead to_next = index + 1 < m_.layers.size()
          ? Ahead(m_.layers[index + 1].in_proj, m_.d, share(m_.e, worker, workers))
          : Ahead(m_.head, m_.d, share(m_.v, worker, workers));
      barrier.wait([&] { to_next.fetch(1); });
    }
    norm({buf_.hidden.data(), DType::f32, m_.d}, m_.d, m_.norm, own.norm, m_.eps,
         {own.normed, DType::f32, m_.d});
    project(m_.head, {own.normed, b_, m_.d, m_.d, own.rounded}, nullptr, logits_, m_.v,
            share(m_.v, worker, workers));
  }

  // `change` (b, d): a layer's mixer of `normed`, of which this worker computes its own columns.
  void mix(std::size_t index, int worker, int workers, Barrier& barrier, Own& own) {
    const Layer& layer = m_.layers[index];
    const RowRange channels = share(m_.e, worker, workers);
    convolve(layer, index, own, channels);
    const RowRange narrow = share(wide(), worker, workers, 4);
    Ahead to_x_proj(layer.x_proj, m_.e, narrow);
    barrier.wait([&] { to_x_proj.fetch(1); });
    project(layer.x_proj, {buf_.x.data(), b_, m_.e, m_.e, own.rounded}, nullptr, buf_.rBC.data(),
            wide(), narrow);
    Ahead to_dt_proj(layer.dt_proj, m_.r, channels);
    barrier.wait([&] { to_dt_proj.fetch(1); });
    const RowRange rows = share(m_.d, worker, workers);
    Ahead to_out_proj(layer.out_proj, m_.e, rows);
    scan(layer, index, own, channels, normed_rBC(layer, own));
    barrier.wait([&] { to_out_proj.fetch(1); });
    const float* bias = floats(layer.out_proj_bias, own.out_proj_bias, rows.first, rows.last - rows.first);
    project(layer.out_proj, {buf_.y.data(), b_, m_.e, m_.e, own.rounded}, bias,
            buf_.change.data(), m_.d, rows);
  }

 private:
  std::int64_t wide() const { return m_.r + 2 * m_.n; }

  // normed (b, width) from x (b, width); `buffer` is for the weight.
  void norm(const Rows& x, std::int64_t width, Array weight, float* buffer, float eps,
            const Rows& normed) {
    Norm norm;
    norm.rows = b_;
    norm.d = width;
    norm.x = x;
    norm.weight = floats(weight, buffer, 0, width);
    norm.eps = eps;
    NormResult result;
    result.normed = normed;
    kernels_.norm(norm, result);
  }

  // What x_proj gave, (b, r + 2n); after the layer's norms, where it has them.
  float* normed_rBC(const Layer& layer, Own& own) {
    if (layer.dt_norm.data == nullptr) return buf_.rBC.data();
    const auto norm_part = [&](std::int64_t first, std::int64_t width, Array weight, float* buffer) {
      norm({buf_.rBC.data() + first, DType::f32, wide()}, width, weight, buffer, m_.mixer_eps,
           {own.rBC + first, DType::f32, wide()});
    };
    norm_part(0, m_.r, layer.dt_norm, own.dt_norm);
    norm_part(m_.r, m_.n, layer.B_norm, own.B_norm);
    norm_part(m_.r + m_.n, m_.n, layer.C_norm, own.C_norm);
    return own.rBC;
  }

  // x and z of this worker's channels, then the convolution of x.
  void convolve(const Layer& layer, std::size_t index, Own& own, RowRange channels) {
    for (const std::int64_t half : {std::int64_t{0}, m_.e}) {
      const RowRange rows{half + channels.first, half + channels.last};
      const float* bias = floats(layer.in_proj_bias, own.in_proj_bias, rows.first, rows.last - rows.first);
      project(layer.in_proj, {own.normed, b_, m_.d, m_.d, own.rounded}, bias, buf_.xz.data(), 2 * m_.e,
              rows);
    }
    const std::int64_t width = channels.last - channels.first;
    ConvStep conv;
    conv.b = b_;
    conv.e = m_.e;
    conv.k = m_.k;
    conv.x = rows_of(buf_.xz.data(), 2 * m_.e);
    conv.y = rows_of(buf_.x.data(), m_.e);
    conv.weight = floats(layer.conv_weight, own.conv_weight, channels.first * m_.k, width * m_.k);
    conv.bias = floats(layer.conv_bias, own.conv_bias, channels.first, width);
    conv.silu = true;
    conv.window = window_of(m_, state_, b_, static_cast<std::int64_t>(index));
    kernels_.conv_step(conv, channels.first, channels.last);
  }

  // The step size of this worker's channels, then their state space with D and gate. One row goes
  // through some channels at a time, so that reading the next ones' numbers and computing overlap;
  // of more rows each keeps to its own stretch of memory.
  void scan(const Layer& layer, std::size_t index, Own& own, RowRange channels, float* rBC) {
    const std::int64_t width = channels.last - channels.first;
    ScanStep scan;
    scan.b = b_;
    scan.e = m_.e;
    scan.n = m_.n;
    scan.x = rows_of(buf_.x.data(), m_.e);
    scan.delta = rows_of(buf_.delta.data(), m_.e);
    scan.z = rows_of(buf_.xz.data() + m_.e, 2 * m_.e);
    scan.y = rows_of(buf_.y.data(), m_.e);
    scan.B = {rBC + m_.r, DType::f32, wide(), 0, 0, 1};
    scan.C = {rBC + m_.r + m_.n, DType::f32, wide(), 0, 0, 1};
    scan.A = layer.A != nullptr ? layer.A : own.A;
    scan.D = floats(layer.D, own.D, channels.first, width);
    scan.delta_bias = floats(layer.dt_bias, own.dt_bias, channels.first, width);
    scan.softplus = true;
    scan.state = states_of(m_, state_, b_, static_cast<std::int64_t>(index));
    scan.state_row_stride = m_.e * m_.n;
    const std::int64_t block = b_ == 1 ? kScanBlock : channels.last - channels.first;
    for (std::int64_t first = channels.first; first < channels.last; first += block) {
      const RowRange some{first, std::min(first + block, channels.last)};
      const RowRange next{some.last, std::min(some.last + block, channels.last)};
      fetch(layer.A != nullptr ? Array{layer.A, DType::f32} : layer.A_log, next);
      fetch({scan.state, DType::f32}, next);
      project(layer.dt_proj, {rBC, b_, m_.r, wide(), own.rounded}, nullptr,
              buf_.delta.data(), m_.e, some);
      const std::int64_t start = some.first * m_.n;
      if (layer.A == nullptr)
        kernels_.negative_exp(at(layer.A_log, start), layer.A_log.type, own.A + start,
                       some.last * m_.n - start);
      kernels_.scan_step(scan, some.first, some.last);
    }
  }

  // Asks for the rows of an array (e, n).
  void fetch(Array array, RowRange rows) const {
    const char* const last = static_cast<const char*>(at(array, rows.last * m_.n));
    for (const char* p = static_cast<const char*>(at(array, rows.first * m_.n)); p < last; p += 64)
      __builtin_prefetch(p);
  }

  // hidden += change, for this worker's columns.
  void add_back(RowRange rows) {
    for (std::int64_t row = 0; row < b_; ++row)
      for (std::int64_t i = rows.first; i < rows.last; ++i)
        buf_.hidden[row * m_.d + i] += buf_.change[row * m_.d + i];
  }

  const Kernels& kernels_;
  const Model& m_;
  const States& state_;
  const std::int64_t b_;
  Buffers& buf_;
  float* const logits_;
  const bool bf16_products_;
};

}  // namespace

void decode_step(const Model& model, const States& state, std::int64_t b,
                 const std::int64_t* tokens, const float* hidden, float* logits,
                 bool bf16_products) {
  if (b == 0) return;
  Buffers buffers(model, b);
  if (tokens != nullptr)
    embed(model, tokens, b, buffers.hidden.data());
  else
    std::memcpy(buffers.hidden.data(), hidden, sizeof(float) * b * model.d);
  Step step(model, state, b, buffers, logits, bf16_products);
  parallel_region(
      Own::bytes(model, b, bf16_products),
      [&](int worker, int workers, Barrier& barrier, Arena& memory) {
        Own own(model, b, bf16_products, memory);
        step.run(worker, workers, barrier, own);
      },
      workers_worth(model, b));
}

void mixer_step(const Model& model, const States& state, const Rows& x, const Rows& y,
                std::int64_t b, bool bf16_products) {
  if (b == 0) return;
  Buffers buffers(model, b);
  Step step(model, state, b, buffers, nullptr, bf16_products);
  parallel_region(
      Own::bytes(model, b, bf16_products),
      [&](int worker, int workers, Barrier& barrier, Arena& memory) {
        Own own(model, b, bf16_products, memory);
        for (std::int64_t row = 0; row < b; ++row)
          kernels().to_float32(at({x.data, x.type}, row * x.row_stride), x.type, own.normed + row * model.d,
                          model.d);
        step.mix(0, worker, workers, barrier, own);
      },
      workers_worth(model, b));
  for (std::int64_t row = 0; row < b; ++row) {
    const auto offset = row * y.row_stride * size_of(y.type);
    kernels().convert(buffers.change.data() + row * model.d, DType::f32,
                      static_cast<char*>(y.data) + offset, y.type, model.d);
  }
}

}  // namespace anymamba
