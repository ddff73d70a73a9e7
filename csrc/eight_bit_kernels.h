// 8-bit states: codes and a scale for each group of kGroup elements, and the float32 values that a step works on.
// fused_l2/reference.py is the definition. Each formula stands here once, for a value at a time (F is float, I is
// uint32_t) and for vectors. No include guard: compiled once per instruction set by foreach_capability.h.

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// Encoding: one addition brings the random bits, half a unit of the lowest of them, and minus the base. No two share a
// bit, so they are joined by |. A scale is 32 at least.

// Values with a sign: momentum and first moments. Code 127 is 1.75 * 2^(scale - 127), code 1 a power of two.
struct SignedCodes {
  using Code = int8_t;  // signed, so that widening copies the sign to every upper bit, and << 20 leaves it in bit 31
  static FUSED_L2_INLINE uint32_t base(uint32_t scale) { return (8 * scale - 121) << 20; }

  template <class I> static FUSED_L2_INLINE auto decoded(I code, I base) {
    const I bits = code << 20 & 0x87f00000u;
    return float_of(select(has_bits(code, 127u), bits + base, bits));
  }
  template <class F, class I> static FUSED_L2_INLINE I encoded(F x, I random, uint32_t base, F inverse) {
    const I u = bits_of(x), all = u & 0x7fffffffu;
    const I rounded = shifted_right_signed(all + ((random << 4 & 0xff000u) | (0x800u - base)), 20);
    // Below code 1: that or 0. The product is a power of two times a number: exact, or too small to matter.
    const I shifted = bits_of(sum_of_exact(float_of(all), inverse, everywhere(x, 1)));
    const I code = greater(rounded, (shifted + ((random << 7 & 0x7f8000u) | (0x4000u - 0x3f800000u))) >> 23);
    return lesser(code, 127u) | (u >> 24 & 128u);
  }
};

// Second moments. Below code 1 only 0 is 0: a moment that vanished beside one that did not would make huge updates.
struct PositiveCodes {
  using Code = uint8_t;
  static FUSED_L2_INLINE uint32_t base(uint32_t scale) { return (8 * scale - 248) << 20; }

  template <class I> static FUSED_L2_INLINE auto decoded(I code, I base) {
    return float_of(select(has_bits(code, 255u), (code << 20) + base, I(0u)));
  }
  template <class F, class I> static FUSED_L2_INLINE I encoded(F x, I random, uint32_t base, F) {
    const I u = bits_of(x) & 0x7fffffffu;
    const I rounded = shifted_right_signed(u + ((random >> 12 & 0xffff0u) | (8u - base)), 20);
    const I code = select(has_bits(u, ~0u), greater(rounded, 1u), I(0u));
    return lesser(code, 255u);
  }
};

// The scale: the exponent of the largest magnitude, one more where its mantissa is above 1.75.
FUSED_L2_INLINE uint32_t scale_of(uint32_t largest) {
  return std::min(std::max((largest + 0x1fffff) >> 23, 32u), 255u);
}
FUSED_L2_INLINE float inverse_of(uint32_t scale) { return float_of((269u - scale) << 23); }

template <class Codes> FUSED_L2_INLINE void decode_group(const uint8_t* codes, uint8_t scale, float* x) {
  const uint32_t base = Codes::base(scale);
  alignas(64) uint32_t wide[kGroup];
  widen_codes(reinterpret_cast<const typename Codes::Code*>(codes), wide);
  for (int i = 0; i < kGroup; ++i) x[i] = Codes::decoded(wide[i], base);
}

template <class Codes> FUSED_L2_INLINE uint8_t encode_group(const float* x, const uint32_t* random, uint8_t* codes) {
  uint32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffff);
  const uint32_t scale = scale_of(largest), base = Codes::base(scale);
  const float inverse = inverse_of(scale);
  alignas(64) uint32_t wide[kGroup];
  for (int i = 0; i < kGroup; ++i) wide[i] = Codes::encoded(x[i], random[i], base, inverse);
  narrow_codes(wide, codes);
  return static_cast<uint8_t>(scale);
}

// The same of a group that is two vectors.
template <class Codes, class V> FUSED_L2_INLINE void decode_vectors(const uint8_t* codes, uint8_t scale, V& a, V& b) {
  using I = typename V::Integers;
  const I base = Codes::base(scale);
  const auto* from = reinterpret_cast<const typename Codes::Code*>(codes);
  a = Codes::decoded(I::from(from), base);
  b = Codes::decoded(I::from(from + V::width), base);
}
template <class Codes, class V>
FUSED_L2_INLINE uint8_t encode_vectors(V a, V b, uint32_t largest, uint32_t random, uint8_t* codes) {
  using I = typename V::Integers;
  const uint32_t scale = scale_of(largest), base = Codes::base(scale);
  const V inverse = V::broadcast(inverse_of(scale));
  Codes::encoded(a, random_lanes<I>(random), base, inverse).store_lowest_bytes(codes);
  Codes::encoded(b, random_lanes<I>(random + RandomBits::kStride * V::width), base, inverse)
      .store_lowest_bytes(codes + V::width);
  return static_cast<uint8_t>(scale);
}

// The codes of a rule's k-th state; f with them.
template <int64_t rule, int k>
using CodesOf = std::conditional_t<rule == rule::adam && k == 1, PositiveCodes, SignedCodes>;
template <class F> FUSED_L2_INLINE void with_codes(int64_t rule, int k, F&& f) {
  if (rule == rule::adam && k == 1) return f(CodesOf<rule::adam, 1>{});
  f(CodesOf<rule::sgd, 0>{});
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
