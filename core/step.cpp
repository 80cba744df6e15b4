#include "step.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace anymamba {
namespace {

constexpr int kMostVectors = 16;        // that few_rows takes at once
constexpr std::int64_t kWeightRows = 32;  // read from memory once, then used for all vectors

struct Span {
  std::int64_t first, last;
};

// A worker's share of `count` rows, in units of 16 so that workers do not share cache lines.
Span share(std::int64_t count, int worker, int workers) {
  const std::int64_t units = (count + 15) / 16;
  const auto border = [&](int w) { return std::min(count, units * w / workers * 16); };
  return {border(worker), border(worker + 1)};
}

// y (b, .) = x (b, k) weight^T + bias for the weight's rows [first, last).
void project(const Kernels& kernels, const Weight& weight, std::int64_t k, const float* bias,
             const float* x, std::int64_t x_stride, float* y, std::int64_t y_stride,
             std::int64_t b, Span rows) {
  const std::int64_t block = b <= kMostVectors ? rows.last - rows.first : kWeightRows;
  for (std::int64_t first = rows.first; first < rows.last; first += block) {
    const std::int64_t last = std::min(rows.last, first + block);
    for (std::int64_t row = 0; row < b; row += kMostVectors) {
      FewRows product;
      product.k = k;
      product.weight = weight.data;
      product.type = weight.type;
      product.weight_row_stride = weight.row_stride;
      product.bias = bias;
      product.x = x + row * x_stride;
      product.x_row_stride = x_stride;
      product.y = y + row * y_stride;
      product.y_row_stride = y_stride;
      product.m = static_cast<int>(std::min<std::int64_t>(kMostVectors, b - row));
      kernels.few_rows(product, first, last);
    }
  }
}

// The buffers of one step, shared by the workers.
struct Buffers {
  std::vector<float> hidden, xz, x, rBC, delta, y, change;
  Buffers(const StepModel& m, std::int64_t b)
      : hidden(b * m.d), xz(b * 2 * m.e), x(b * m.e), rBC(b * (m.r + 2 * m.n)), delta(b * m.e),
        y(b * m.e), change(b * m.d) {}
};

// A worker's float32 forms of a layer's small tensors, of which it fills its own rows.
struct Widened {
  std::vector<float> norm, in_proj_bias, conv_weight, conv_bias, dt_bias, A, D, out_proj_bias;
  explicit Widened(const StepModel& m)
      : norm(m.d), in_proj_bias(2 * m.e), conv_weight(m.e * m.k), conv_bias(m.e), dt_bias(m.e),
        A(m.e * m.n), D(m.e), out_proj_bias(m.d) {}
};

Tensor3 rows_of(float* data, std::int64_t row_stride) {
  return {data, DType::f32, row_stride, 0, 1};
}

class Step {
 public:
  Step(const StepModel& model, const StepState& state, std::int64_t b, Buffers& buffers,
       float* logits)
      : kernels_(kernels()), m_(model), state_(state), b_(b), buf_(buffers), logits_(logits) {}

  // What one worker does; the barriers separate what all must have finished.
  void run(int worker, int workers, Barrier& barrier) {
    std::vector<float> normed(b_ * m_.d);  // every worker's own: cheaper than waiting for one
    Widened widened(m_);
    for (std::size_t index = 0; index < m_.layers.size(); ++index) {
      const StepLayer& layer = m_.layers[index];
      const Span channels = share(m_.e, worker, workers);
      norm(layer.norm, widened, normed.data());
      convolve(layer, index, normed.data(), widened, channels);
      barrier.wait();
      project(kernels_, layer.x_proj, m_.e, nullptr, buf_.x.data(), m_.e, buf_.rBC.data(), wide(),
              b_, share(wide(), worker, workers));
      barrier.wait();
      scan(layer, index, widened, channels);
      barrier.wait();
      add_back(layer, widened, share(m_.d, worker, workers));
      barrier.wait();
    }
    norm(m_.norm, widened, normed.data());
    project(kernels_, m_.head, m_.d, nullptr, normed.data(), m_.d, logits_, m_.v, b_,
            share(m_.v, worker, workers));
  }

 private:
  std::int64_t wide() const { return m_.r + 2 * m_.n; }

  // normed (b, d) from hidden (b, d).
  void norm(Array weight, Widened& widened, float* normed) {
    Norm norm;
    norm.rows = b_;
    norm.d = m_.d;
    norm.x = {buf_.hidden.data(), DType::f32, m_.d};
    norm.weight = floats(weight, widened.norm, {0, m_.d});
    norm.eps = m_.eps;
    NormResult result;
    result.normed = {normed, DType::f32, m_.d};
    kernels_.norm(norm, result);
  }

  // x and z of this worker's channels, then the convolution of x.
  void convolve(const StepLayer& layer, std::size_t index, const float* normed, Widened& widened,
                Span channels) {
    for (const std::int64_t half : {std::int64_t{0}, m_.e}) {
      const Span rows{half + channels.first, half + channels.last};
      const float* bias = floats(layer.in_proj_bias, widened.in_proj_bias, rows);
      project(kernels_, layer.in_proj, m_.d, bias, normed, m_.d, buf_.xz.data(), 2 * m_.e, b_,
              rows);
    }
    ConvStep conv;
    conv.b = b_;
    conv.e = m_.e;
    conv.k = m_.k;
    conv.x = rows_of(buf_.xz.data(), 2 * m_.e);
    conv.y = rows_of(buf_.x.data(), m_.e);
    conv.weight = floats(layer.conv_weight, widened.conv_weight, channels, m_.k);
    conv.bias = floats(layer.conv_bias, widened.conv_bias, channels);
    conv.silu = true;
    conv.window = window(index);
    kernels_.conv_step(conv, channels.first, channels.last);
  }

  // The step size of this worker's channels, then their state space with D and gate.
  void scan(const StepLayer& layer, std::size_t index, Widened& widened, Span channels) {
    project(kernels_, layer.dt_proj, m_.r, nullptr, buf_.rBC.data(), wide(), buf_.delta.data(),
            m_.e, b_, channels);
    ScanStep scan;
    scan.b = b_;
    scan.e = m_.e;
    scan.n = m_.n;
    scan.x = rows_of(buf_.x.data(), m_.e);
    scan.delta = rows_of(buf_.delta.data(), m_.e);
    scan.z = rows_of(buf_.xz.data() + m_.e, 2 * m_.e);
    scan.y = rows_of(buf_.y.data(), m_.e);
    scan.B = {buf_.rBC.data() + m_.r, DType::f32, wide(), 0, 0, 1};
    scan.C = {buf_.rBC.data() + m_.r + m_.n, DType::f32, wide(), 0, 0, 1};
    const std::int64_t first = channels.first * m_.n;
    kernels_.rates(at(layer.A_log, first), layer.A_log.type, widened.A.data() + first,
                   channels.last * m_.n - first);
    scan.A = widened.A.data();
    scan.D = floats(layer.D, widened.D, channels);
    scan.delta_bias = floats(layer.dt_bias, widened.dt_bias, channels);
    scan.softplus = true;
    scan.state = state_.ssm + static_cast<std::int64_t>(index) * b_ * m_.e * m_.n;
    scan.state_row_stride = m_.e * m_.n;
    kernels_.scan_step(scan, channels.first, channels.last);
  }

  // hidden += out_proj(y), for this worker's rows of out_proj.
  void add_back(const StepLayer& layer, Widened& widened, Span rows) {
    const float* bias = floats(layer.out_proj_bias, widened.out_proj_bias, rows);
    project(kernels_, layer.out_proj, m_.e, bias, buf_.y.data(), m_.e, buf_.change.data(), m_.d,
            b_, rows);
    for (std::int64_t row = 0; row < b_; ++row)
      for (std::int64_t i = rows.first; i < rows.last; ++i)
        buf_.hidden[row * m_.d + i] += buf_.change[row * m_.d + i];
  }

  // Rows [first, last) of a small tensor with `width` numbers a row as floats: where they lie, or
  // widened into `buffer`. Indexed from row 0 either way.
  const float* floats(Array array, std::vector<float>& buffer, Span rows,
                      std::int64_t width = 1) const {
    if (array.data == nullptr) return nullptr;
    if (array.type == DType::f32) return static_cast<const float*>(array.data);
    const std::int64_t first = rows.first * width;
    kernels_.widen(at(array, first), array.type, buffer.data() + first, rows.last * width - first);
    return buffer.data();
  }

  static const void* at(Array array, std::int64_t index) {
    return static_cast<const char*>(array.data) + index * static_cast<std::int64_t>(size_of(array.type));
  }

  Window window(std::size_t index) const {
    const std::int64_t layer = static_cast<std::int64_t>(index) * b_ * m_.e * m_.k;
    Window window;
    window.data = static_cast<char*>(state_.conv) + layer * size_of(state_.conv_type);
    window.type = state_.conv_type;
    window.state_stride = m_.e * m_.k;
    window.channel_stride = m_.k;
    window.column_stride = 1;
    window.columns = m_.k;
    return window;
  }

  const Kernels& kernels_;
  const StepModel& m_;
  const StepState& state_;
  const std::int64_t b_;
  Buffers& buf_;
  float* const logits_;
};

// hidden (b, d): the embeddings of the tokens, widened by the matrix kernel's conversion.
void embed(const StepModel& m, std::int64_t b, const std::int64_t* tokens, float* hidden) {
  const Kernels& table = kernels();
  for (std::int64_t row = 0; row < b; ++row) {
    const char* source = static_cast<const char*>(m.embeddings.data) +
                         tokens[row] * m.embeddings.row_stride * size_of(m.embeddings.type);
    table.widen(source, m.embeddings.type, hidden + row * m.d, m.d);
  }
}

}  // namespace

void decode_step(const StepModel& model, const StepState& state, std::int64_t b,
                 const std::int64_t* tokens, const float* hidden, float* logits) {
  if (b == 0) return;
  Buffers buffers(model, b);
  if (tokens != nullptr)
    embed(model, b, tokens, buffers.hidden.data());
  else
    std::memcpy(buffers.hidden.data(), hidden, sizeof(float) * b * model.d);
  Step step(model, state, b, buffers, logits);
  parallel_region([&](int worker, int workers, Barrier& barrier) {
    step.run(worker, workers, barrier);
  });
}

}  // namespace anymamba
