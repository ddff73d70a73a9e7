// AVX-512 (F, BW, DQ, VL): sixteen floats or eight doubles.
// No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

using fused_l2::bits_of;  // of single values, beside those of vectors
using fused_l2::float_of;

// Sixteen integers: the bits of floats, or what is made of them.
struct I32 {
  __m512i v;
  FUSED_L2_INLINE I32(__m512i x) : v(x) {}
  FUSED_L2_INLINE I32(uint32_t x) : v(_mm512_set1_epi32(int(x))) {}
  static FUSED_L2_INLINE I32 numbered() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static FUSED_L2_INLINE __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static FUSED_L2_INLINE I32 from(const uint16_t* p) { return _mm512_cvtepu16_epi32(load16(p)); }
  static FUSED_L2_INLINE I32 from(const int16_t* p) { return _mm512_cvtepi16_epi32(load16(p)); }
  static FUSED_L2_INLINE __m128i load8(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static FUSED_L2_INLINE I32 from(const uint8_t* p) { return _mm512_cvtepu8_epi32(load8(p)); }
  static FUSED_L2_INLINE I32 from(const int8_t* p) { return _mm512_cvtepi8_epi32(load8(p)); }
  // The largest lane of each, compared as signed numbers.
  static FUSED_L2_INLINE void largest(const I32 (&of)[1], uint32_t (&found)[1]) {
    found[0] = static_cast<uint32_t>(_mm512_reduce_max_epi32(of[0].v));
  }
  static FUSED_L2_INLINE void largest(const I32 (&of)[2], uint32_t (&found)[2]) {  // each in half of a register
    const __m512i lower = _mm512_inserti64x4(of[0].v, _mm512_castsi512_si256(of[1].v), 1);
    __m512i x = _mm512_max_epi32(lower, _mm512_shuffle_i64x2(of[0].v, of[1].v, 0xee));
    x = _mm512_max_epi32(x, _mm512_permutex_epi64(x, 0x4e));
    x = _mm512_max_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_BADC));
    x = _mm512_max_epi32(x, _mm512_shuffle_epi32(x, _MM_PERM_CDAB));
    found[0] = static_cast<uint32_t>(_mm512_cvtsi512_si32(x));
    found[1] = static_cast<uint32_t>(_mm_cvtsi128_si32(_mm512_extracti32x4_epi32(x, 2)));
  }
  FUSED_L2_INLINE void store_lowest_bytes(void* p) const {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  FUSED_L2_INLINE void store_lower_halves(void* p) const {
    _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(v));
  }
};
struct F32 {
  using T = float;
  using Integers = I32;
  static constexpr int width = 16;
  __m512 v;
  static FUSED_L2_INLINE F32 broadcast(float x) { return {_mm512_set1_ps(x)}; }
};
struct F64 {
  using T = double;
  static constexpr int width = 8;
  __m512d v;
  static FUSED_L2_INLINE F64 broadcast(double x) { return {_mm512_set1_pd(x)}; }
};
constexpr bool kLoads16Bit = true;  // in the load of a vector, and in its store
constexpr bool kGroupIsTwoVectors = 2 * F32::width == kGroup;

FUSED_L2_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
FUSED_L2_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// c - a * b
FUSED_L2_INLINE F32 negated_fma(F32 a, F32 b, F32 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
FUSED_L2_INLINE F32 negate(F32 a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
// torch.maximum: a NaN on either side wins. max_ps returns its second operand when either is NaN.
FUSED_L2_INLINE F32 maximum(F32 a, F32 b) {
  return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
// a where u and p have the same sign (a zero has both), else b. Their product could underflow; NaN agrees with nothing.
FUSED_L2_INLINE F32 where_agree(F32 u, F32 p, F32 a, F32 b) {
  const auto zero = _mm512_setzero_ps();
  const auto up = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(u.v, zero, _CMP_GE_OQ), p.v, zero, _CMP_GE_OQ);
  const auto down = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(u.v, zero, _CMP_LE_OQ), p.v, zero, _CMP_LE_OQ);
  return {_mm512_mask_mov_ps(b.v, up | down, a.v)};
}
FUSED_L2_INLINE bool all_finite(F32 a) {
  constexpr int quiet_nan = 0x01, plus_inf = 0x08, minus_inf = 0x10, signaling_nan = 0x80;
  return _mm512_fpclass_ps_mask(a.v, quiet_nan | plus_inf | minus_inf | signaling_nan) == 0;
}

FUSED_L2_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 operator/(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
FUSED_L2_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F64 negated_fma(F64 a, F64 b, F64 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
FUSED_L2_INLINE F64 sqrt(F64 a) { return {_mm512_sqrt_pd(a.v)}; }
FUSED_L2_INLINE F64 negate(F64 a) { return {_mm512_xor_pd(a.v, _mm512_set1_pd(-0.0))}; }
FUSED_L2_INLINE F64 maximum(F64 a, F64 b) {
  return {_mm512_mask_mov_pd(_mm512_max_pd(a.v, b.v), _mm512_cmp_pd_mask(a.v, a.v, _CMP_UNORD_Q), a.v)};
}
FUSED_L2_INLINE F64 where_agree(F64 u, F64 p, F64 a, F64 b) {
  const auto zero = _mm512_setzero_pd();
  const auto up = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(u.v, zero, _CMP_GE_OQ), p.v, zero, _CMP_GE_OQ);
  const auto down = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(u.v, zero, _CMP_LE_OQ), p.v, zero, _CMP_LE_OQ);
  return {_mm512_mask_mov_pd(b.v, up | down, a.v)};
}
FUSED_L2_INLINE bool all_finite(F64) { return false; }

// Sums of products in float64, of the lanes of vectors.
struct ProductsF32 {
  __m512d low, high;
  FUSED_L2_INLINE ProductsF32() : low(_mm512_setzero_pd()), high(_mm512_setzero_pd()) {}
  FUSED_L2_INLINE void add(F32 a, F32 b) {
    low = _mm512_fmadd_pd(lower(a), lower(b), low);
    high = _mm512_fmadd_pd(upper(a), upper(b), high);
  }
  double total() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
  static FUSED_L2_INLINE __m512d lower(F32 a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)); }
  static FUSED_L2_INLINE __m512d upper(F32 a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)); }
};
struct ProductsF64 {
  __m512d sums;
  FUSED_L2_INLINE ProductsF64() : sums(_mm512_setzero_pd()) {}
  FUSED_L2_INLINE void add(F64 a, F64 b) { sums = _mm512_fmadd_pd(a.v, b.v, sums); }
  double total() const { return _mm512_reduce_add_pd(sums); }
};

// bfloat16: the upper half of a float. Round to nearest even in integers: add 0x7fff, and 1 more if the half is odd.
FUSED_L2_INLINE __m512i rounded_bf16_unless_nan(__m512 x) {  // the result stands in the upper halves
  const __m512i u = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
}
FUSED_L2_INLINE __m512i rounded_bf16(__m512 x) {  // a NaN keeps its upper bits and is made quiet
  const __m512i quiet = _mm512_or_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x400000));
  return _mm512_mask_mov_epi32(rounded_bf16_unless_nan(x), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
}

template <class V> FUSED_L2_INLINE V load(const float* p) { return {_mm512_loadu_ps(p)}; }
template <class V> FUSED_L2_INLINE V load(const double* p) { return {_mm512_loadu_pd(p)}; }
template <class V> FUSED_L2_INLINE V load(const BFloat16* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))};
}
template <class V> FUSED_L2_INLINE V load(const Float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FUSED_L2_INLINE void store(float* p, F32 x) { _mm512_storeu_ps(p, x.v); }
FUSED_L2_INLINE void store(double* p, F64 x) { _mm512_storeu_pd(p, x.v); }
FUSED_L2_INLINE void store(BFloat16* p, F32 x) {
  const __m256i packed = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bf16(x.v), 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}
FUSED_L2_INLINE void store(Float16* p, F32 x) {
  const __m256i packed = _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), packed);
}

// Two vectors at a time. `interleaved` allows any fixed order of the lanes, the same for load and store:
// bfloat16 then splits into even and odd elements by a shift and a mask, without crossing lanes.
template <class V, bool interleaved, class S> FUSED_L2_INLINE void load2(const S* p, V& a, V& b) {
  if constexpr (interleaved && std::is_same_v<S, BFloat16>) {
    const __m512i x = _mm512_loadu_si512(p);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))));
  } else {
    a = load<V>(p);
    b = load<V>(p + V::width);
  }
}
template <bool interleaved, class V, class S> FUSED_L2_INLINE void store2(S* p, V a, V b) {
  if constexpr (interleaved && std::is_same_v<S, BFloat16>) {
    __m512i even = rounded_bf16_unless_nan(a.v), odd = rounded_bf16_unless_nan(b.v);
    if (!FUSED_L2_LIKELY(_mm512_cmp_ps_mask(a.v, b.v, _CMP_UNORD_Q) == 0)) {
      even = rounded_bf16(a.v);
      odd = rounded_bf16(b.v);
    }
    // (even >> 16) | (odd & 0xffff0000), as one ternary logic operation: f(x, y, z) = x | (y & z)
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000));
    _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, upper, 0xf8));
  } else {
    store(p, a);
    store(p + V::width, b);
  }
}

// A group of 8-bit codes as integers of a register's lanes, and back. Compilers make the former of two halves, which a
// load of the whole has to wait for.
template <class Code> FUSED_L2_INLINE void widen_codes(const Code* from, uint32_t* to) {
  for (int i = 0; i < kGroup; i += 16) _mm512_storeu_si512(to + i, I32::from(from + i).v);
}
FUSED_L2_INLINE void narrow_codes(const uint32_t* from, uint8_t* to) {
  for (int i = 0; i < kGroup; i += 16) {
    const __m128i x = _mm512_cvtepi32_epi8(_mm512_loadu_si512(from + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), x);
  }
}

FUSED_L2_INLINE I32 operator+(I32 a, I32 b) { return _mm512_add_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 operator*(I32 a, I32 b) { return _mm512_mullo_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 operator&(I32 a, I32 b) { return _mm512_and_si512(a.v, b.v); }
FUSED_L2_INLINE I32 operator|(I32 a, I32 b) { return _mm512_or_si512(a.v, b.v); }
FUSED_L2_INLINE I32 operator^(I32 a, I32 b) { return _mm512_xor_si512(a.v, b.v); }
FUSED_L2_INLINE I32 operator<<(I32 a, int bits) { return _mm512_slli_epi32(a.v, unsigned(bits)); }
FUSED_L2_INLINE I32 operator>>(I32 a, int bits) { return _mm512_srli_epi32(a.v, unsigned(bits)); }
FUSED_L2_INLINE I32 lesser(I32 a, I32 b) { return _mm512_min_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 greater(I32 a, I32 b) { return _mm512_max_epi32(a.v, b.v); }
FUSED_L2_INLINE I32 bits_of(F32 x) { return _mm512_castps_si512(x.v); }
FUSED_L2_INLINE F32 float_of(I32 x) { return {_mm512_castsi512_ps(x.v)}; }
FUSED_L2_INLINE F32 magnitude(F32 x) { return {_mm512_abs_ps(x.v)}; }
FUSED_L2_INLINE __mmask16 is_nan(F32 x) { return _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q); }
FUSED_L2_INLINE __mmask16 is_at_most(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
FUSED_L2_INLINE __mmask16 is_equal(I32 a, I32 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
FUSED_L2_INLINE __mmask16 has_bits(I32 a, I32 bits) { return _mm512_test_epi32_mask(a.v, bits.v); }
FUSED_L2_INLINE I32 shifted_right_signed(I32 a, int bits) { return _mm512_srai_epi32(a.v, unsigned(bits)); }
FUSED_L2_INLINE F32 sum_of_exact(F32 a, F32 b, F32 c) { return fma(a, b, c); }
FUSED_L2_INLINE I32 select(__mmask16 where, I32 a, I32 b) { return _mm512_mask_mov_epi32(b.v, where, a.v); }
FUSED_L2_INLINE F32 select(__mmask16 where, F32 a, F32 b) { return {_mm512_mask_mov_ps(b.v, where, a.v)}; }
FUSED_L2_INLINE I32 rounded(F32 x, BFloat16) { return _mm512_srli_epi32(rounded_bf16(x.v), 16); }
FUSED_L2_INLINE I32 rounded(F32 x, Float16) {
  return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
