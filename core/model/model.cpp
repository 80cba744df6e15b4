#include "model/model.h"

namespace anymamba {

void embed(const Model& m, const std::int64_t* tokens, std::int64_t count, float* hidden) {
  if (m.embeddings.quantized.bits != 0) {
    for (std::int64_t i = 0; i < count; ++i)
      kernels().dequantize(m.embeddings.quantized, tokens[i], m.d, hidden + i * m.d);
    return;
  }
  const std::int64_t row_bytes = 
      m.embeddings.row_stride * size_of(m.embeddings.type);
  const char* const rows = static_cast<const char*>(m.embeddings.data);
  for (std::int64_t i = 0; i < count; ++i)
    kernels().to_float32(rows + tokens[i] * row_bytes, m.embeddings.type, hidden + i * m.d, m.d);
}

Window window_of(const Model& m, const States& states, std::int64_t b, std::int64_t layer) {
  Window window;
  window.data = static_cast<char*>(states.conv) +
                layer * b * m.e * m.k * size_of(states.conv_type);
  window.type = states.conv_type;
  window.state_stride = m.e * m.k;
  window.channel_stride = m.k;
  window.column_stride = 1;
  window.columns = m.k;
  return window;
}

float* states_of(const Model& m, const States& states, std::int64_t b, std::int64_t layer) {
  return states.ssm + layer * b * m.e * m.n;
}

}  // namespace anymamba
