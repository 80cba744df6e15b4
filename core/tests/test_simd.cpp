// The elementary functions over the whole range of float32, and the conversions of all halves.
#include "tests/check.h"

using namespace anymamba;
using namespace anymamba::test;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

long double exact_exp(long double x) { return std::exp(x); }

long double exact_exp2(long double x) { return std::exp2(x); }

long double exact_silu(long double x) { return x / (1 + std::exp(-x)); }

long double exact_softplus(long double x) {
  return (x > 0 ? x : 0) + std::log1p(std::exp(x < 0 ? x : -x));
}

// |y - exact| in units of exact's last place as a float32; infinities are right or wrong.
double ulps(float y, long double exact) {
  if (std::isnan(y)) return kInfinity;
  const long double largest = std::numeric_limits<float>::max();
  if (std::fabs(exact) > largest || std::isinf(y)) {
    // Where the exact result is within a rounding of the largest number, both are right.
    const bool near_limit = std::fabs(std::fabs(exact) / largest - 1) < 3e-7L;
    const bool same_sign = (y > 0) == (exact > 0);
    return same_sign && (near_limit || (std::isinf(y) && std::fabs(exact) > largest)) ? 0
                                                                                     : kInfinity;
  }
  int power = exact == 0 ? -126 : std::ilogb(exact);
  if (power < -126) power = -126;
  return static_cast<double>(std::fabs(std::ldexp(y - exact, 23 - power)));
}

std::vector<float> arguments() {
  std::vector<float> x;
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 4099)
    x.push_back(float_of(static_cast<std::uint32_t>(bits)));
  // Densely around where something happens.
  for (const float center : {0.0f, 0.34657359f, 1.0f, 16.6f, 80.0f, 87.33655f, 88.02969f, 88.72284f,
                             89.0f, 92.0f, 103.27893f, 103.97208f, 108.0f, 110.0f, 120.0f, 126.0f,
                             127.0f, 128.0f, 150.0f, 1e-38f, 1.1754944e-38f, 1e-45f, 3.4028235e38f})
    for (const float sign : {1.0f, -1.0f}) {
      float up = sign * center, down = up;
      for (int i = 0; i < 300; ++i) {
        x.push_back(up);
        x.push_back(down);
        up = std::nextafter(up, 200.0f);
        down = std::nextafter(down, -200.0f);
      }
    }
  for (int i = -120 * 512; i <= 120 * 512; ++i) x.push_back(static_cast<float>(i) / 512.0f);
  const float inf = std::numeric_limits<float>::infinity();
  for (const float special : {0.0f, -0.0f, inf, -inf}) x.push_back(special);
  for (const std::uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xffffffffu, 0x7fffffffu})
    x.push_back(float_of(nan));
  return x;
}

void check_function(const char* name, void (*apply)(const float*, float*, std::int64_t),
                    long double (*exact)(long double), double limit, bool may_flush = false) {
  const std::vector<float> x = arguments();
  std::vector<float> y(x.size());
  apply(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
  double worst = 0;
  float worst_at = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (std::isnan(x[i])) {
      CHECK(std::isnan(y[i]), "%s(%08x) = %g", name, bits_of(x[i]), y[i]);
    } else if (x[i] == -std::numeric_limits<float>::infinity()) {
      CHECK(y[i] == 0, "%s(-inf) = %g", name, y[i]);
    } else if (may_flush && y[i] == 0) {
      CHECK(exact(x[i]) < 0x1p-126L, "%s(%.9g) = 0", name, x[i]);
    } else {
      const double error = ulps(y[i], exact(x[i]));
      CHECK(error <= limit, "%s(%.9g) = %.9g, exact %.9Lg: %g ulp", name, x[i], y[i], exact(x[i]),
            error);
      if (error > worst) worst = error, worst_at = x[i];
    }
  }
  std::printf("%s: %zu arguments, at most %.3f ulp, at %.9g\n", name, x.size(), worst, worst_at);
  // Each length of the rest behind whole vectors gives what the whole array gave.
  for (std::int64_t count = 0; count < 40; ++count) {
    std::vector<float> part(41, -7.0f);
    apply(x.data() + 500000, part.data(), count);
    CHECK(std::memcmp(part.data(), y.data() + 500000, count * 4) == 0,
          "%s of %lld numbers", name, static_cast<long long>(count));
    CHECK(part[count] == -7.0f, "%s wrote behind the end", name);
  }
}

// Converts the numbers together and one by one: vectors, and what is left behind them.
void check_conversion(const char* what, const Memory& from, std::int64_t count, DType type) {
  Memory x = from, together(type, count), alone(type, count);
  kernels().convert(x.data(), x.type(), together.data(), type, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = [i](Memory& m) {
      return static_cast<char*>(m.data()) + i * size_of(m.type());
    };
    kernels().convert(at(x), x.type(), at(alone), type, 1);
  }
  const Format format = format_of(type);
  for (std::int64_t i = 0; i < count; ++i)
    for (const Memory* y : {&together, &alone}) {
      const double value = x.get(i);
      const bool right = std::isnan(value) ? std::isnan(y->get(i))
                                           : y->bits(i) == format.nearest(value);
      CHECK(right, "%s, %s: %08x gave %08x, not %08x", what, y == &alone ? "alone" : "together",
            x.bits(i), y->bits(i), format.nearest(value));
    }
}

void check_conversions() {
  for (const DType type : {DType::bf16, DType::f16}) {
    const char* const name = type == DType::bf16 ? "bf16" : "f16";
    const Format format = format_of(type);
    Memory halves(type, 65536);
    for (std::uint32_t i = 0; i < 65536; ++i) halves.set_bits(i, i);
    check_conversion((std::string(name) + " to f32").c_str(), halves, 65536, DType::f32);

    // Each finite half, the middle between it and its neighbour, and the floats beside that.
    std::vector<float> x;
    for (std::uint32_t i = 0; i < format.infinity(); ++i)
      for (const double sign : {1.0, -1.0}) {
        const double here = format.value(i);
        const double there = i + 1 == format.infinity() ? 2 * here - format.value(i - 1)
                                                        : format.value(i + 1);
        const float middle = static_cast<float>(sign * (here + (there - here) / 2));
        x.push_back(static_cast<float>(sign * here));
        x.push_back(middle);
        x.push_back(std::nextafter(middle, static_cast<float>(sign * here)));
        x.push_back(std::nextafter(middle, static_cast<float>(sign * kInfinity)));
      }
    for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 65521)
      x.push_back(float_of(static_cast<std::uint32_t>(bits)));
    for (const std::uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0x7fffffffu,
                                     0xffffffffu, 0x7f7fffffu, 0x00000001u, 0x80000000u})
      x.push_back(float_of(bits));
    const auto count = static_cast<std::int64_t>(x.size());
    Memory floats(DType::f32, count);
    std::memcpy(floats.data(), x.data(), x.size() * 4);
    check_conversion((std::string("f32 to ") + name).c_str(), floats, count, type);
  }
}

}  // namespace

int main() {
  check_function("exp", kernels().apply_exp, exact_exp, 1.25);
  check_function("exp2", kernels().apply_exp2, exact_exp2, 1.25, true);
  check_function("silu", kernels().apply_silu, exact_silu, 2.25);
  check_function("softplus", kernels().apply_softplus, exact_softplus, 2);
  check_conversions();
  return finish("simd");
}
