#include "model/layer_inputs.h"

#include <cstring>

namespace anymamba {
namespace {

// The channels of a tensor from `first` on.
Tensor3 from_channel(Tensor3 tensor, std::int64_t first) {
  tensor.data = static_cast<char*>(tensor.data) + first * tensor.channel_stride * size_of(tensor.type);
  return tensor;
}

// B or C, the columns of `rows` from `first` on: n for each group.
Projection projection(const Model& m, const Tensor3& rows, std::int64_t first) {
  const Tensor3 part = from_channel(rows, first);
  return {part.data,           part.type, part.row_stride, part.step_stride, m.n * part.channel_stride,
          part.channel_stride};
}

}  // namespace

void embed(const Model& m, const std::int64_t* tokens, const float* given, std::int64_t count,
           float* hidden) {
  if (tokens == nullptr) {
    std::memcpy(hidden, given, sizeof(float) * count * m.d);
    return;
  }
  const Weight& table = m.embeddings;
  for (std::int64_t i = 0; i < count; ++i, hidden += m.d)
    if (table.quantized.bits != 0)
      kernels().dequantize(table.quantized, tokens[i], m.d, hidden);
    else
      kernels().to_float32(at({table.data, table.type}, tokens[i] * table.row_stride), table.type,
                           hidden, m.d);
}

SmallTensors::SmallTensors(const Model& m, Arena& memory)
    : norm(memory.floats(m.d)), dt_norm(memory.floats(m.r)), B_norm(memory.floats(m.n)),
      C_norm(memory.floats(m.n)), in_proj_bias(memory.floats(m.projected())),
      in_proj_scale(memory.floats(m.projected())),
      conv_weight(memory.floats(m.conv_channels() * m.k)), conv_bias(memory.floats(m.conv_channels())),
      dt_bias(memory.floats(m.rates())), A(memory.floats(m.rates() * m.rates_width())),
      D(memory.floats(m.rates())), gated_norm(memory.floats(m.has_heads() ? m.e : 0)),
      out_proj_bias(memory.floats(m.d)) {}

const float* floats(Array array, float* buffer, RowRange rows, std::int64_t width) {
  if (array.data == nullptr) return nullptr;
  if (array.type == DType::f32) return static_cast<const float*>(array.data);
  const std::int64_t first = rows.first * width, count = rows.last * width - first;
  kernels().to_float32(at(array, first), array.type, buffer + first, count);
  return buffer;
}

void scale_projected(const Model& m, const Layer& layer, const SmallTensors& small, std::int64_t count,
                     float* projected, RowRange columns) {
  const float* const scale = floats(layer.in_proj_scale, small.in_proj_scale, columns);
  if (scale == nullptr) return;
  for (std::int64_t row = 0; row < count; ++row, projected += m.projected())
    for (std::int64_t i = columns.first; i < columns.last; ++i) projected[i] *= scale[i];
}

void compute_A(const Model& m, const Layer& layer, const SmallTensors& small, RowRange rates) {
  if (layer.A != nullptr) return;
  const std::int64_t width = m.rates_width();
  const std::int64_t first = rates.first * width, count = rates.last * width - first;
  kernels().negative_exp(at(layer.A_log, first), layer.A_log.type, small.A + first, count);
}

ConvInputs conv_of(const Model& m, const Layer& layer, const SmallTensors& small,
                   const Activations& activations, RowRange channels) {
  ConvInputs conv;
  conv.e = m.conv_channels();
  conv.k = m.k;
  conv.x = from_channel(activations.projected, m.first_conv_channel());
  conv.weight = floats(layer.conv_weight, small.conv_weight, channels, m.k);
  conv.bias = floats(layer.conv_bias, small.conv_bias, channels);
  conv.silu = true;
  return conv;
}

ScanInputs scan_of(const Model& m, const Layer& layer, const SmallTensors& small,
                   const Activations& activations, RowRange channels) {
  ScanInputs scan;
  scan.e = m.e;
  scan.n = m.n;
  scan.x = activations.convolved;
  scan.delta = activations.delta;
  scan.z = from_channel(activations.projected, m.e);
  scan.B = projection(m, activations.rBC, m.r);
  scan.C = projection(m, activations.rBC, m.r + m.n);
  scan.A = layer.A != nullptr ? layer.A : small.A;
  scan.D = floats(layer.D, small.D, channels);
  scan.delta_bias = floats(layer.dt_bias, small.dt_bias, channels);
  scan.softplus = true;
  return scan;
}

SsdInputs ssd_of(const Model& m, const Layer& layer, const SmallTensors& small,
                 const Activations& activations) {
  const RowRange heads{0, m.h};
  SsdInputs ssd;
  ssd.heads = m.h;
  ssd.p = m.e / m.h;
  ssd.n = m.n;
  ssd.groups = m.g;
  ssd.x = activations.convolved;
  ssd.B = projection(m, activations.convolved, m.e);
  ssd.C = projection(m, activations.convolved, m.e + m.g * m.n);
  if (layer.gated_norm.data == nullptr || !m.norm_before_gate) ssd.z = activations.projected;
  ssd.dt = from_channel(activations.projected, m.e + m.conv_channels());
  compute_A(m, layer, small, heads);
  ssd.A = layer.A != nullptr ? layer.A : small.A;
  ssd.D = floats(layer.D, small.D, heads);
  ssd.dt_bias = floats(layer.dt_bias, small.dt_bias, heads);
  ssd.softplus = true;
  ssd.low = m.dt_low;
  ssd.high = m.dt_high;
  return ssd;
}

void rms_norm(std::int64_t count, std::int64_t width, const Rows& x, Array weight, float* buffer,
              float eps, const Rows& normed, const Rows& gate_after) {
  NormResult result;
  result.normed = normed;
  kernels().norm({count, width, x, {}, floats(weight, buffer, {0, width}), eps, {}, gate_after}, result);
}

void norm_rBC(const Model& m, const Layer& layer, const SmallTensors& small, std::int64_t count,
              float* rBC, float* normed) {
  const std::int64_t wide = m.r + 2 * m.n;
  const auto norm_part = [&](std::int64_t first, std::int64_t width, Array weight, float* buffer) {
    rms_norm(count, width, {rBC + first, DType::f32, wide}, weight, buffer, m.mixer_eps,
             {normed + first, DType::f32, wide});
  };
  norm_part(0, m.r, layer.dt_norm, small.dt_norm);
  norm_part(m.r, m.n, layer.B_norm, small.B_norm);
  norm_part(m.r + m.n, m.n, layer.C_norm, small.C_norm);
}

void norm_groups(const Model& m, const Layer& layer, const SmallTensors& small, std::int64_t count,
                 float* projected, float* y, const Rows& normed) {
  const std::int64_t width = m.e / m.g;
  for (std::int64_t first = 0; first < m.e; first += width) {
    const Array weight = {at(layer.gated_norm, first), layer.gated_norm.type};
    void* const to = static_cast<char*>(normed.data) + first * size_of(normed.type);
    Rows gate;
    if (m.norm_before_gate) gate = {projected + first, DType::f32, m.projected()};
    rms_norm(count, width, {y + first, DType::f32, m.e}, weight, small.gated_norm + first, m.mixer_eps,
             {to, normed.type, normed.row_stride}, gate);
  }
}

Window window_of(const Model& m, const States& states, std::int64_t layer) {
  const std::int64_t size = m.conv_channels() * m.k, before = layer * states.slots * size;
  char* const data = static_cast<char*>(states.conv) + before * size_of(states.conv_type);
  return {data, states.conv_type, size, m.k, 1, m.k};
}

float* states_of(const Model& m, const States& states, std::int64_t layer) {
  return states.ssm + layer * states.slots * m.e * m.n;
}

}  // namespace anymamba
