// A whole model: reading prompts, and decoding token by token.
#include <limits>
#include <vector>

#include "bindings/arrays.h"
#include "bindings/gil.h"
#include "bindings/modules.h"
#include "model/prefill.h"
#include "model/decode_step.h"

namespace anymamba::bindings {
namespace {

constexpr Limits kAnyStep{0.0f, std::numeric_limits<float>::infinity()};

// Weights as one table of checked pointers, which keeps the arrays alive.
class WeightTable {
 protected:
  // Of a weight given as an array, or as a dict of what a quantized one is made of.
  std::int64_t rows_of(const nb::object& given) {
    nb::dict parts;
    if (nb::try_cast<nb::dict>(given, parts)) return extent(array(parts, "q"), 0);
    In found;
    if (!nb::try_cast<In>(given, found)) refuse("a weight is not an array");
    return extent(found, 0);
  }

  Weight weight(const char* name, const nb::object& given, std::int64_t n, std::int64_t k) {
    nb::dict parts;
    if (nb::try_cast<nb::dict>(given, parts))
      return {.quantized = quantized_weight(name, array(parts, "q"), array(parts, "scales"),
                                            maybe(parts, "minima"), n, k)};
    In found;
    if (!nb::try_cast<In>(given, found)) refuse(std::string(name) + " is not an array");
    kept_.push_back(found);
    return dense_weight(name, found, n, k);
  }

  Weight weight(const nb::dict& layer, const char* name, std::int64_t n, std::int64_t k) {
    if (!layer.contains(name)) refuse(std::string(name) + " is missing");
    return weight(name, nb::borrow(layer[name]), n, k);
  }

  In array(const nb::dict& layer, const char* name) {
    MaybeIn found = maybe(layer, name);
    if (!found) refuse(std::string(name) + " is missing");
    return *found;
  }

  MaybeIn maybe(const nb::dict& layer, const char* name) {
    if (!layer.contains(name) || layer[name].is_none()) return std::nullopt;
    In found;
    if (!nb::try_cast<In>(layer[name], found)) refuse(std::string(name) + " is not an array");
    kept_.push_back(found);
    return found;
  }

  // What the layers' arrays do not tell of a Mamba-2.
  void take_heads(std::int64_t groups, Limits dt_limit, bool norm_before_gate) {
    if (groups < 1) refuse("groups is " + std::to_string(groups) + ", expected 1 or more");
    check_limits(dt_limit);
    model_.g = groups;
    model_.dt_low = dt_limit.first;
    model_.dt_high = dt_limit.second;
    model_.norm_before_gate = norm_before_gate;
  }

  void add(const nb::dict& given, bool with_norm) {
    if (model_.layers.empty()) take_sizes(given);
    const std::int64_t d = model_.d, e = model_.e, rates = model_.rates();
    Layer layer;
    if (with_norm) layer.norm = small("norm", array(given, "norm"), {d});
    layer.in_proj = weight(given, "in_proj", model_.projected(), d);
    layer.in_proj_bias = small("in_proj_bias", maybe(given, "in_proj_bias"), {model_.projected()});
    layer.in_proj_scale = small("in_proj_scale", maybe(given, "in_proj_scale"), {model_.projected()});
    layer.conv_weight = small("conv_weight", array(given, "conv_weight"), {model_.conv_channels(), model_.k});
    layer.conv_bias = small("conv_bias", maybe(given, "conv_bias"), {model_.conv_channels()});
    layer.dt_bias = small("dt_bias", maybe(given, "dt_bias"), {rates});
    layer.D = small("D", array(given, "D"), {rates});
    layer.out_proj = weight(given, "out_proj", d, e);
    layer.out_proj_bias = small("out_proj_bias", maybe(given, "out_proj_bias"), {d});
    model_.has_heads() ? add_heads(given, layer) : add_scan(given, layer);
    model_.layers.push_back(layer);
  }

 private:
  void take_sizes(const nb::dict& given) {
    const In A_log = array(given, "A_log"), conv_weight = array(given, "conv_weight");
    model_.k = extent(conv_weight, 1);
    if (A_log.ndim() == 1) {
      if (!given.contains("in_proj")) refuse("in_proj is missing");
      return take_sizes_of_heads(A_log, conv_weight, rows_of(nb::borrow(given["in_proj"])));
    }
    model_.e = extent(A_log, 0);
    model_.n = extent(A_log, 1);
    if (!given.contains("x_proj")) refuse("x_proj is missing");
    model_.r = rows_of(nb::borrow(given["x_proj"])) - 2 * model_.n;
    if (model_.r < 0) refuse("x_proj has fewer rows than two for each state");
  }

  // in_proj gives z of e channels, the convolution's, and a step size for each head.
  void take_sizes_of_heads(const In& A_log, const In& conv_weight, std::int64_t projected) {
    const std::int64_t h = extent(A_log, 0), g = model_.g, e = projected - extent(conv_weight, 0) - h;
    if (h < 1 || e < 1 || e % h != 0)
      refuse(std::to_string(h) + " heads of A_log do not divide the " + std::to_string(e) + " channels");
    if (h % g != 0) refuse(std::to_string(g) + " groups do not divide the " + std::to_string(h) + " heads");
    const std::int64_t maps = extent(conv_weight, 0) - e;
    if (maps < 1 || maps % (2 * g) != 0)
      refuse("conv_weight of shape " + shape_of(conv_weight) + " does not have B and C of " +
             std::to_string(g) + " groups behind the " + std::to_string(e) + " channels");
    model_.e = e;
    model_.h = h;
    model_.n = maps / (2 * g);
  }

  void add_scan(const nb::dict& given, Layer& layer) {
    const std::int64_t e = model_.e, n = model_.n, r = model_.r;
    layer.x_proj = weight(given, "x_proj", r + 2 * n, e);
    if (given.contains("dt_norm")) {
      layer.dt_norm = small("dt_norm", array(given, "dt_norm"), {r});
      layer.B_norm = small("B_norm", array(given, "B_norm"), {n});
      layer.C_norm = small("C_norm", array(given, "C_norm"), {n});
    }
    layer.dt_proj = weight(given, "dt_proj", e, r);
    layer.A_log = small("A_log", array(given, "A_log"), {e, n});
  }

  void add_heads(const nb::dict& given, Layer& layer) {
    layer.A_log = small("A_log", array(given, "A_log"), {model_.h});
    layer.gated_norm = small("gated_norm", maybe(given, "gated_norm"), {model_.e});
  }

 protected:
  States states_of(const Out& conv, const Out& ssm, Shape conv_shape, Shape ssm_shape, std::int64_t slots) const {
    check_shape("conv", conv, conv_shape);
    if (!is_contiguous(conv)) refuse("conv must be contiguous");
    return {pointer(conv), type_of("conv", conv), floats("ssm", ssm, ssm_shape), slots};
  }

  Model model_;
  std::vector<In> kept_;
};

class PyModel : WeightTable {
 public:
  PyModel(const nb::object& embeddings, const nb::object& head, const In& norm, float eps,
          const nb::list& layers, bool constant, float mixer_eps, std::int64_t groups,
          Limits dt_limit, bool norm_before_gate, bool in_order) {
    take_heads(groups, dt_limit, norm_before_gate);
    model_.in_order = in_order;
    model_.d = extent(norm, 0);
    model_.mixer_eps = mixer_eps;
    model_.v = rows_of(embeddings);
    model_.eps = eps;
    model_.embeddings = weight("embeddings", embeddings, model_.v, model_.d);
    model_.head = weight("head", head, model_.v, model_.d);
    model_.norm = small("norm", norm, {model_.d});
    kept_.push_back(norm);
    for (const nb::handle layer : layers) {
      nb::dict given;
      if (!nb::try_cast<nb::dict>(layer, given)) refuse("a layer is not a dict of arrays");
      add(given, true);
    }
    if (constant) keep_A();
  }

  // tokens (b,) int64 or hidden (b, d); conv (layers, slots, channels, k), ssm (layers, slots, e, n) or
  // (layers, slots, h, p, n); logits (b, v); slots (b,) int64.
  void step(const MaybeIn& tokens, const MaybeIn& hidden, const Out& conv, const Out& ssm,
            const Out& logits, bool bf16_products, const MaybeIn& slots) const {
    const std::int64_t b = extent(logits, 0);
    float* const out = floats("logits", logits, {b, model_.v});
    const std::vector<std::int64_t> slot_of = chosen_slots(slots, b, extent(conv, 1));
    const States states = all_states(conv, ssm, b, slots ? &slot_of : nullptr);
    if (tokens.has_value() == hidden.has_value()) refuse("give either tokens or hidden");
    const float* given = floats("hidden", hidden, {b, model_.d});
    const std::vector<std::int64_t> ids = token_ids(tokens, b);
    const WithoutGil unlocked;
    decode_step(model_, states, b, tokens ? ids.data() : nullptr, given, out, bf16_products);
  }

  // tokens (l,) int64 or hidden (l, d), the sequences one behind the other; offsets (b + 1,) and
  // positions (w,) int64; conv, ssm and slots as above; logits (w, v), or without the head (w, d).
  void read(const MaybeIn& tokens, const MaybeIn& hidden, const In& offsets,
            const In& positions, const Out& conv, const Out& ssm, const Out& logits,
            bool bf16_products, const MaybeIn& slots, bool without_head) const {
    if (tokens.has_value() == hidden.has_value()) refuse("give either tokens or hidden");
    const std::int64_t l = extent(tokens ? *tokens : *hidden, 0);
    Prompt prompt;
    prompt.bf16_products = bf16_products;
    prompt.without_head = without_head;
    if (extent(offsets, 0) < 1) refuse("offsets is empty, expected one more than sequences");
    prompt.sequences = extent(offsets, 0) - 1;
    prompt.wanted = extent(positions, 0);
    float* const out = floats("logits", logits, {prompt.wanted, without_head ? model_.d : model_.v});
    const std::vector<std::int64_t> slot_of = chosen_slots(slots, prompt.sequences, extent(conv, 1));
    const States states = all_states(conv, ssm, prompt.sequences, slots ? &slot_of : nullptr);
    prompt.hidden = floats("hidden", hidden, {l, model_.d});
    const std::vector<std::int64_t> ids = token_ids(tokens, l);
    prompt.tokens = tokens ? ids.data() : nullptr;
    const std::vector<std::int64_t> starts = whole_numbers("offsets", offsets);
    const std::vector<std::int64_t> chosen = whole_numbers("positions", positions);
    check_offsets(starts, l);
    for (const std::int64_t position : chosen)
      if (position < 0 || position >= l)
        refuse("position " + std::to_string(position) + " is not one of " + std::to_string(l));
    prompt.offsets = starts.data();
    prompt.positions = chosen.data();
    try {
      WithoutGil unlocked;
      prompt.interrupted = [&] { return unlocked.interrupted(); };
      prefill(model_, states, prompt, out);
    } catch (const Interrupted&) {
      throw nb::python_error();
    }
  }

 private:
  // Without chosen slots there are as many as rows.
  States all_states(const Out& conv, const Out& ssm, std::int64_t b,
                    const std::vector<std::int64_t>* slot_of) const {
    const auto n_layer = static_cast<std::int64_t>(model_.layers.size());
    const std::int64_t channels = model_.conv_channels(), h = model_.h, e = model_.e, n = model_.n;
    const std::int64_t slots = slot_of != nullptr ? extent(conv, 1) : b;
    const Shape windows = {n_layer, slots, channels, model_.k};
    States states = model_.has_heads()
                        ? states_of(conv, ssm, windows, {n_layer, slots, h, e / h, n}, slots)
                        : states_of(conv, ssm, windows, {n_layer, slots, e, n}, slots);
    states.slot_of = slot_of != nullptr ? slot_of->data() : nullptr;
    return states;
  }

  // A copy of (b,) slots, each there and none twice: two rows would write over each other.
  static std::vector<std::int64_t> chosen_slots(const MaybeIn& given, std::int64_t b, std::int64_t slots) {
    if (!given) return {};
    std::vector<std::int64_t> chosen = whole_numbers("slots", *given, b);
    std::vector<bool> taken(static_cast<std::size_t>(slots));
    for (const std::int64_t slot : chosen) {
      if (slot < 0 || slot >= slots)
        refuse("slot " + std::to_string(slot) + " is not one of " + std::to_string(slots));
      if (taken[slot]) refuse("slot " + std::to_string(slot) + " is given to two rows");
      taken[slot] = true;
    }
    return chosen;
  }

  static void check_offsets(const std::vector<std::int64_t>& offsets, std::int64_t l) {
    bool fits = offsets.front() == 0 && offsets.back() == l;
    for (std::size_t i = 1; i < offsets.size(); ++i) fits = fits && offsets[i - 1] <= offsets[i];
    if (!fits) refuse("offsets must ascend from 0 to the number of tokens, " + std::to_string(l));
  }

  // A copy of (count,) token ids, so that what was checked is what is used.
  std::vector<std::int64_t> token_ids(const MaybeIn& tokens, std::int64_t count) const {
    if (!tokens) return {};
    std::vector<std::int64_t> ids = whole_numbers("tokens", *tokens, count);
    for (const std::int64_t id : ids)
      if (id < 0 || id >= model_.v)
        refuse("token " + std::to_string(id) + " is not in the vocabulary of " +
               std::to_string(model_.v));
    return ids;
  }

  // A of all layers, once and for all.
  void keep_A() {
    const std::int64_t size = model_.rates() * model_.rates_width();
    A_.resize(model_.layers.size() * size);
    float* A = A_.data();
    for (Layer& layer : model_.layers) {
      kernels().negative_exp(layer.A_log.data, layer.A_log.type, A, size);
      layer.A = A;
      A += size;
    }
  }

  std::vector<float> A_;
};

// One layer's mixer, for models that are not ours throughout.
class PyMixer : WeightTable {
 public:
  PyMixer(const nb::dict& layer, std::int64_t d, float eps, std::int64_t groups,
          Limits dt_limit, bool norm_before_gate) {
    take_heads(groups, dt_limit, norm_before_gate);
    model_.d = d;
    model_.mixer_eps = eps;
    add(layer, false);
  }

  // x and y (b, d); conv (b, channels, k), ssm (b, e, n) or (b, h, p, n).
  void step(const In& x, const Out& conv, const Out& ssm, const Out& y, bool bf16_products) const {
    const std::int64_t b = extent(x, 0);
    const Rows given = rows("x", x, {b, model_.d}), wanted = rows("y", y, {b, model_.d});
    const std::int64_t channels = model_.conv_channels(), h = model_.h, e = model_.e, n = model_.n;
    const Shape windows = {b, channels, model_.k};
    const States states = h > 0 ? states_of(conv, ssm, windows, {b, h, e / h, n}, b)
                                : states_of(conv, ssm, windows, {b, e, n}, b);
    const WithoutGil unlocked;
    mixer_step(model_, states, given, wanted, b, bf16_products);
  }
};

}  // namespace

void add_model(nb::module_& m) {
  using namespace nb::literals;
  nb::class_<PyModel>(m, "Model", "A model's weights as one table of checked pointers.")
      .def(nb::init<const nb::object&, const nb::object&, const In&, float, const nb::list&, bool,
                    float, std::int64_t, Limits, bool, bool>(),
           "embeddings"_a, "head"_a, "norm"_a, "eps"_a, "layers"_a, "constant"_a = false,
           "mixer_eps"_a = 0.0f, "groups"_a = 1, "dt_limit"_a = kAnyStep, "norm_before_gate"_a = false,
           "in_order"_a = false,
           "With `constant` the weights never change, and what follows from them is kept. "
           "`mixer_eps` is that of dt_norm, B_norm and C_norm, which layers may have, or of gated_norm. "
           "A_log of one number a head makes it a Mamba-2 with `groups` of B and C, whose step sizes "
           "stay within `dt_limit`; its gated_norm, which may be absent, comes behind the gate or before it. "
           "With `in_order` a text's results are the same bits whatever is computed beside it.")
      .def("step", &PyModel::step, "tokens"_a.none(), "hidden"_a.none(), "conv"_a, "ssm"_a,
           "logits"_a, "bf16_products"_a = false, "slots"_a = nb::none(),
           "One token for each row; the states advance in place, that of row i in slot slots[i].")
      .def("read", &PyModel::read, "tokens"_a.none(), "hidden"_a.none(), "offsets"_a,
           "positions"_a, "conv"_a, "ssm"_a, "logits"_a, "bf16_products"_a = false,
           "slots"_a = nb::none(), "without_head"_a = false,
           "The tokens of several sequences; the states advance in place, that of sequence i in slot "
           "slots[i]. Without the head, `logits` gets what it would read.");
  nb::class_<PyMixer>(m, "Mixer", "The weights of one layer's mixer as one table of checked pointers.")
      .def(nb::init<const nb::dict&, std::int64_t, float, std::int64_t, Limits, bool>(), "layer"_a, "d"_a,
           "eps"_a = 0.0f, "groups"_a = 1, "dt_limit"_a = kAnyStep, "norm_before_gate"_a = false,
           "`eps` is that of the norms inside the mixer; the others are as for `Model`.")
      .def("step", &PyMixer::step, "x"_a, "conv"_a, "ssm"_a, "y"_a, "bf16_products"_a = false,
           "One token for each row; the states advance in place.");
}

}  // namespace anymamba::bindings
