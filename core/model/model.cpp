#include "model/model.h"

namespace anymamba {

void embed(const Model& m, const std::int64_t* tokens, std::int64_t count, float* hidden) {
  if (m.embeddings.quantized.bits != 0) {
    for (std::int64_t i = 0; i < count; ++i)
      kernels().dequantize(m.embeddings.quantized, tokens[i], m.d, hidden + i * m.d);
    return;
  }
  const std::int64_t row_bytes = m.embeddings.row_stride * size_of(m.embeddings.type);
  const char* const rows = static_cast<const char*>(m.embeddings.data);
  for (std::int64_t i = 0; i < count; ++i)
    kernels().to_float32(rows + tokens[i] * row_bytes, m.embeddings.type, hidden + i * m.d, m.d);
}

}  // namespace anymamba
