#include "model/prefill.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "base/system.h"
#include "model/layer_inputs.h"

namespace anymamba {
namespace {

// Numbers in memory that is another's, with room for float32: they may be of a narrower type.
class Buffer {
 public:
  explicit Buffer(void* data, DType type = DType::f32) : data_(data), type_(type) {}
  Buffer as(DType type) const { return Buffer(data_, type); }
  void* data() const { return data_; }
  float* floats() const { return static_cast<float*>(data_); }
  DType type() const { return type_; }

 private:
  void* data_;
  DType type_;
};

// Memory for all buffers, written before it is read. It comes from the system and goes back to it,
// for a heap keeps gaps between blocks of some megabytes, and grows with every prompt.
class MappedMemory {
 public:
  explicit MappedMemory(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes)) {
    memory_ = map_memory(bytes_);
    if (memory_ == nullptr) throw std::bad_alloc();
    arena_ = Arena(memory_, bytes);
  }
  ~MappedMemory() { unmap_memory(memory_, bytes_); }
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;
  Arena& arena() { return arena_; }

 private:
  const std::size_t bytes_;
  void* memory_;
  Arena arena_;
};

// l tokens' activations, of which `wanted` get logits, and room for copies of the states.
struct Buffers {
  Buffer hidden, normed, projected, convolved, rBC, rounded_rBC, delta, y, chosen, chosen_normed;
  Buffer conv_before, ssm_before;
  SmallTensors small;

  Buffers(const Model& m, std::int64_t l, std::int64_t wanted, std::int64_t conv_bytes,
          std::int64_t ssm_bytes, Arena& memory)
      : hidden(memory.floats(l * m.d)), normed(memory.floats(l * m.d)),
        projected(memory.floats(l * m.projected())), convolved(memory.floats(l * m.conv_channels())),
        rBC(memory.floats(l * m.x_projected())), rounded_rBC(memory.floats(l * m.x_projected())),
        delta(memory.floats(l * m.dt_projected())), y(memory.floats(l * m.e)),
        chosen(memory.floats(wanted * m.d)),
        chosen_normed(memory.floats(wanted * m.d)), conv_before(memory.take(conv_bytes)),
        ssm_before(memory.take(ssm_bytes)), small(m, memory) {}
};

// So many tokens of each sequence take long enough to be interrupted. Copies of the states take
// little beside them.
constexpr std::int64_t kLongTokens = 32;

class Prefill {
 public:
  Prefill(const Model& model, const States& states, const Prompt& prompt)
      : m_(model), states_(states), prompt_(prompt), l_(prompt.offsets[prompt.sequences]),
        copies_(prompt.interrupted && l_ >= kLongTokens * prompt.sequences), memory_(buffer_bytes()),
        buf_(buffers(memory_.arena())) {
    for (std::int64_t i = 0; i < prompt.sequences; ++i) {
      if (prompt.offsets[i] == prompt.offsets[i + 1]) continue;
      slots_.push_back(slot_in(states.slot_of, i));
      starts_.push_back(prompt.offsets[i]);
      stops_.push_back(prompt.offsets[i + 1]);
    }
    zeros_.assign(slots_.size(), 0);
    reserve_scratch(scratch_bytes());  // nothing that is taken below can fail
  }

  void run(float* logits) {
    embed(m_, prompt_.tokens, prompt_.hidden, l_, buf_.hidden.floats());
    for (std::size_t index = 0; index < m_.layers.size(); ++index) {
      const Layer& layer = m_.layers[index];
      if (copies_) keep_or_stop(static_cast<std::int64_t>(index));
      norm(layer.norm, buf_.hidden.floats(), l_, operand_for(layer.in_proj, buf_.normed));
      convolve(layer, static_cast<std::int64_t>(index));
      const Buffer y = m_.has_heads() ? mix_heads(layer, static_cast<std::int64_t>(index))
                                      : scan(layer, static_cast<std::int64_t>(index));
      const float* bias = floats(layer.out_proj_bias, buf_.small.out_proj_bias, {0, m_.d});
      multiply(y, m_.e, l_, m_.e, layer.out_proj, m_.d, bias, buf_.hidden.floats(), true);
    }
    if (prompt_.wanted > 0) write_logits(logits);
  }

 private:
  std::int64_t wide() const { return m_.x_projected(); }

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

  Buffers buffers(Arena& memory) const {
    return {m_, l_, prompt_.wanted, copied(conv_bytes()), copied(ssm_bytes()), memory};
  }

  // Of all buffers, each in float32 whatever its type.
  std::int64_t buffer_bytes() const {
    Arena counted;
    buffers(counted);
    return counted.used();
  }

  // Of one sequence's states in a layer.
  std::int64_t conv_bytes() const { return m_.conv_channels() * m_.k * size_of(states_.conv_type); }
  std::int64_t ssm_bytes() const { return m_.e * m_.n * 4; }

  // So many bytes of each sequence in each layer, where states are copied.
  std::int64_t copied(std::int64_t bytes) const {
    return copies_ ? bytes * prompt_.sequences * static_cast<std::int64_t>(m_.layers.size()) : 0;
  }

  // What the kernels below take together: workers, and this thread for itself.
  std::int64_t scratch_bytes() const {
    const std::int64_t widest = std::max({m_.d, m_.e, wide()});
    const std::int64_t mixer =
        m_.has_heads() ? std::max(ssd_worker_scratch(m_.n), norm_worker_scratch(m_.e / m_.g))
                       : std::max(scan_worker_scratch(m_.n), norm_worker_scratch(std::max(m_.r, m_.n)));
    const std::int64_t worker =
        std::max({kGemmScratch, gemv_scratch(1, widest), quantized_worker_scratch(widest), mixer,
                  conv_worker_scratch(m_.k), norm_worker_scratch(m_.d)});
    constexpr std::int64_t kGemvRows = 16, kLists = 4;  // rows that become float32; of all sequences
    const std::int64_t converted = std::min(l_, kGemvRows) * widest * 4;
    const std::int64_t lists = kLists * in_arena((prompt_.sequences + 1) * 8);
    const std::int64_t scores =
        m_.has_heads() ? ssd_caller_scratch(l_, prompt_.sequences, m_.g) : 0;
    return Threads::count() * in_arena(worker) + quantized_caller_scratch(l_, widest) +
           in_arena(converted) + lists + scores;
  }

  // Copies a layer's states before it changes them. If this is to stop, those of the layers before
  // get their copies back.
  void keep_or_stop(std::int64_t layer) {
    if (prompt_.interrupted()) {
      for (std::int64_t before = 0; before < layer; ++before) copy_states(before, false);
      throw Interrupted();
    }
    copy_states(layer, true);
  }

  // Between a layer's states in their slots and the copies of them, (layers, sequences, .).
  void copy_states(std::int64_t layer, bool keep) const {
    const auto copy = [keep](char* state, char* kept, std::int64_t bytes) {
      std::memcpy(keep ? kept : state, keep ? state : kept, static_cast<std::size_t>(bytes));
    };
    char* const windows = static_cast<char*>(window_of(m_, states_, layer).data);
    char* const states = reinterpret_cast<char*>(states_of(m_, states_, layer));
    char* const conv_before = static_cast<char*>(buf_.conv_before.data());
    char* const ssm_before = static_cast<char*>(buf_.ssm_before.data());
    const auto count = static_cast<std::int64_t>(slots_.size());
    for (std::int64_t i = 0; i < count; ++i) {
      copy(windows + slots_[i] * conv_bytes(), conv_before + (layer * count + i) * conv_bytes(), conv_bytes());
      copy(states + slots_[i] * ssm_bytes(), ssm_before + (layer * count + i) * ssm_bytes(), ssm_bytes());
    }
  }

  Segments segments() const {
    return {static_cast<std::int64_t>(slots_.size()), zeros_.data(), starts_.data(),
            stops_.data(), slots_.data(), slots_.data(), false};
  }

  static Tensor3 rows(const Buffer& buffer, std::int64_t width) {
    return {buffer.data(), buffer.type(), 0, width, 1};
  }

  void norm(Array weight, float* x, std::int64_t count, const Buffer& normed) {
    rms_norm(count, m_.d, {x, DType::f32, m_.d}, weight, buf_.small.norm, m_.eps,
             {normed.data(), normed.type(), m_.d});
  }

  Activations activations() const {
    return {rows(buf_.projected, m_.projected()), rows(buf_.convolved, m_.conv_channels()),
            rows(buf_.rBC, wide()), rows(buf_.delta, m_.e)};
  }

  // c (m, n) = a (m, k) weight^T + bias, or the same added to c; `stride` between rows of a.
  void multiply(const Buffer& a, std::int64_t stride, std::int64_t m, std::int64_t k, const Weight& weight,
                std::int64_t n, const float* bias, float* c, bool accumulate = false) const {
    if (weight.quantized.bits != 0) {
      return kernels().quantized_gemm(
          {m, n, k, a.floats(), stride, weight.quantized, c, n, bias, accumulate});
    }
    kernels().gemm({m, n, k,
                    {a.data(), a.type(), stride, 1},
                    {const_cast<void*>(weight.data), weight.type, 1, weight.row_stride},
                    {c, DType::f32, n, 1},
                    bias, accumulate, false, m_.in_order});
  }

  // What in_proj gives, then the convolution's channels of it through the convolution.
  void convolve(const Layer& layer, std::int64_t index) {
    const std::int64_t width = m_.projected(), channels = m_.conv_channels();
    const float* bias = floats(layer.in_proj_bias, buf_.small.in_proj_bias, {0, width});
    multiply(operand_for(layer.in_proj, buf_.normed), m_.d, l_, m_.d, layer.in_proj, width, bias,
             buf_.projected.floats());
    scale_projected(m_, layer, buf_.small, l_, buf_.projected.floats(), {0, width});
    const Window window = window_of(m_, states_, index);
    kernels().conv({conv_of(m_, layer, buf_.small, activations(), {0, channels}), segments(), window},
                   {rows(buf_.convolved, channels), window});
  }

  // y of Mamba, as out_proj reads it: step size, B and C from x, then the scan with D and gate.
  Buffer scan(const Layer& layer, std::int64_t index) {
    // y is not written yet: until then its memory holds x as x_proj reads it.
    multiply(rounded_for(layer.x_proj, buf_.convolved, m_.e, buf_.y), m_.e, l_, m_.e, layer.x_proj, wide(),
             nullptr, buf_.rBC.floats());
    if (layer.dt_norm.data != nullptr)
      norm_rBC(m_, layer, buf_.small, l_, buf_.rBC.floats(), buf_.rBC.floats());
    multiply(rounded_for(layer.dt_proj, buf_.rBC, wide(), buf_.rounded_rBC), wide(), l_, m_.r,
             layer.dt_proj, m_.e, nullptr, buf_.delta.floats());
    compute_A(m_, layer, buf_.small, {0, m_.e});
    float* const state = states_of(m_, states_, index);
    const Buffer y = operand_for(layer.out_proj, buf_.y);
    kernels().scan({scan_of(m_, layer, buf_.small, activations(), {0, m_.e}), segments(), state},
                   {rows(y, m_.e), state, nullptr});
    return y;
  }

  // The same of Mamba-2: its heads' state space with D, then the norm, with the gate before one of the two.
  Buffer mix_heads(const Layer& layer, std::int64_t index) {
    float* const state = states_of(m_, states_, index);
    const bool has_norm = layer.gated_norm.data != nullptr;
    const Buffer y = has_norm ? buf_.y : operand_for(layer.out_proj, buf_.y);
    const auto compute = m_.in_order ? kernels().ssd_in_order : kernels().ssd;
    compute({ssd_of(m_, layer, buf_.small, activations()), segments(), state}, {rows(y, m_.e), state});
    if (!has_norm) return y;
    // What the convolution gave is spent: its memory holds the normed y.
    const Buffer normed = operand_for(layer.out_proj, buf_.convolved);
    norm_groups(m_, layer, buf_.small, l_, buf_.projected.floats(), y.floats(),
                {normed.data(), normed.type(), m_.e});
    return normed;
  }

  void write_logits(float* logits) {
    for (std::int64_t i = 0; i < prompt_.wanted; ++i)
      std::memcpy(buf_.chosen.floats() + i * m_.d, buf_.hidden.floats() + prompt_.positions[i] * m_.d,
                  sizeof(float) * m_.d);
    if (prompt_.without_head) return norm(m_.norm, buf_.chosen.floats(), prompt_.wanted, Buffer(logits));
    const Buffer normed = operand_for(m_.head, buf_.chosen_normed);
    norm(m_.norm, buf_.chosen.floats(), prompt_.wanted, normed);
    multiply(normed, m_.d, prompt_.wanted, m_.d, m_.head, m_.v, nullptr, logits);
  }

  const Model& m_;
  const States& states_;
  const Prompt& prompt_;
  const std::int64_t l_;  // tokens of all sequences
  const bool copies_;     // whether states are copied
  MappedMemory memory_;
  const Buffers buf_;
  std::vector<std::int64_t> slots_, zeros_, starts_, stops_;  // of the sequences with tokens
};

}  // namespace

void prefill(const Model& model, const States& states, const Prompt& prompt, float* logits) {
  if (prompt.offsets[prompt.sequences] == 0) return;
  Prefill(model, states, prompt).run(logits);
}

}  // namespace anymamba
