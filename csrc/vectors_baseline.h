// Plain C++ lanes: the fallback on x86 and, through the compiler's vectoriser, the NEON path.
// No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

template <class T_, int N> struct Lanes {
  using T = T_;
  static constexpr int width = N;
  T lane[N];

  template <class F> static FUSED_L2_INLINE Lanes make(F f) {
    Lanes r;
    for (int i = 0; i < N; ++i) r.lane[i] = f(i);
    return r;
  }
  static FUSED_L2_INLINE Lanes broadcast(T x) {
    return make([&](int) { return x; });
  }
  friend FUSED_L2_INLINE Lanes operator+(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  friend FUSED_L2_INLINE Lanes operator-(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  friend FUSED_L2_INLINE Lanes operator*(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  friend FUSED_L2_INLINE Lanes operator/(Lanes a, Lanes b) {
    return make([&](int i) { return a.lane[i] / b.lane[i]; });
  }
};

using F32 = Lanes<float, 4>;
using F64 = Lanes<double, 2>;
// No instruction brings 16 bits to lanes here: such tensors take the staged path, which is as fast (within 2 % on an
// AMD EPYC), and kernels of their own would be a third of the library.
constexpr bool kLoads16Bit = false;
constexpr bool kGroupIsTwoVectors = false;

// Sums of products in float64, of the lanes of vectors.
template <class V> struct Products {
  double lane[V::width] = {};
  FUSED_L2_INLINE void add(V a, V b) {
    for (int i = 0; i < V::width; ++i) lane[i] += static_cast<double>(a.lane[i]) * static_cast<double>(b.lane[i]);
  }
  double total() const {
    double sum = 0;
    for (double x : lane) sum += x;
    return sum;
  }
};
using ProductsF32 = Products<F32>;
using ProductsF64 = Products<F64>;

template <class V> FUSED_L2_INLINE V fma(V a, V b, V c) {
  return V::make([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
template <class V> FUSED_L2_INLINE V negate(V a) {
  return V::make([&](int i) { return -a.lane[i]; });
}
// a where u and p have the same sign (a zero has both), else b. Their product could underflow; NaN agrees with nothing.
template <class V> FUSED_L2_INLINE V where_agree(V u, V p, V a, V b) {
  return V::make([&](int i) {
    const bool agree = (u.lane[i] >= 0 && p.lane[i] >= 0) || (u.lane[i] <= 0 && p.lane[i] <= 0);
    return agree ? a.lane[i] : b.lane[i];
  });
}
// c - a * b
template <class V> FUSED_L2_INLINE V negated_fma(V a, V b, V c) { return fma(negate(a), b, c); }
template <class V> FUSED_L2_INLINE V sqrt(V a) {
  return V::make([&](int i) { return std::sqrt(a.lane[i]); });
}
// torch.maximum: a NaN on either side wins.
template <class V> FUSED_L2_INLINE V maximum(V a, V b) {
  return V::make([&](int i) { return a.lane[i] != a.lane[i] || a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
template <class V> FUSED_L2_INLINE bool all_finite(V) { return false; }

template <class V, class S> FUSED_L2_INLINE V load(const S* p) {
  return V::make([&](int i) { return widen(p[i]); });
}
template <class V, class S> FUSED_L2_INLINE void store(S* p, V x) {
  for (int i = 0; i < V::width; ++i) narrow(x.lane[i], p[i]);
}
// Two vectors at a time. `interleaved` allows any fixed order of the lanes, the same for load and store.
template <class V, bool interleaved, class S> FUSED_L2_INLINE void load2(const S* p, V& a, V& b) {
  a = load<V>(p);
  b = load<V>(p + V::width);
}
template <bool interleaved, class V, class S> FUSED_L2_INLINE void store2(S* p, V a, V b) {
  store(p, a);
  store(p + V::width, b);
}

// A group of 8-bit codes as 32-bit integers, and back.
template <class Code> FUSED_L2_INLINE void widen_codes(const Code* from, uint32_t* to) {
  for (int i = 0; i < kGroup; ++i) to[i] = static_cast<uint32_t>(int32_t{from[i]});
}
FUSED_L2_INLINE void narrow_codes(const uint32_t* from, uint8_t* to) {
  for (int i = 0; i < kGroup; ++i) to[i] = static_cast<uint8_t>(from[i]);
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
