// What the inner loops of several CPU kernels share: the compiler's vector types and an exponential that vectorises.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_level.h"

namespace ltkernels::isa {

template <class W, int Bytes>
struct VectorOf;
template <int Bytes>
struct VectorOf<float, Bytes> {
  typedef float type __attribute__((vector_size(Bytes), aligned(4), may_alias));
};
template <int Bytes>
struct VectorOf<double, Bytes> {
  typedef double type __attribute__((vector_size(Bytes), aligned(8), may_alias));
};

LT_INLINE float bits_to_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

LT_INLINE int32_t float_to_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// e^x for x <= 0 to 2 ulp, 0 below the normal range. Without branches: loops over it are vectorised.
LT_INLINE float exp_negative(float x) {
  const float clamped = x > -88.0f ? x : -88.0f;
  const float whole = (clamped * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;  // rounds to the nearest integer
  const float r = (clamped - whole * 0x1.62e4p-1f) - whole * 0x1.7f7d1cp-20f;
  float y = 1.0f / 720 + r * (1.0f / 5040);
  y = 1.0f / 120 + r * y;
  y = 1.0f / 24 + r * y;
  y = 1.0f / 6 + r * y;
  y = 0.5f + r * y;
  y = 1 + (r + r * r * y);
  const float scaled = y * bits_to_float((static_cast<int32_t>(whole) + 127) << 23);
  return x > -87.33f ? scaled : 0.0f;  // ln of the least normal float is -87.3366
}

LT_INLINE double exp_negative(double x) { return std::exp(x); }

}  // namespace ltkernels::isa
