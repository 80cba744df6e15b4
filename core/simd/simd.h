// Vectors of float for one instruction set, and numbers of any storage type as floats.
//
// Kernels are compiled once for each instruction set, ANYMAMBA_ISA, in a namespace of its name, so
// that no inline function built for one is ever linked into another. They must not use templates of
// the standard library for that reason. All facts of an instruction set are in one header.
#pragma once

#ifndef ANYMAMBA_ISA
#error "compile with -DANYMAMBA_ISA=NAME, one of CMakeLists.txt's ALL_ISAS"
#endif

#if defined(__AVX512F__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#elif defined(__aarch64__)
#include "simd/neon.h"
#else
#include "simd/portable.h"
#endif

namespace anymamba::ANYMAMBA_ISA {

// a b + c as for a vector.
ANYMAMBA_INLINE float fma(float a, float b, float c) {
  return kFusedMultiplyAdd ? __builtin_fmaf(a, b, c) : a * b + c;
}

// One number of a tensor, as float.
ANYMAMBA_INLINE float read(const void* p, DType type, std::int64_t index) {
  switch (type) {
    case DType::f32: return static_cast<const float*>(p)[index];
    case DType::bf16: return from_bf16(static_cast<const std::uint16_t*>(p)[index]);
    case DType::f16: break;
  }
  return from_f16(static_cast<const std::uint16_t*>(p)[index]);
}

ANYMAMBA_INLINE void write(void* p, DType type, std::int64_t index, float x) {
  switch (type) {
    case DType::f32: static_cast<float*>(p)[index] = x; return;
    case DType::bf16: static_cast<std::uint16_t*>(p)[index] = to_bf16(x); return;
    case DType::f16: break;
  }
  static_cast<std::uint16_t*>(p)[index] = to_f16(x);
}

// kLanes neighbouring numbers as floats.
ANYMAMBA_INLINE FloatVec read_vector(const void* p, DType type, std::int64_t index) {
  switch (type) {
    case DType::f32: return load(static_cast<const float*>(p) + index);
    case DType::bf16: return load_bf16(static_cast<const std::uint16_t*>(p) + index);
    case DType::f16: break;
  }
  return load_f16(static_cast<const std::uint16_t*>(p) + index);
}

ANYMAMBA_INLINE void write_vector(void* p, DType type, std::int64_t index, FloatVec v) {
  switch (type) {
    case DType::f32: store(static_cast<float*>(p) + index, v); return;
    case DType::bf16: store_bf16(static_cast<std::uint16_t*>(p) + index, v); return;
    case DType::f16: break;
  }
  store_f16(static_cast<std::uint16_t*>(p) + index, v);
}

// Calls f with the type as a constant, f(Constant<DType, type>{}), so that loops inside f know it.
template <class T, T V>
struct Constant {
  static constexpr T value = V;
};

template <class Function>
ANYMAMBA_INLINE void with_type(DType type, const Function& f) {
  switch (type) {
    case DType::f32: f(Constant<DType, DType::f32>{}); return;
    case DType::bf16: f(Constant<DType, DType::bf16>{}); return;
    case DType::f16: f(Constant<DType, DType::f16>{}); return;
  }
}

}  // namespace anymamba::ANYMAMBA_ISA
