// A whole model: a prompt read at once equals its tokens one by one, on any number of threads.
// Against what the model should compute it is tested from Python.
#include <memory>

#include "check.h"
#include "prefill.h"
#include "step.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

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

  Example(DType type, std::int64_t d, std::int64_t e, std::int64_t n) {
    Model& m = model;
    m.v = 41, m.d = d, m.e = e, m.n = n, m.r = 3, m.k = 4, m.eps = 1e-5f;
    m.embeddings = weight(type, m.v, d);
    m.head = m.embeddings;
    m.norm = array(type, d);
    for (int i = 0; i < 2; ++i) {
      Layer layer;
      layer.norm = array(type, d);
      layer.in_proj = weight(type, 2 * e, d);
      layer.conv_weight = array(type, e * m.k);
      layer.conv_bias = array(type, e);
      layer.x_proj = weight(type, m.r + 2 * n, e);
      layer.dt_proj = weight(type, e, m.r);
      layer.dt_bias = array(type, e);
      layer.A_log = array(type, e * n);
      layer.D = array(type, e);
      layer.out_proj = weight(type, d, e);
      if (i == 1) layer.out_proj_bias = array(type, d);
      m.layers.push_back(layer);
    }
  }
};

struct Memories {
  std::vector<float> conv, ssm;
  States view;
  Memories(const Model& m, std::int64_t b)
      : conv(m.layers.size() * b * m.e * m.k), ssm(m.layers.size() * b * m.e * m.n) {
    view.conv = conv.data();
    view.ssm = ssm.data();
  }
};

void close(const std::vector<float>& a, const std::vector<float>& b, double tolerance, const char* what) {
  for (std::size_t i = 0; i < a.size(); ++i)
    CHECK(std::fabs(a[i] - b[i]) <= tolerance * std::fmax(1, std::fabs(b[i])), "%s: %g, expected %g", what, a[i], b[i]);
}

// float32: other orders of the same sums. bfloat16: activations of a prompt may be rounded to it.
void test_prompt(DType type, std::int64_t d, std::int64_t e, std::int64_t n, double tolerance) {
  Example example(type, d, e, n);
  const Model& m = example.model;
  const std::vector<std::int64_t> offsets = {0, 5, 5, 14};  // the second sequence has no tokens
  const std::int64_t b = 3, l = offsets.back();
  std::vector<std::int64_t> tokens(l), positions(l);
  for (std::int64_t i = 0; i < l; ++i) tokens[i] = example.random.below(m.v), positions[i] = i;

  std::vector<float> stepped(l * m.v), stepped_ssm;
  Memories after(m, b);
  for (std::int64_t i = 0; i < b; ++i) {
    Memories one(m, 1);
    for (std::int64_t t = offsets[i]; t < offsets[i + 1]; ++t)
      decode_step(m, one.view, 1, &tokens[t], nullptr, &stepped[t * m.v]);
    const std::int64_t size = m.e * m.n;
    for (std::size_t layer = 0; layer < m.layers.size(); ++layer)
      std::memcpy(&after.ssm[(layer * b + i) * size], &one.ssm[layer * size], size * sizeof(float));
  }
  std::vector<float> first;
  for (const int threads : {1, 2, 4}) {
    Threads::set_count(threads);
    Memories read(m, b);
    std::vector<float> logits(l * m.v);
    read_prompt(m, read.view, {b, offsets.data(), tokens.data(), nullptr, l, positions.data()}, logits.data());
    close(logits, stepped, tolerance, "logits");
    close(read.ssm, after.ssm, tolerance, "states");
    if (threads == 1) first = logits;
    CHECK(logits == first, "%d threads give other logits than one", threads);
  }
}

void test_batch_of_steps() {
  Example example(DType::f32, 17, 35, 16);
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

// A kept beside A_log changes nothing, in a step or in a prompt.
void test_kept_rates(DType type) {
  Example example(type, 16, 35, 5);
  Model& m = example.model;
  const std::vector<std::int64_t> tokens = {3, 1, 4, 1, 5}, offsets = {0, 5}, positions = {4};
  std::vector<std::vector<float>> kept;
  std::vector<float> found[2];
  for (std::vector<float>& logits : found) {
    Memories memories(m, 1);
    logits.resize(2 * m.v);
    read_prompt(m, memories.view, {1, offsets.data(), tokens.data(), nullptr, 1, positions.data()}, logits.data());
    decode_step(m, memories.view, 1, tokens.data(), nullptr, logits.data() + m.v);
    for (Layer& layer : m.layers) {
      kept.emplace_back(m.e * m.n);
      kernels().rates(layer.A_log.data, layer.A_log.type, kept.back().data(), m.e * m.n);
      layer.A = kept.back().data();
    }
  }
  CHECK(found[0] == found[1], "A kept beside A_log gives other logits");
}

}  // namespace

int main() {
  test_kept_rates(DType::f32);
  test_kept_rates(DType::bf16);
  test_prompt(DType::f32, 16, 32, 16, 1e-4);
  test_prompt(DType::f32, 13, 21, 5, 1e-4);
  test_prompt(DType::bf16, 16, 32, 16, 5e-2);
  test_batch_of_steps();
  return finish("model");
}
