// AVX2 + FMA + F16C: eight floats or four doubles.
// No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

using fused_l2::bits_of;  // of single values, beside those of vectors
using fused_l2::float_of;

// Eight integers: the bits of floats, or what is made of them.
struct I32 {
  __m256i v;
  FUSED_L2_INLINE I32(__m256i x) : v(x) {}
  FUSED_L2_INLINE I32(uint32_t x) : v(_mm256_set1_epi32(int(x))) {}
  static FUSED_L2_INLINE I32 numbered() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static FUSED_L2_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static FUSED_L2_INLINE I32 from(const uint16_t* p) { return _mm256_cvtepu16_epi32(load16(p)); }
  static FUSED_L2_INLINE I32 from(const int16_t* p) { return _mm256_cvtepi16_epi32(load16(p)); }
  static FUSED_L2_INLINE __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
  static FUSED_L2_INLINE I32 from(const uint8_t* p) { return _mm256_cvtepu8_epi32(load8(p)); }
  static FUSED_L2_INLINE I32 from(const int8_t* p) { return _mm256_cvtepi8_epi32(load8(p)); }
  FUSED_L2_INLINE void store_lowest_bytes(void* p) const {
    const __m256i lowest = _mm256_and_si256(v, _mm256_set1_epi32(0xff));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1));
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
  }
  FUSED_L2_INLINE void store_lower_halves(void* p) const {
    const __m256i lower = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(lower), _mm256_extracti128_si256(lower, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), packed);
  }
};
struct F32 {
  using T = float;
  using Integers = I32;
  static constexpr int width = 8;
  __m256 v;
  static FUSED_L2_INLINE F32 broadcast(float x) { return {_mm256_set1_ps(x)}; }
};
struct F64 {
  using T = double;
  static constexpr int width = 4;
  __m256d v;
  static FUSED_L2_INLINE F64 broadcast(double x) { return {_mm256_set1_pd(x)}; }
};
constexpr bool kLoads16Bit = true;  // in the load of a vector, and in its store
constexpr bool kGroupIsTwoVectors = 2 * F32::width == kGroup;

FUSED_L2_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// c - a * b
FUSED_L2_INLINE F32 negated_fma(F32 a, F32 b, F32 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
FUSED_L2_INLINE F32 negate(F32 a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
// torch.maximum: a NaN on either side wins. max_ps returns its second operand when either is NaN.
FUSED_L2_INLINE F32 maximum(F32 a, F32 b) {
  return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q))};
}
// a where u and p have the same sign (a zero has both), else b. Their product could underflow; NaN agrees with nothing.
FUSED_L2_INLINE F32 where_agree(F32 u, F32 p, F32 a, F32 b) {
  const auto zero = _mm256_setzero_ps();
  const auto up = _mm256_and_ps(_mm256_cmp_ps(u.v, zero, _CMP_GE_OQ), _mm256_cmp_ps(p.v, zero, _CMP_GE_OQ));
  const auto down = _mm256_and_ps(_mm256_cmp_ps(u.v, zero, _CMP_LE_OQ), _mm256_cmp_ps(p.v, zero, _CMP_LE_OQ));
  return {_mm256_blendv_ps(b.v, a.v, _mm256_or_ps(up, down))};
}
FUSED_L2_INLINE bool all_finite(F32 a) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v);
  return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(3.402823466e38f), _CMP_LE_OQ)) == 0xff;
}

FUSED_L2_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator/(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F64 negated_fma(F64 a, F64 b, F64 c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F64 sqrt(F64 a) { return {_mm256_sqrt_pd(a.v)}; }
FUSED_L2_INLINE F64 negate(F64 a) { return {_mm256_xor_pd(a.v, _mm256_set1_pd(-0.0))}; }
FUSED_L2_INLINE F64 maximum(F64 a, F64 b) {
  return {_mm256_blendv_pd(_mm256_max_pd(a.v, b.v), a.v, _mm256_cmp_pd(a.v, a.v, _CMP_UNORD_Q))};
}
FUSED_L2_INLINE F64 where_agree(F64 u, F64 p, F64 a, F64 b) {
  const auto zero = _mm256_setzero_pd();
  const auto up = _mm256_and_pd(_mm256_cmp_pd(u.v, zero, _CMP_GE_OQ), _mm256_cmp_pd(p.v, zero, _CMP_GE_OQ));
  const auto down = _mm256_and_pd(_mm256_cmp_pd(u.v, zero, _CMP_LE_OQ), _mm256_cmp_pd(p.v, zero, _CMP_LE_OQ));
  return {_mm256_blendv_pd(b.v, a.v, _mm256_or_pd(up, down))};
}
FUSED_L2_INLINE bool all_finite(F64) { return false; }

// Sums of products in float64, of the lanes of vectors.
struct ProductsF64 {
  __m256d sums;
  FUSED_L2_INLINE ProductsF64() : sums(_mm256_setzero_pd()) {}
  FUSED_L2_INLINE void add(F64 a, F64 b) { sums = _mm256_fmadd_pd(a.v, b.v, sums); }
  double total() const {
    alignas(32) double lane[4];
    _mm256_store_pd(lane, sums);
    return (lane[0] + lane[1]) + (lane[2] + lane[3]);
  }
};
struct ProductsF32 {
  ProductsF64 low, high;
  FUSED_L2_INLINE ProductsF32() {}
  FUSED_L2_INLINE void add(F32 a, F32 b) {
    low.add(lower(a), lower(b));
    high.add(upper(a), upper(b));
  }
  double total() const { return low.total() + high.total(); }
  static FUSED_L2_INLINE F64 lower(F32 a) { return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.v))}; }
  static FUSED_L2_INLINE F64 upper(F32 a) { return {_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))}; }
};

// bfloat16: the upper half of a float. Round to nearest even in integers; a NaN keeps its upper bits and is made quiet.
FUSED_L2_INLINE __m256i rounded_bf16(__m256 x) {  // the result stands in the upper halves
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

template <class V> FUSED_L2_INLINE V load(const float* p) { return {_mm256_loadu_ps(p)}; }
template <class V> FUSED_L2_INLINE V load(const double* p) { return {_mm256_loadu_pd(p)}; }
template <class V> FUSED_L2_INLINE V load(const BFloat16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
}
template <class V> FUSED_L2_INLINE V load(const Float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FUSED_L2_INLINE void store(float* p, F32 x) { _mm256_storeu_ps(p, x.v); }
FUSED_L2_INLINE void store(double* p, F64 x) { _mm256_storeu_pd(p, x.v); }
FUSED_L2_INLINE void store(BFloat16* p, F32 x) {
  const __m256i r = _mm256_srli_epi32(rounded_bf16(x.v), 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
FUSED_L2_INLINE void store(Float16* p, F32 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Two vectors at a time. `interleaved` allows any fixed order of the lanes, the same for load and store:
// bfloat16 then splits into even and odd elements by a shift and a mask, without crossing lanes.
template <class V, bool interleaved, class S> FUSED_L2_INLINE void load2(const S* p, V& a, V& b) {
  if constexpr (interleaved && std::is_same_v<S, BFloat16>) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))));
  } else {
    a = load<V>(p);
    b = load<V>(p + V::width);
  }
}
template <bool interleaved, class V, class S> FUSED_L2_INLINE void store2(S* p, V a, V b) {
  if constexpr (interleaved && std::is_same_v<S, BFloat16>) {
    const __m256i even = _mm256_srli_epi32(rounded_bf16(a.v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(even, rounded_bf16(b.v), 0xaa));
  } else {
    store(p, a);
    store(p + V::width, b);
  }
}

// A group of 8-bit codes as integers of a register's lanes, and back.
template <class Code> FUSED_L2_INLINE void widen_codes(const Code* from, uint32_t* to) {
  for (int i = 0; i < kGroup; i += 8) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), I32::from(from + i).v);
}
FUSED_L2_INLINE void narrow_codes(const uint32_t* from, uint8_t* to) {
  static_assert(kGroup == 32, "");
  __m256i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 8 * i));
  // Both pack the halves of a register by themselves: four codes of x[0], of x[1], ... lie in the order 0 1 2 3 0 1
  // 2 3.
  const __m256i mixed = _mm256_packus_epi16(_mm256_packus_epi32(x[0], x[1]), _mm256_packus_epi32(x[2], x[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(mixed, order));
}

FUSED_L2_INLINE I32 operator+(I32 a, I32 b) { return _mm256_add_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 operator*(I32 a, I32 b) { return _mm256_mullo_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 operator&(I32 a, I32 b) { return _mm256_and_si256(a.v, b.v); }
FUSED_L2_INLINE I32 operator|(I32 a, I32 b) { return _mm256_or_si256(a.v, b.v); }
FUSED_L2_INLINE I32 operator^(I32 a, I32 b) { return _mm256_xor_si256(a.v, b.v); }
FUSED_L2_INLINE I32 operator<<(I32 a, int bits) { return _mm256_slli_epi32(a.v, bits); }
FUSED_L2_INLINE I32 operator>>(I32 a, int bits) { return _mm256_srli_epi32(a.v, bits); }
FUSED_L2_INLINE I32 lesser(I32 a, I32 b) { return _mm256_min_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 greater(I32 a, I32 b) { return _mm256_max_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 bits_of(F32 x) { return _mm256_castps_si256(x.v); }
FUSED_L2_INLINE F32 float_of(I32 x) { return {_mm256_castsi256_ps(x.v)}; }
FUSED_L2_INLINE F32 magnitude(F32 x) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v)}; }
FUSED_L2_INLINE I32 is_nan(F32 x) { return _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q)); }
FUSED_L2_INLINE I32 is_at_most(F32 a, F32 b) { return _mm256_castps_si256(_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)); }
FUSED_L2_INLINE I32 is_equal(I32 a, I32 b) { return _mm256_cmpeq_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 select(I32 where, I32 a, I32 b) { return _mm256_blendv_epi8(b.v, a.v, where.v); }
FUSED_L2_INLINE F32 select(I32 where, F32 a, F32 b) {
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(where.v))};
}
FUSED_L2_INLINE I32 rounded(F32 x, BFloat16) { return _mm256_srli_epi32(rounded_bf16(x.v), 16); }
FUSED_L2_INLINE I32 rounded(F32 x, Float16) {
  return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
