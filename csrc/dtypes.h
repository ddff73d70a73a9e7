// The 16-bit storage types and their conversion to and from float, one value at a time.
// Rounding is to nearest, ties to even; denormals are kept; a NaN stays a NaN.
#pragma once
#include <cstdint>
#include <cstring>

namespace fused_l2 {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What is beside a 16-bit parameter: nothing; nothing, and it is rounded at random; or what rounding left out, a
// bfloat16.
struct Nothing {};
struct Stochastic {};
struct Compensation {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x0400) {  // zero and denormals: an exact multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude << 13) + (uint32_t(127 - 15) << 23)));
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, BFloat16& out) {
  const uint32_t u = bits_of(x), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  out.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? u >> 16 | 0x40 : rounded);  // a NaN is made quiet
}
inline void narrow(float x, Float16& out) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    out.bits = uint16_t(sign | 0x7e00);
  } else if (magnitude >= 0x47800000) {  // 2^16 and more, inf
    out.bits = uint16_t(sign | 0x7c00);
  } else if (magnitude < 0x38800000) {  // below 2^-14: let a float addition round to a multiple of 2^-24
    const float shifted = float_of(magnitude) + 0.5f;
    out.bits = uint16_t(sign | (bits_of(shifted) - bits_of(0.5f)));
  } else {
    const uint32_t rebased = magnitude - (uint32_t(127 - 15) << 23);
    out.bits = uint16_t(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
  }
}

}  // namespace fused_l2
