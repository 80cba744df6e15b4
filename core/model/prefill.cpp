#include "model/prefill.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "base/arena.h"

namespace anymamba {
namespace {

// Numbers in memory that is another's, with room for float32: they may be of a narrower type.
class Buffer {
 public:
  explicit Buffer(char* data, DType type = DType::f32) : data_(data), type_(type) {}
  Buffer as(DType type) const { return Buffer(data_, type); }
  void* data() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  DType type() const { return type_; }

 private:
  char* data_;
  DType type_;
};

// One block for all buffers, written before they are read. It comes from the system and goes back
// to it, for a heap keeps gaps between blocks of some megabytes, and grows with every stretch.
class Block {
 public:
  explicit Block(std::int64_t numbers) : bytes_(static_cast<std::size_t>(numbers) * 4) {
    memory_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(memory_, bytes_, MADV_HUGEPAGE);
#endif
    next_ = static_cast<char*>(memory_);
  }
  ~Block() { munmap(memory_, bytes_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  Buffer take(std::int64_t count) {
    char* const data = next_;
    next_ += rounded(count) * 4;
    return Buffer(data);
  }
  // What a buffer of `count` numbers takes: whole cache lines.
  static std::int64_t rounded(std::int64_t count) { return (count + 15) / 16 * 16; }

 private:
  std::size_t bytes_;
  void* memory_;
  char* next_;
};

// So many tokens of each sequence take long enough to be interrupted. Copies of the states take
// little beside them.
constexpr std::int64_t kLongTokens = 32;

class Reading {
 public:
  Reading(const Model& model, const States& states, const Prompt& prompt)
      : m_(model), states_(states), prompt_(prompt), l_(prompt.offsets[prompt.sequences]),
        copies_(prompt.interrupted && l_ >= kLongTokens * prompt.sequences), block_(numbers()),
        hidden_(block_.take(l_ * m_.d)), normed_(block_.take(l_ * m_.d)),
        xz_(block_.take(l_ * 2 * m_.e)), x_(block_.take(l_ * m_.e)),
        rBC_(block_.take(l_ * wide())), rounded_rBC_(block_.take(l_ * wide())),
        delta_(block_.take(l_ * m_.e)), y_(block_.take(l_ * m_.e)), A_(block_.take(m_.e * m_.n)),
        chosen_(block_.take(prompt.wanted * m_.d)),
        chosen_normed_(block_.take(prompt.wanted * m_.d)),
        conv_before_(block_.take(copied(conv_bytes()))),
        ssm_before_(block_.take(copied(ssm_bytes()))), norm_(m_.d), bias_(2 * m_.e),
        conv_weight_(m_.e * m_.k), conv_bias_(m_.e), dt_bias_(m_.e), D_(m_.e) {
    for (std::int64_t i = 0; i < prompt.sequences; ++i)
      if (prompt.offsets[i] < prompt.offsets[i + 1]) sequences_.push_back(i);
    zeros_.assign(sequences_.size(), 0);
    for (const std::int64_t i : sequences_) {
      starts_.push_back(prompt.offsets[i]);
      stops_.push_back(prompt.offsets[i + 1]);
    }
    reserve_scratch(scratch_bytes());  // nothing that is taken below can fail
  }

  void run(float* logits) {
    if (prompt_.tokens != nullptr)
      embed(m_, prompt_.tokens, l_, hidden_.floats());
    else
      std::memcpy(hidden_.data(), prompt_.hidden, sizeof(float) * l_ * m_.d);
    for (std::size_t index = 0; index < m_.layers.size(); ++index) {
      const Layer& layer = m_.layers[index];
      if (copies_) keep_or_stop(static_cast<std::int64_t>(index));
      norm(layer.norm, hidden_.floats(), l_, operand_for(layer.in_proj, normed_));
      convolve(layer, static_cast<std::int64_t>(index));
      scan(layer, static_cast<std::int64_t>(index));
      const float* bias = floats(layer.out_proj_bias, bias_.data(), 0, m_.d);
      multiply(operand_for(layer.out_proj, y_), m_.e, l_, m_.e, layer.out_proj, m_.d, bias,
               hidden_.floats(), true);
    }
    if (prompt_.wanted > 0) write_logits(logits);
  }

 private:
  std::int64_t wide() const { return m_.r + 2 * m_.n; }

  // A buffer of activations, in the type that the product with this weight reads.
  Buffer operand_for(const Weight& weight, const Buffer& activations) const {
    return activations.as(operand_type(weight, prompt_.bf16_products));
  }

  // The same of activations that others read as float32: if need be they are rounded into `room`.
  Buffer rounded_for(const Weight& weight, const Buffer& activations, std::int64_t width,
                     const Buffer& room) const {
    const Buffer rounded = operand_for(weight, room);
    if (rounded.type() == DType::f32) return activations;
    constexpr std::int64_t kRows = 32;
    parallel_for((l_ + kRows - 1) / kRows, [&](std::int64_t task) {
      const std::int64_t first = task * kRows * width;
      const std::int64_t count = std::min(kRows * width, l_ * width - first);
      kernels().convert(activations.floats() + first, DType::f32,
                        static_cast<char*>(rounded.data()) + first * 2, rounded.type(), count);
    });
    return rounded;
  }

  // Of all buffers, each in float32 whatever its type.
  std::int64_t numbers() const {
    const auto of = Block::rounded;
    return 2 * of(l_ * m_.d) + of(l_ * 2 * m_.e) + 3 * of(l_ * m_.e) + 2 * of(l_ * wide()) +
           of(m_.e * m_.n) + 2 * of(prompt_.wanted * m_.d) + of(copied(conv_bytes())) +
           of(copied(ssm_bytes()));
  }

  // Of a layer's states.
  std::int64_t conv_bytes() const {
    return prompt_.sequences * m_.e * m_.k * size_of(states_.conv_type);
  }
  std::int64_t ssm_bytes() const { return prompt_.sequences * m_.e * m_.n * 4; }

  // Numbers of four bytes for so many bytes of each layer, where states are copied.
  std::int64_t copied(std::int64_t bytes) const {
    return copies_ ? (bytes * static_cast<std::int64_t>(m_.layers.size()) + 3) / 4 : 0;
  }

  // What the kernels below take together: workers, and this thread for itself.
  std::int64_t scratch_bytes() const {
    const std::int64_t widest = std::max({m_.d, m_.e, wide()});
    const std::int64_t worker =
        std::max({kGemmScratch, quantized_worker_scratch(widest), scan_worker_scratch(m_.n),
                  conv_worker_scratch(m_.k), norm_worker_scratch(m_.d)});
    constexpr std::int64_t kFewRows = 16, kLists = 4;  // rows that are widened; of all sequences
    const std::int64_t widened = std::min(l_, kFewRows) * widest * 4;
    const std::int64_t lists = kLists * in_arena((prompt_.sequences + 1) * 8);
    return Threads::count() * in_arena(worker) + quantized_caller_scratch(l_, widest) +
           in_arena(widened) + lists;
  }

  // Copies a layer's states before it changes them. If this is to stop, those of the layers before
  // get their copies back.
  void keep_or_stop(std::int64_t layer) {
    if (prompt_.interrupted()) {
      std::memcpy(states_.conv, conv_before_.data(), static_cast<std::size_t>(layer * conv_bytes()));
      std::memcpy(states_.ssm, ssm_before_.data(), static_cast<std::size_t>(layer * ssm_bytes()));
      throw Interrupted();
    }
    copy(conv_before_, states_.conv, layer * conv_bytes(), conv_bytes());
    copy(ssm_before_, states_.ssm, layer * ssm_bytes(), ssm_bytes());
  }

  static void copy(const Buffer& to, const void* from, std::int64_t at, std::int64_t bytes) {
    std::memcpy(static_cast<char*>(to.data()) + at, static_cast<const char*>(from) + at,
                static_cast<std::size_t>(bytes));
  }

  Segments segments() const {
    return {static_cast<std::int64_t>(sequences_.size()), zeros_.data(), starts_.data(),
            stops_.data(), sequences_.data(), sequences_.data(), false};
  }

  static Tensor3 rows(const Buffer& buffer, std::int64_t width, std::int64_t first = 0) {
    char* const data = static_cast<char*>(buffer.data());
    return {data + first * size_of(buffer.type()), buffer.type(), 0, width, 1};
  }

  void norm(Array weight, float* x, std::int64_t count, const Buffer& normed) {
    Norm norm;
    norm.rows = count;
    norm.d = m_.d;
    norm.x = {x, DType::f32, m_.d};
    norm.weight = floats(weight, norm_.data(), 0, m_.d);
    norm.eps = m_.eps;
    NormResult result;
    result.normed = {normed.data(), normed.type(), m_.d};
    kernels().norm(norm, result);
  }

  // c (m, n) = a (m, k) weight^T + bias, or the same added to c; `stride` between rows of a.
  static void multiply(const Buffer& a, std::int64_t stride, std::int64_t m, std::int64_t k,
                       const Weight& weight, std::int64_t n, const float* bias, float* c,
                       bool accumulate = false) {
    if (weight.quantized.bits != 0) {
      QuantizedGemm product;
      product.m = m;
      product.n = n;
      product.k = k;
      product.a = a.floats();
      product.a_row_stride = stride;
      product.weight = weight.quantized;
      product.c = c;
      product.c_row_stride = n;
      product.bias = bias;
      product.accumulate = accumulate;
      return kernels().quantized_gemm(product);
    }
    Gemm product;
    product.m = m;
    product.n = n;
    product.k = k;
    product.a = {a.data(), a.type(), stride, 1};
    product.b = {const_cast<void*>(weight.data), weight.type, 1, weight.row_stride};
    product.c = {c, DType::f32, n, 1};
    product.bias = bias;
    product.accumulate = accumulate;
    kernels().gemm(product);
  }

  // x and z, then x through the convolution.
  void convolve(const Layer& layer, std::int64_t index) {
    const float* bias = floats(layer.in_proj_bias, bias_.data(), 0, 2 * m_.e);
    multiply(operand_for(layer.in_proj, normed_), m_.d, l_, m_.d, layer.in_proj, 2 * m_.e, bias,
             xz_.floats());
    Conv conv;
    conv.e = m_.e;
    conv.k = m_.k;
    conv.segments = segments();
    conv.x = rows(xz_, 2 * m_.e);
    conv.weight = floats(layer.conv_weight, conv_weight_.data(), 0, m_.e * m_.k);
    conv.bias = floats(layer.conv_bias, conv_bias_.data(), 0, m_.e);
    conv.silu = true;
    conv.initial = window_of(m_, states_, prompt_.sequences, index);
    ConvResult result;
    result.y = rows(x_, m_.e);
    result.final = conv.initial;
    kernels().conv(conv, result);
  }

  // Step size, B and C from x, then the scan with D and gate.
  void scan(const Layer& layer, std::int64_t index) {
    // y is not written yet: until then its memory holds x as x_proj reads it.
    multiply(rounded_for(layer.x_proj, x_, m_.e, y_), m_.e, l_, m_.e, layer.x_proj, wide(),
             nullptr, rBC_.floats());
    multiply(rounded_for(layer.dt_proj, rBC_, wide(), rounded_rBC_), wide(), l_, m_.r,
             layer.dt_proj, m_.e, nullptr, delta_.floats());
    Scan scan;
    scan.e = m_.e;
    scan.n = m_.n;
    scan.segments = segments();
    scan.x = rows(x_, m_.e);
    scan.delta = rows(delta_, m_.e);
    scan.z = rows(xz_, 2 * m_.e, m_.e);
    scan.B = {rBC_.floats() + m_.r, DType::f32, 0, wide(), 0, 1};
    scan.C = {rBC_.floats() + m_.r + m_.n, DType::f32, 0, wide(), 0, 1};
    if (layer.A == nullptr)
      kernels().negative_exp(layer.A_log.data, layer.A_log.type, A_.floats(), m_.e * m_.n);
    scan.A = layer.A != nullptr ? layer.A : A_.floats();
    scan.D = floats(layer.D, D_.data(), 0, m_.e);
    scan.delta_bias = floats(layer.dt_bias, dt_bias_.data(), 0, m_.e);
    scan.softplus = true;
    float* const state = states_of(m_, states_, prompt_.sequences, index);
    scan.initial = state;
    ScanResult result;
    result.y = rows(operand_for(layer.out_proj, y_), m_.e);
    result.last = state;
    kernels().scan(scan, result);
  }

  void write_logits(float* logits) {
    for (std::int64_t i = 0; i < prompt_.wanted; ++i)
      std::memcpy(chosen_.floats() + i * m_.d, hidden_.floats() + prompt_.positions[i] * m_.d,
                  sizeof(float) * m_.d);
    const Buffer normed = operand_for(m_.head, chosen_normed_);
    norm(m_.norm, chosen_.floats(), prompt_.wanted, normed);
    multiply(normed, m_.d, prompt_.wanted, m_.d, m_.head, m_.v, nullptr, logits);
  }

  const Model& m_;
  const States& states_;
  const Prompt& prompt_;
  const std::int64_t l_;  // tokens of all sequences
  const bool copies_;     // whether states are copied
  Block block_;
  const Buffer hidden_, normed_, xz_, x_, rBC_, rounded_rBC_, delta_, y_, A_, chosen_,
      chosen_normed_, conv_before_, ssm_before_;
  std::vector<float> norm_, bias_, conv_weight_, conv_bias_, dt_bias_, D_;  // widened
  std::vector<std::int64_t> sequences_, zeros_, starts_, stops_;  // those with tokens
};

}  // namespace

void read_prompt(const Model& model, const States& states, const Prompt& prompt, float* logits) {
  if (prompt.offsets[prompt.sequences] == 0) return;
  Reading(model, states, prompt).run(logits);
}

}  // namespace anymamba
