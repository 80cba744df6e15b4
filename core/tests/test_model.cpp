// A whole model: a prompt read at once equals its tokens one by one, on any number of threads.
// Against what the model should compute it is tested from Python.
#include <memory>

#include "tests/regions.h"
#include "base/work_stealing.h"
#include "model/prefill.h"
#include "model/decode_step.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

// Of Mamba-2: heads, their width, groups of them.
struct Heads {
  std::int64_t h, p, g;
};

// A model of small random numbers, with its memory.
struct Example {
  Model model;
  std::vector<std::unique_ptr<std::vector<char>>> memory;
  Random random{7};

  void* numbers(DType type, std::int64_t count, double size) {
    memory.push_back(std::make_unique<std::vector<char>>(count * size_of(type)));
    std::vector<float> values(count);
    for (float& value : values) value = static_cast<float>(size * random.number());
    void* const data = memory.back()->data();
    kernels().convert(values.data(), DType::f32, data, type, count);
    return data;
  }
  Weight weight(DType type, std::int64_t n, std::int64_t k) { return {numbers(type, n * k, 0.3), type, k, {}}; }
  Array array(DType type, std::int64_t count) { return {numbers(type, count, 1.0), type}; }

  // A weight whose scales make its numbers as large as those of `weight`.
  Weight quantized_weight(int bits, int group, std::int64_t n, std::int64_t k) {
    memory.push_back(std::make_unique<std::vector<char>>(n * k * bits / 8));
    for (char& byte : *memory.back()) byte = static_cast<char>(random.below(256));
    Weight weight;
    weight.quantized = {bits, group, reinterpret_cast<const std::uint8_t*>(memory.back()->data()),
                        nullptr, nullptr};
    memory.push_back(std::make_unique<std::vector<char>>(n * k / group * 2));
    const std::vector<float> scales(n * k / group, 0.3f / static_cast<float>(1 << (bits - 1)));
    void* const narrow = memory.back()->data();
    kernels().convert(scales.data(), DType::f32, narrow, DType::bf16, n * k / group);
    weight.quantized.scales = static_cast<const std::uint16_t*>(narrow);
    return weight;
  }

  // Of one of five storage types.
  Weight any_weight(int kind, std::int64_t n, std::int64_t k) {
    if (kind < 3) return weight(static_cast<DType>(kind), n, k);
    return quantized_weight(kind == 3 ? 8 : 4, 32, n, k);
  }

  Example(DType type, std::int64_t d, std::int64_t e, std::int64_t n, std::int64_t r = 3,
          bool normed = false) {
    Model& m = model;
    m.v = 41, m.d = d, m.e = e, m.n = n, m.r = r, m.k = 4, m.eps = 1e-5f, m.mixer_eps = 1e-6f;
    add_layers(type);
    for (Layer& layer : m.layers) {
      layer.x_proj = weight(type, m.r + 2 * n, e);
      layer.dt_proj = weight(type, e, m.r);
      if (normed) {
        layer.dt_norm = array(type, m.r);
        layer.B_norm = array(type, n);
        layer.C_norm = array(type, n);
      }
    }
  }

  // A Mamba-2; its second layer may be without a norm behind the gate, and scale what in_proj gives.
  Example(DType type, std::int64_t d, std::int64_t n, const Heads& heads, bool scaled = false) {
    Model& m = model;
    m.v = 41, m.d = d, m.e = heads.h * heads.p, m.n = n, m.k = 4, m.eps = 1e-5f, m.mixer_eps = 1e-6f;
    m.h = heads.h, m.g = heads.g, m.dt_low = 0.2f, m.dt_high = 1.5f;
    add_layers(type);
    for (Layer& layer : m.layers) layer.gated_norm = array(type, m.e);
    if (scaled) {
      m.layers[1].gated_norm = {};
      m.layers[1].in_proj_scale = array(type, m.projected());
    }
  }

  // What both architectures have.
  void add_layers(DType type) {
    Model& m = model;
    m.embeddings = weight(type, m.v, m.d);
    m.head = m.embeddings;
    m.norm = array(type, m.d);
    for (int i = 0; i < 2; ++i) {
      Layer layer;
      layer.norm = array(type, m.d);
      layer.in_proj = weight(type, m.projected(), m.d);
      layer.conv_weight = array(type, m.conv_channels() * m.k);
      layer.conv_bias = array(type, m.conv_channels());
      layer.dt_bias = array(type, m.rates());
      layer.A_log = array(type, m.rates() * m.rates_width());
      layer.D = array(type, m.rates());
      layer.out_proj = weight(type, m.d, m.e);
      if (i == 1) layer.in_proj_bias = array(type, m.projected());
      if (i == 1) layer.out_proj_bias = array(type, m.d);
      m.layers.push_back(layer);
    }
  }
};

// One slot more than rows, which have them in opposite order.
struct Memories {
  const std::int64_t slots;
  std::vector<float> conv, ssm;
  std::vector<std::int64_t> slot_of;
  States view;
  Memories(const Model& m, std::int64_t b)
      : slots(b + 1), conv(m.layers.size() * slots * m.conv_channels() * m.k),
        ssm(m.layers.size() * slots * m.e * m.n) {
    for (std::int64_t row = 0; row < b; ++row) slot_of.push_back(b - row);
    view = {conv.data(), DType::f32, ssm.data(), slots, slot_of.data()};
  }
  // The state of a row's slot in a layer.
  float* state(const Model& m, std::size_t layer, std::int64_t row) {
    return &ssm[(static_cast<std::int64_t>(layer) * slots + slot_of[row]) * m.e * m.n];
  }
};

void close(const std::vector<float>& a, const std::vector<float>& b, double tolerance, const char* what) {
  for (std::size_t i = 0; i < a.size(); ++i)
    CHECK(std::fabs(a[i] - b[i]) <= tolerance * std::fmax(1, std::fabs(b[i])), "%s: %g, expected %g", what, a[i], b[i]);
}

// A prompt against its tokens one by one.
void test_prompt_of(Example& example, double tolerance, bool bf16_products = false) {
  const Model& m = example.model;
  const std::vector<std::int64_t> offsets = {0, 5, 5, 14};  // the second sequence has no tokens
  const std::int64_t b = 3, l = offsets.back();
  std::vector<std::int64_t> tokens(l), positions(l);
  for (std::int64_t i = 0; i < l; ++i) tokens[i] = example.random.below(m.v), positions[i] = i;

  std::vector<float> stepped(l * m.v);
  Memories after(m, b);
  for (std::int64_t i = 0; i < b; ++i) {
    Memories one(m, 1);
    for (std::int64_t t = offsets[i]; t < offsets[i + 1]; ++t)
      decode_step(m, one.view, 1, &tokens[t], nullptr, &stepped[t * m.v], bf16_products);
    for (std::size_t layer = 0; layer < m.layers.size(); ++layer)
      std::memcpy(after.state(m, layer, i), one.state(m, layer, 0), m.e * m.n * sizeof(float));
  }
  std::vector<float> first;
  for (const int threads : {1, 2, 4}) {
    Threads::set_count(threads);
    Memories read(m, b);
    std::vector<float> logits(l * m.v);
    prefill(m, read.view,
                {b, offsets.data(), tokens.data(), nullptr, l, positions.data(), bf16_products},
                logits.data());
    close(logits, stepped, tolerance, "logits");
    close(read.ssm, after.ssm, tolerance, "states");
    if (threads == 1) first = logits;
    CHECK(logits == first, "%d threads give other logits than one", threads);
  }
}

// Other orders of the same sums; whatever the weights are stored in, activations are float32.
void test_prompt(DType type, std::int64_t d, std::int64_t e, std::int64_t n, bool normed = false) {
  Example example(type, d, e, n, 3, normed);
  test_prompt_of(example, 1e-4);
}

void test_prompt(DType type, std::int64_t d, std::int64_t n, const Heads& heads, bool scaled = false) {
  Example example(type, d, n, heads, scaled);
  test_prompt_of(example, 1e-4);
  example.model.norm_before_gate = true;
  test_prompt_of(example, 1e-4);
  for (Layer& layer : example.model.layers) layer.gated_norm = {};
  test_prompt_of(example, 1e-4);
  // Rounded activations may fall on either side of a border.
  if (scaled) test_prompt_of(example, 0.1, true);
}

// Each matrix has a storage type of its own. Rounded activations may fall on either side of a
// border, which moves logits by some hundredths; an operand of the wrong type moves them by all.
void test_mixtures() {
  Random random{11};
  for (int i = 0; i < 16; ++i)
    for (const bool bf16_products : {false, true}) {
      Example example = i < 12 ? Example(DType::f32, 32, 64, 5, 32) : Example(DType::f32, 32, 5, {4, 16, 2});
      Model& m = example.model;
      const auto any = [&](std::int64_t n, std::int64_t k) {
        return example.any_weight(static_cast<int>(random.below(5)), n, k);
      };
      m.embeddings = any(m.v, m.d);
      m.head = any(m.v, m.d);
      for (Layer& layer : m.layers) {
        layer.in_proj = any(m.projected(), m.d);
        if (!m.has_heads()) {
          layer.x_proj = any(m.r + 2 * m.n, m.e);
          layer.dt_proj = any(m.e, m.r);
        }
        layer.out_proj = any(m.d, m.e);
      }
      test_prompt_of(example, 0.3, bf16_products);
    }
}

void test_batch_of_steps(Example example) {
  const Model& m = example.model;
  const std::int64_t b = 5;
  const std::vector<std::int64_t> tokens = {1, 2, 3, 4, 5};
  std::vector<float> first;
  for (const int threads : {1, 3}) {
    Threads::set_count(threads);
    Memories memories(m, b);
    std::vector<float> logits(b * m.v);
    for (int i = 0; i < 3; ++i) decode_step(m, memories.view, b, tokens.data(), nullptr, logits.data());
    if (threads == 1) first = logits;
    CHECK(logits == first, "%d threads give other logits than one", threads);
  }
}

// Logits and states of some steps with so many threads, of which one may be slow.
std::vector<float> after_steps(const Model& m, std::int64_t b, int threads, bool slow) {
  Threads::set_count(threads);
  if (slow) Shares::before_block = [](int worker) { if (worker == 1) pause_ms(1); };
  Memories memories(m, b);
  std::vector<std::int64_t> tokens(b);
  std::vector<float> found(b * m.v);
  for (std::int64_t step = 0; step < 3; ++step) {
    for (std::int64_t row = 0; row < b; ++row) tokens[row] = (7 * row + step) % m.v;
    Threads::forget_lateness();
    decode_step(m, memories.view, b, tokens.data(), nullptr, found.data());
  }
  Shares::before_block = nullptr;
  found.insert(found.end(), memories.conv.begin(), memories.conv.end());
  found.insert(found.end(), memories.ssm.begin(), memories.ssm.end());
  return found;
}

// Who computes which rows changes nothing. The model is so wide that shares have several blocks.
void test_slow_worker(Example example) {
  Model& m = example.model;
  for (const int kind : {0, 1, 3, 4}) {  // of the storage types
    for (Layer& layer : m.layers) {
      layer.in_proj = example.any_weight(kind, m.projected(), m.d);
      layer.out_proj = example.any_weight(kind, m.d, m.e);
    }
    for (const std::int64_t b : {1, 3, 20}) {
      const std::vector<float> alone = after_steps(m, b, 1, false);
      for (const bool slow : {false, true})
        CHECK(after_steps(m, b, 3, slow) == alone, "type %d, %lld rows: a slow worker changes results", kind,
              (long long)b);
    }
  }
}

// A kept beside A_log changes nothing, in a step or in a prompt.
void test_kept_A(Example example) {
  Model& m = example.model;
  const std::vector<std::int64_t> tokens = {3, 1, 4, 1, 5}, offsets = {0, 5}, positions = {4};
  std::vector<std::vector<float>> kept;
  std::vector<float> found[2];
  for (std::vector<float>& logits : found) {
    Memories memories(m, 1);
    logits.resize(2 * m.v);
    prefill(m, memories.view, {1, offsets.data(), tokens.data(), nullptr, 1, positions.data()}, logits.data());
    decode_step(m, memories.view, 1, tokens.data(), nullptr, logits.data() + m.v);
    for (Layer& layer : m.layers) {
      const std::int64_t size = m.rates() * m.rates_width();
      kept.emplace_back(size);
      kernels().negative_exp(layer.A_log.data, layer.A_log.type, kept.back().data(), size);
      layer.A = kept.back().data();
    }
  }
  CHECK(found[0] == found[1], "A kept beside A_log gives other logits");
}

}  // namespace

int main() {
  test_kept_A(Example(DType::f32, 16, 35, 5));
  test_kept_A(Example(DType::bf16, 16, 35, 5));
  test_kept_A(Example(DType::bf16, 16, 5, {3, 7, 1}));
  test_prompt(DType::f32, 16, 32, 16);
  test_prompt(DType::f32, 13, 21, 5);
  test_prompt(DType::f32, 13, 21, 5, true);
  test_prompt(DType::f32, 3, 6, 70, true);  // more states than the model is wide
  test_prompt(DType::bf16, 16, 32, 16);
  test_prompt(DType::bf16, 16, 32, 16, true);
  test_prompt(DType::f16, 16, 32, 16);
  test_prompt(DType::f32, 16, 16, {4, 8, 2});
  test_prompt(DType::f32, 16, 16, {4, 8, 2}, true);
  test_prompt(DType::bf16, 16, 5, {3, 7, 1}, true);
  test_prompt(DType::f32, 13, 5, {3, 7, 1});    // nothing fits a vector
  test_prompt(DType::f32, 3, 130, {2, 3, 2});   // more states than the model is wide
  test_prompt(DType::bf16, 16, 16, {2, 16, 1});
  test_prompt(DType::f16, 8, 16, {24, 1, 3});   // heads of width one
  test_mixtures();
  test_batch_of_steps(Example(DType::f32, 17, 35, 16));
  test_batch_of_steps(Example(DType::f32, 17, 16, {5, 7, 1}));
  test_slow_worker(Example(DType::f32, 256, 640, 16));
  test_slow_worker(Example(DType::f32, 256, 16, {40, 16, 2}));
  return finish("model");
}
