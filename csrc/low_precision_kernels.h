// What is kept of a 16-bit parameter: the float32 value from it and what is kept beside it, and back.
// fused_l2/parameters/low_precision.py is the definition. Each formula stands here once, for a value at a time (F is
// float, I is uint32_t; branch-free, so that compilers make vectors of the loops in staged_kernels.h) and for the
// vectors of vectors_*.h (F32, I32). No include guard: compiled once per instruction set by foreach_capability.h.
#include "parallel.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// What vectors_*.h say of vectors, of single values. Not by std::min, whose references compilers make no vectors of
// here.
FUSED_L2_INLINE uint32_t lesser(uint32_t a, uint32_t b) { return int32_t(a) < int32_t(b) ? a : b; }
FUSED_L2_INLINE uint32_t greater(uint32_t a, uint32_t b) { return int32_t(a) > int32_t(b) ? a : b; }
FUSED_L2_INLINE float magnitude(float x) { return std::fabs(x); }
FUSED_L2_INLINE bool is_nan(float x) { return x != x; }
FUSED_L2_INLINE bool is_at_most(float a, float b) { return a <= b; }
FUSED_L2_INLINE bool is_equal(uint32_t a, uint32_t b) { return a == b; }
FUSED_L2_INLINE bool has_bits(uint32_t a, uint32_t bits) { return a & bits; }
FUSED_L2_INLINE uint32_t shifted_right_signed(uint32_t a, int bits) {
  return static_cast<uint32_t>(int32_t(a) >> bits);
}
// a * b + c, rounded once or twice, whichever is faster: only for an a * b that is exact, or too small to change c.
FUSED_L2_INLINE float sum_of_exact(float a, float b, float c) { return a * b + c; }
FUSED_L2_INLINE uint32_t select(bool where, uint32_t a, uint32_t b) { return where ? a : b; }
FUSED_L2_INLINE float select(bool where, float a, float b) { return where ? a : b; }
FUSED_L2_INLINE float maximum(float a, float b) { return a != a || a > b ? a : b; }
template <class P> FUSED_L2_INLINE uint32_t rounded(float x, P p) {
  narrow(x, p);
  return p.bits;
}
FUSED_L2_INLINE float everywhere(float, float x) { return x; }
template <class V> FUSED_L2_INLINE V everywhere(V, float x) { return V::broadcast(x); }

template <class I> FUSED_L2_INLINE I mix(I x) {  // Wellons 2018, "lowbias32"
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
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

template <class F, class I> FUSED_L2_INLINE I rounded_stochastically(F w, I random, BFloat16) {
  const I u = bits_of(w);
  return select(is_nan(w), u | 0x400000u, u + (random >> 16)) >> 16;
}
FUSED_L2_INLINE uint32_t rounded_stochastically(float w, uint32_t random, Float16) {
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
  return sign | rounded;
}

// |w| = |p| * 2^16 + remainder * 2^(16 - bits), magnitudes as integers; p is rounded to nearest, ties away from zero.
// With 8 bits |w| is rounded to 24 first, at random to a neighbour.
template <class I> struct Halves {
  I number, remainder;  // the lower 16 bits of both, or 8 of the latter
};
template <class I> FUSED_L2_INLINE I magnitude_of(I u) {
  return lesser(u & 0x7fffffffu, 0x7fc00000u);  // of arithmetic a NaN is quiet; of this one there is no remainder
}
template <class F> FUSED_L2_INLINE auto split(F w) {
  const auto u = bits_of(w), all = magnitude_of(u);
  return Halves<decltype(bits_of(w))>{((all + 0x8000u) | (u & 0x80000000u)) >> 16, all};
}
template <class F, class I> FUSED_L2_INLINE Halves<I> split(F w, I, int16_t) { return split(w); }
template <class F, class I> FUSED_L2_INLINE Halves<I> split(F w, I random, int8_t) {
  const I u = bits_of(w), most = (magnitude_of(u) + (random & 255u)) >> 8;
  return {(u >> 16 & 0x8000u) | (most + 0x80u) >> 8, most};
}
template <class I> FUSED_L2_INLINE auto join(I number, I remainder) {
  const I u = number << 16, magnitude = u & 0x7fffffffu;
  // The sum is below 2^31. NaN stays NaN.
  const I sum = greater(magnitude + remainder, 0u), most = greater(magnitude, 0x7f800000u);
  return float_of(lesser(sum, most) | (u & 0x80000000u));
}

// A compensation counts up to half a unit in the last place.
template <class F> FUSED_L2_INLINE F half_unit(F p, BFloat16) {
  return maximum(magnitude(p) * everywhere(p, 0x1p-8f), everywhere(p, 0x1p-134f));
}
template <class F> FUSED_L2_INLINE F half_unit(F p, Float16) {
  return maximum(magnitude(p) * everywhere(p, 0x1p-11f), everywhere(p, 0x1p-25f));
}
template <class F, class P> FUSED_L2_INLINE F compensated(F own, F c, P type) {
  return select(is_at_most(magnitude(c), half_unit(own, type)), own + c, own);
}
template <class F> FUSED_L2_INLINE F left_out(F w, F stored) {
  const F left = w - stored;
  return select(is_at_most(magnitude(left), everywhere(w, 3.4028234663852886e38f)), left, everywhere(w, 0));
}

// A master counts where the parameter is what it is rounded to.
template <class F, class I, class P> FUSED_L2_INLINE F master_or_own(F master, F own, I number, P type) {
  return select(is_equal(rounded(master, type), number), master, own);
}

// The float32 value of a parameter, from it and its remainder, master or compensation.
FUSED_L2_INLINE float kept_value(BFloat16 p, int16_t remainder) {
  return join(static_cast<uint32_t>(p.bits), static_cast<uint32_t>(int32_t{remainder}));
}
FUSED_L2_INLINE float kept_value(BFloat16 p, int8_t remainder) {
  return join(static_cast<uint32_t>(p.bits), static_cast<uint32_t>(remainder * 256));
}
template <class P> FUSED_L2_INLINE float kept_value(P p, float master) {
  return master_or_own(master, widen(p), static_cast<uint32_t>(p.bits), p);
}
template <class P> FUSED_L2_INLINE float kept_value(P p, Compensation c) {
  return compensated(widen(p), widen(BFloat16{c.bits}), p);
}

// The same for the vectors of a kernel that is not staged, and back.
template <class V> FUSED_L2_INLINE void join_kept(const BFloat16* p, const int16_t* remainder, V& w) {
  using I = typename V::Integers;
  w = join(I::from(&p->bits), I::from(remainder));
}
template <class V> FUSED_L2_INLINE void join_kept(const BFloat16* p, const int8_t* remainder, V& w) {
  using I = typename V::Integers;
  w = join(I::from(&p->bits), I::from(remainder) << 8);
}
template <class V, class P> FUSED_L2_INLINE void join_kept(const P* p, const float* master, V& w) {
  w = master_or_own(load<V>(master), load<V>(p), V::Integers::from(&p->bits), P{});
}
template <class V> FUSED_L2_INLINE void join_kept(const BFloat16* p, const Compensation* kept, V& w) {
  w = compensated(load<V>(p), float_of(V::Integers::from(&kept->bits) << 16), BFloat16{});
}
template <class V> FUSED_L2_INLINE void split_kept(V w, BFloat16* p, int16_t* remainder, uint32_t) {
  const auto halves = split(w);
  halves.number.store_lower_halves(p);
  halves.remainder.store_lower_halves(remainder);
}
template <class V, class P> FUSED_L2_INLINE void split_kept(V w, P* p, float* master, uint32_t) {
  store(p, w);
  store(master, w);
}
// The random bits of the elements of a vector.
template <class I> FUSED_L2_INLINE I random_lanes(uint32_t start) {
  return mix(I::numbered() * RandomBits::kStride + start);
}
template <class V> FUSED_L2_INLINE void split_kept(V w, BFloat16* p, int8_t* remainder, uint32_t random) {
  const auto halves = split(w, random_lanes<typename V::Integers>(random), int8_t{});
  halves.number.store_lower_halves(p);
  halves.remainder.store_lowest_bytes(remainder);
}
template <class V> FUSED_L2_INLINE void store_stochastically(V w, void* to, uint32_t random) {
  rounded_stochastically(w, random_lanes<typename V::Integers>(random), BFloat16{}).store_lower_halves(to);
}
template <class V> FUSED_L2_INLINE void split_kept(V w, BFloat16* p, Stochastic*, uint32_t random) {
  store_stochastically(w, p, random);
}
template <class V> FUSED_L2_INLINE void split_kept(V w, BFloat16* p, Compensation* kept, uint32_t random) {
  const auto number = rounded(w, BFloat16{});
  number.store_lower_halves(p);
  store_stochastically(left_out(w, float_of(number << 16)), kept, random);
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
