// 8-bit states: codes and a scale for each group of kGroup elements, and the float32 values that a step works on.
// fused_l2/reference.py is the definition. Loops over one group, branch-free, which compilers make vectors of.
// No include guard: compiled once per instruction set by foreach_capability.h.

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// Values with a sign: momentum and first moments. Code 127 is 1.75 * 2^(scale - 127), code 1 a power of two.
struct SignedCodes {
  static FUSED_L2_INLINE uint32_t base(uint32_t scale) { return 8 * scale - 121; }

  static FUSED_L2_INLINE float decoded(uint32_t code, uint32_t base) {
    const uint32_t c = code & 127u, u = (c + base) << 20;
    return float_of((c == 0 ? 0 : u) | (code & 128) << 24);
  }
  static FUSED_L2_INLINE uint32_t encoded(float x, uint32_t random, uint32_t base, float inverse) {
    const uint32_t u = bits_of(x), magnitude = u & 0x7fffffff, r = (random & 0xff00) << 4 | 0x800;
    const auto rounded = static_cast<int32_t>(((magnitude + r) >> 20) - base);
    // Below code 1: that or 0. The product is a power of two times a number, so the sum is rounded once.
    const float shifted = float_of(magnitude) * inverse + 1.0f;
    const auto least = static_cast<int32_t>((bits_of(shifted) - 0x3f800000 + (r << 3)) >> 23);
    return static_cast<uint32_t>(std::min(std::max(rounded, least), 127)) | (u >> 24 & 128);
  }
};

// Second moments. Below code 1 only 0 is 0: a moment that vanished beside one that did not would make huge updates.
struct PositiveCodes {
  static FUSED_L2_INLINE uint32_t base(uint32_t scale) { return 8 * scale - 248; }

  static FUSED_L2_INLINE float decoded(uint32_t code, uint32_t base) {
    return float_of(code == 0 ? 0 : (code + base) << 20);
  }
  static FUSED_L2_INLINE uint32_t encoded(float x, uint32_t random, uint32_t base, float) {
    const uint32_t u = bits_of(x) & 0x7fffffff, r = random >> 16 << 4 | 8;
    const auto rounded = static_cast<int32_t>(((u + r) >> 20) - base);
    const auto least = static_cast<int32_t>(u != 0);
    return static_cast<uint32_t>(std::min(std::max(rounded, least), 255));
  }
};

template <class Codes> FUSED_L2_INLINE void decode_group(const uint8_t* codes, uint8_t scale, float* x) {
  const uint32_t base = Codes::base(scale);
  alignas(64) uint32_t wide[kGroup];
  widen_codes(codes, wide);
  for (int i = 0; i < kGroup; ++i) x[i] = Codes::decoded(wide[i], base);
}

// The scale: the exponent of the largest magnitude, one more where its mantissa is above 1.75.
FUSED_L2_INLINE uint8_t scale_of(const float* x) {
  uint32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffff);
  return static_cast<uint8_t>(std::min(std::max((largest + 0x1fffff) >> 23, 32u), 255u));
}

template <class Codes> FUSED_L2_INLINE uint8_t encode_group(const float* x, const uint32_t* random, uint8_t* codes) {
  const uint8_t scale = scale_of(x);
  const uint32_t base = Codes::base(scale);
  const float inverse = float_of((269u - scale) << 23);
  alignas(64) uint32_t wide[kGroup];
  for (int i = 0; i < kGroup; ++i) wide[i] = Codes::encoded(x[i], random[i], base, inverse);
  narrow_codes(wide, codes);
  return scale;
}

// f with the codes of a rule's k-th state.
template <class F> FUSED_L2_INLINE void with_codes(int64_t rule, int k, F&& f) {
  if (rule == rule::adam && k == 1) return f(PositiveCodes{});
  f(SignedCodes{});
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
