// A Mamba of one text as C functions, which is what WebAssembly can call. Numbers are 32 bits wide and
// pointers are places in the module's memory; mamba.mjs is the other side.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "model/decode_step.h"
#include "model/prefill.h"

using namespace anymamba;

namespace {

struct Engine {
  Model model;
  std::vector<std::vector<float>> rates;  // A of each layer
  std::vector<float> conv, ssm, logits;

  States states() { return {conv.data(), DType::f32, ssm.data(), 1, nullptr}; }
};

Weight matrix(const void* data, DType type, std::int64_t columns) {
  Weight weight;
  weight.data = data;
  weight.type = type;
  weight.row_stride = columns;
  return weight;
}

}  // namespace

extern "C" {

__attribute__((export_name("allocate"))) void* allocate(std::size_t bytes) { return std::malloc(bytes); }
__attribute__((export_name("release"))) void release(void* memory) { std::free(memory); }

// `type` is a DType, which all tensors have; sizes are in the order v, d, e, n, r, k. The memory of
// tensors stays the caller's and must stay as it is.
__attribute__((export_name("create"))) Engine* create(const std::int32_t* sizes, float epsilon, std::int32_t type,
                                                      const void* embeddings, const void* head, const void* norm) {
  auto engine = std::make_unique<Engine>();
  Model& model = engine->model;
  model.v = sizes[0], model.d = sizes[1], model.e = sizes[2], model.n = sizes[3], model.r = sizes[4], model.k = sizes[5];
  model.eps = epsilon;
  const auto storage = static_cast<DType>(type);
  model.embeddings = matrix(embeddings, storage, model.d);
  model.head = matrix(head, storage, model.d);
  model.norm = {norm, storage};
  engine->logits.resize(static_cast<std::size_t>(model.v));
  return engine.release();
}

// Tensors in the order norm, in_proj, conv weight and bias (or null), x_proj, dt_proj and its bias,
// A_log, D, out_proj.
__attribute__((export_name("add_layer"))) void add_layer(Engine* engine, const void* const* tensors, std::int32_t type) {
  Model& model = engine->model;
  const auto storage = static_cast<DType>(type);
  Layer layer;
  layer.norm = {tensors[0], storage};
  layer.in_proj = matrix(tensors[1], storage, model.d);
  layer.conv_weight = {tensors[2], storage};
  layer.conv_bias = {tensors[3], storage};
  layer.x_proj = matrix(tensors[4], storage, model.e);
  layer.dt_proj = matrix(tensors[5], storage, model.r);
  layer.dt_bias = {tensors[6], storage};
  layer.A_log = {tensors[7], storage};
  layer.D = {tensors[8], storage};
  layer.out_proj = matrix(tensors[9], storage, model.e);
  engine->rates.emplace_back(static_cast<std::size_t>(model.e * model.n));
  float* const A = engine->rates.back().data();
  kernels().negative_exp(tensors[7], storage, A, model.e * model.n);
  layer.A = A;
  model.layers.push_back(layer);
  const auto layers = model.layers.size(), channels = static_cast<std::size_t>(model.e);
  engine->conv.assign(layers * channels * static_cast<std::size_t>(model.k), 0.0f);
  engine->ssm.assign(layers * channels * static_cast<std::size_t>(model.n), 0.0f);
}

// Back to the state of a text that has not begun.
__attribute__((export_name("forget"))) void forget(Engine* engine) {
  engine->conv.assign(engine->conv.size(), 0.0f);
  engine->ssm.assign(engine->ssm.size(), 0.0f);
}

// Reads tokens, 1 or more, and returns the logits of the one that follows, (v,).
__attribute__((export_name("read"))) const float* read(Engine* engine, const std::int32_t* tokens, std::int32_t count) {
  const std::vector<std::int64_t> ids(tokens, tokens + count);
  const std::int64_t offsets[] = {0, count}, last = count - 1;
  if (count == 1) {
    decode_step(engine->model, engine->states(), 1, ids.data(), nullptr, engine->logits.data());
  } else {
    Prompt prompt;
    prompt.sequences = 1;
    prompt.offsets = offsets;
    prompt.tokens = ids.data();
    prompt.wanted = 1;
    prompt.positions = &last;
    prefill(engine->model, engine->states(), prompt, engine->logits.data());
  }
  return engine->logits.data();
}

}  // extern "C"
