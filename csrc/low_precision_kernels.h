// What is kept of a 16-bit parameter, one value at a time: the float32 value from it and what is kept beside it, and
// back. fused_l2/parameters/low_precision.py is the definition. Branch-free, so that compilers make vectors of the
// loops in staged_kernels.h. No include guard: compiled once per instruction set by foreach_capability.h.
#include "parallel.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

FUSED_L2_INLINE uint32_t mix(uint32_t x) {  // Wellons 2018, "lowbias32"
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The random bits of one tensor at one step: a hash of where they are used.
struct RandomBits {
  static constexpr uint32_t kStride = 0x9e3779b9u;  // of a Weyl sequence
  uint32_t start;

  RandomBits(const Piece& piece, double step) {
    const auto column = static_cast<uint64_t>(piece.row[column::key]);
    const uint32_t key = mix(static_cast<uint32_t>(column) ^ mix(static_cast<uint32_t>(step)));
    start = key + kStride * (static_cast<uint32_t>(column >> 32) + static_cast<uint32_t>(piece.begin));
  }
  FUSED_L2_INLINE uint32_t operator()(uint32_t element) const { return mix(start + kStride * element); }
};

FUSED_L2_INLINE BFloat16 rounded_stochastically(float w, uint32_t random, BFloat16) {
  const uint32_t u = bits_of(w);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u + (random >> 16)) >> 16)};
}
FUSED_L2_INLINE Float16 rounded_stochastically(float w, uint32_t random, Float16) {
  const uint32_t u = bits_of(w), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 19)) >> 13;
  const bool small = magnitude < 0x38800000;  // below 2^-14 the last place is 2^-24 throughout
  const float units = float_of(small ? magnitude : 0) * 0x1p24f;
  const auto whole = static_cast<int32_t>(units);
  const bool upwards =
      static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f < units - static_cast<float>(whole);
  uint32_t rounded = small ? static_cast<uint32_t>(whole) + upwards : normal;
  rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded;
  rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
  return {static_cast<uint16_t>(sign | rounded)};
}

// |w| = |p| * 2^16 + remainder * 2^(16 - bits), magnitudes as integers; p is rounded to nearest, ties away from zero.
// With 8 bits |w| is rounded to 24 first, at random to a neighbour.
FUSED_L2_INLINE uint32_t magnitude_of(uint32_t u) {
  const uint32_t magnitude = u & 0x7fffffff;
  return magnitude > 0x7fc00000 ? 0x7fc00000
                                : magnitude;  // of arithmetic a NaN is quiet; of this one there is no remainder
}
FUSED_L2_INLINE void split(float w, uint32_t, BFloat16& p, int16_t& remainder) {
  const uint32_t u = bits_of(w), magnitude = magnitude_of(u), upper = (magnitude + 0x8000) >> 16;
  p.bits = static_cast<uint16_t>((u >> 16 & 0x8000) | upper);
  remainder = static_cast<int16_t>(magnitude - (upper << 16));
}
FUSED_L2_INLINE void split(float w, uint32_t random, BFloat16& p, int8_t& remainder) {
  const uint32_t u = bits_of(w), rounded = (magnitude_of(u) + (random & 255)) >> 8, upper = (rounded + 0x80) >> 8;
  p.bits = static_cast<uint16_t>((u >> 16 & 0x8000) | upper);
  remainder = static_cast<int8_t>(rounded - (upper << 8));
}
template <class Remainder> FUSED_L2_INLINE float join(BFloat16 p, Remainder remainder) {
  constexpr int32_t unit = sizeof(Remainder) == 1 ? 256 : 1;
  const uint32_t u = p.bits;
  const auto magnitude = static_cast<int32_t>((u & 0x7fff) << 16);
  // The sum is below 2^31. NaN stays NaN. Not by std::min, whose references compilers make no vectors of here.
  const int32_t sum = magnitude + remainder * unit, most = magnitude > 0x7f800000 ? magnitude : 0x7f800000;
  const int32_t joined = sum < 0 ? 0 : sum > most ? most : sum;
  return float_of((u & 0x8000) << 16 | static_cast<uint32_t>(joined));
}

FUSED_L2_INLINE float half_unit(float p, BFloat16) { return std::max(std::fabs(p) * 0x1p-8f, 0x1p-134f); }
FUSED_L2_INLINE float half_unit(float p, Float16) { return std::max(std::fabs(p) * 0x1p-11f, 0x1p-25f); }

template <class P> FUSED_L2_INLINE P narrowed(float w) {
  P p;
  narrow(w, p);
  return p;
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
