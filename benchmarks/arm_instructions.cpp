// A product with quantized weights, of a size that the command line says: run by arm_instructions.py, which
// counts the instructions.
//
//   arm_instructions BITS M N K        m vectors of k numbers times n weight rows, in groups of 128
#include <cstdlib>
#include <memory>
#include <vector>

#include "base/threads.h"
#include "kernels/kernels.h"

using namespace anymamba;

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const int bits = std::atoi(argv[1]), group = 128;
  const std::int64_t m = std::atoll(argv[2]), n = std::atoll(argv[3]), k = std::atoll(argv[4]);
  Threads::set_count(1);
  // As the system gives it, for filling it takes instructions too.
  const std::unique_ptr<std::uint8_t[]> q(new std::uint8_t[static_cast<std::size_t>(n * k * bits / 8)]);
  const std::unique_ptr<std::uint16_t[]> scales(new std::uint16_t[static_cast<std::size_t>(n * (k / group))]);
  std::vector<float> x(static_cast<std::size_t>(m * k), 0.5f), y(static_cast<std::size_t>(m * n));
  const QuantizedWeight weight = {bits, group, q.get(), scales.get(), nullptr};
  if (m > 1) {
    QuantizedGemm product;
    product.m = m, product.n = n, product.k = k, product.weight = weight;
    product.a = x.data(), product.a_row_stride = k, product.c = y.data(), product.c_row_stride = n;
    kernels().quantized_gemm(product);
  } else {
    std::vector<std::int8_t> rounded(static_cast<std::size_t>(k));
    std::vector<float> x_scales(static_cast<std::size_t>(k / group));
    std::vector<std::int32_t> sums(static_cast<std::size_t>(k / group));
    const QuantizedActivations few = {1, k, group, rounded.data(), x_scales.data(), sums.data()};
    kernels().quantize_activations(x.data(), k, few, 0, 1);
    kernels().quantized_gemv({weight, few, nullptr, y.data(), n}, 0, n);
  }
  return y[0] == -1.0f;
}
