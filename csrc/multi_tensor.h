// From a table row to vectors and back: one loop for every rule, dtype signature and instruction set.
// No include guard: compiled once per instruction set by foreach_capability.h.
#include "staged_kernels.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// What a step with flag::statistics adds up, of the whole vectors of a piece. Order and rounding differ from one
// instruction set to another in the last digits of float64.
template <class V> struct Measured {
  using Sum = std::conditional_t<std::is_same_v<V, F32>, ProductsF32, ProductsF64>;
  Sum grads, params, updates, returned;
  FUSED_L2_INLINE Measured() {}  // written out, so that it is compiled for the instruction set
};
struct Unmeasured {};

// A parameter as it lies in memory: numbers, or 16-bit ones from which and from what is kept beside them (K) the
// vectors make float32 values.
template <class P, class K = Nothing> struct Stored {
  using Number = P;
  using Kept = K;
  static constexpr bool plain = std::is_same_v<K, Nothing>;
  static constexpr bool keeps = !plain && !std::is_same_v<K, Stochastic>;
  static constexpr bool is_random =
      std::is_same_v<K, Stochastic> || std::is_same_v<K, Compensation> || std::is_same_v<K, int8_t>;
  P* param;
  K* kept;
  uint32_t random;  // where the random bits of the first element start

  template <bool interleaved, class V> FUSED_L2_INLINE void load(V& a, V& b) const {
    if constexpr (keeps) {
      join_kept(param, kept, a);
      join_kept(param + V::width, kept + V::width, b);
    } else {
      load2<V, interleaved>(param, a, b);
    }
  }
  template <bool interleaved, class V> FUSED_L2_INLINE void store(V a, V b) const {
    if constexpr (plain) {
      store2<interleaved>(param, a, b);
    } else {
      const Stored second = from(V::width);
      split_kept(a, param, kept, random);
      split_kept(b, second.param, second.kept, second.random);
    }
  }
  FUSED_L2_INLINE Stored from(int64_t element) const {
    return {param + element, keeps ? kept + element : nullptr,
            random + RandomBits::kStride * static_cast<uint32_t>(element)};
  }
  double value(size_t i) const {
    if constexpr (keeps) return kept_value(param[i], kept[i]);
    else return widen(param[i]);
  }
  void copy(const Stored& other, size_t count) const {
    std::memcpy(param, other.param, count * sizeof(P));
    if constexpr (keeps) std::memcpy(kept, other.kept, count * sizeof(K));
  }
};

// A state as it lies in memory.
struct EightBit {};
template <class S> struct StateAt {
  S* at;

  explicit StateAt(S* given = nullptr) : at(given) {}
  StateAt(const Piece& piece, int k) : at(address<S>(piece.row[column::state0 + k]) + piece.begin) {}
  template <class Codes, bool interleaved, class V> FUSED_L2_INLINE void load(V& a, V& b) const {
    load2<V, interleaved>(at, a, b);
  }
  template <bool interleaved, class V> FUSED_L2_INLINE void store(V a, V b) const { store2<interleaved>(at, a, b); }
  FUSED_L2_INLINE StateAt from(int64_t element) const { return StateAt(at + element); }
};
// Codes, a group of which is two vectors.
template <> struct StateAt<EightBit> {
  uint8_t *at, *scale;

  explicit StateAt(uint8_t* codes = nullptr, uint8_t* scales = nullptr) : at(codes), scale(scales) {}
  StateAt(const Piece& piece, int k)
      : at(address<uint8_t>(piece.row[column::state0 + k]) + piece.begin),
        scale(address<uint8_t>(piece.row[column::scale0 + k]) + piece.begin / kGroup) {}
  template <class Codes, bool interleaved, class V> FUSED_L2_INLINE void load(V& a, V& b) const {
    decode_vectors<Codes>(at, *scale, a, b);
  }
  template <class Codes, class V> FUSED_L2_INLINE void store(V a, V b, uint32_t largest, uint32_t random) const {
    *scale = encode_vectors<Codes>(a, b, largest, random, at);
  }
  FUSED_L2_INLINE StateAt from(int64_t element) const { return StateAt(at + element, scale + element / kGroup); }
};

// Adds up what statistics tell of a tail. `exact`: the values before they were rounded, or null.
template <class W>
FUSED_L2_SMALL void measure_tail(const W& before, const W& after, const typename W::Number* grad, const float* exact,
                                 size_t tail, double* out) {
  for (size_t i = 0; i < tail; ++i) {
    const double g = widen(grad[i]), old = before.value(i), change = after.value(i) - old;
    out[statistic::grads] += g * g;
    out[statistic::params] += old * old;
    out[statistic::updates] += change * change;
    if (exact != nullptr) out[statistic::returned] += old * (after.value(i) - static_cast<double>(exact[i]));
  }
}

// Two vectors are in flight at a time; the end of a tensor, shorter than two vectors, passes through a buffer of that
// size and the same code, so that no element's result depends on where it stands.
template <class V, class W, class S, class Rule> struct Sweep {
  using P = typename W::Number;
  using State = StateAt<S>;
  static constexpr bool eight_bit = std::is_same_v<S, EightBit>;
  static constexpr int width = V::width, block = 2 * width, states = Rule::states;
  // Any order of lanes does as long as all streams share it, so it takes one storage type.
  static constexpr bool interleaved = W::plain && (std::is_same_v<P, S> || states == 0);
  static constexpr bool rounds = (W::plain && sizeof(P) < sizeof(typename V::T)) || W::is_random;
  template <class M> static constexpr bool measures = !std::is_same_v<M, Unmeasured>;

  template <int k = 0> static FUSED_L2_INLINE void load_states(const State* state, V (&s)[2][states + 1]) {
    if constexpr (k < states) {
      state[k].template load<CodesOf<Rule::id, k>, interleaved>(s[0][k], s[1][k]);
      load_states<k + 1>(state, s);
    }
  }
  template <int k = 0>
  static FUSED_L2_INLINE void store_codes(const State* state, const V (&s)[2][states + 1], const uint32_t* largest,
                                          uint32_t random) {
    if constexpr (k < states) {
      state[k].template store<CodesOf<Rule::id, k>>(s[0][k], s[1][k], largest[k], random);
      store_codes<k + 1>(state, s, largest, random);
    }
  }
  static FUSED_L2_INLINE void store_states(const State* state, const V (&s)[2][states + 1], uint32_t random) {
    if constexpr (eight_bit) {
      using I = typename V::Integers;
      const auto larger = [&](int k) { return greater(bits_of(magnitude(s[0][k])), bits_of(magnitude(s[1][k]))); };
      static_assert(states == 1 || states == 2, "");
      uint32_t largest[states];  // magnitudes of the groups
      if constexpr (states == 1) I::largest({larger(0)}, largest);
      else I::largest({larger(0), larger(1)}, largest);
      store_codes(state, s, largest, random);
    } else {
      for (int k = 0; k < states; ++k) state[k].template store<interleaved>(s[0][k], s[1][k]);
    }
  }

  template <class M>
  static FUSED_L2_INLINE void step(const Rule& rule, W param, const P* grad, const State* state, M& measured) {
    V p[2], g[2], s[2][states + 1];
    param.template load<interleaved>(p[0], p[1]);
    load2<V, interleaved>(grad, g[0], g[1]);
    if constexpr (Rule::reads_states) load_states(state, s);
    [[maybe_unused]] const V before[2] = {p[0], p[1]};
    if constexpr (measures<M>) {
      for (const V& x : g) measured.grads.add(x, x);
      for (const V& x : p) measured.params.add(x, x);
    }
    rule(p[0], g[0], s[0]);
    rule(p[1], g[1], s[1]);
    param.template store<interleaved>(p[0], p[1]);
    store_states(state, s, param.random);
    if constexpr (measures<M>) {
      const V exact[2] = {p[0], p[1]};
      if constexpr (rounds) param.template load<interleaved>(p[0], p[1]);
      for (int i = 0; i < 2; ++i) {
        const V change = p[i] - before[i];
        measured.updates.add(change, change);
        if constexpr (rounds) measured.returned.add(before[i], p[i] - exact[i]);
      }
    }
  }

  template <class T> static FUSED_L2_INLINE void prefetch(const T* p) {
#if defined(__GNUC__) || defined(__clang__)
    for (int offset = 0; offset < block * int(sizeof(T)); offset += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes + offset);
#else
    (void)p;
#endif
  }

  // Its own function, so that nothing but this loop is live in it and the rule's constants stay in registers.
  template <class M>
  static FUSED_L2_NOINLINE void step_blocks(const Rule& constants, W param, const P* grad, const State* states_begin,
                                            int64_t blocks, bool ahead, M& out) {
    const Rule rule = constants;
    M measured = out;
    State state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = states_begin[k];
    for (; blocks > 0; --blocks) {
      if (ahead) {
        prefetch(param.param);
        if constexpr (W::keeps) prefetch(param.kept);
        prefetch(grad);
        for (int k = 0; k < states; ++k) prefetch(state[k].at);
      }
      step(rule, param, grad, state, measured);
      param = param.from(block);
      grad += block;
      for (int k = 0; k < states; ++k) state[k] = state[k].from(block);
    }
    out = measured;
  }

  static void run(const Piece& piece, const double* coefficients) {
    const Rule rule(coefficients, *piece.bucket);
    if constexpr (std::is_same_v<P, float> && std::is_same_v<S, float>) {
      if (is_staged(piece)) {
        const auto loop = [&](float* param, const float* grad, float* const* state, int64_t count, double* measured) {
          State at[states + 1];
          for (int k = 0; k < states; ++k) at[k] = State(state[k]);
          step_all(rule, W{param, nullptr, 0}, grad, at, count, false, measured);
        };
        return step_staged(piece, states, Rule::reads_states, loop);
      }
    }
    W param{address<P>(piece.row[column::param]) + piece.begin, nullptr, 0};
    if constexpr (W::keeps) param.kept = address<typename W::Kept>(piece.row[column::kept]) + piece.begin;
    if constexpr (W::is_random || eight_bit) param.random = RandomBits(piece, coefficients[kStepCount]).start;
    const P* grad = address<const P>(piece.row[column::grad]) + piece.begin;
    State state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = State(piece, k);
    step_all(rule, param, grad, state, piece.count, piece.prefetch, piece.measured);
  }

  // Elements that lie in a row. `out`: where statistics are added to, or null.
  static void step_all(const Rule& rule, W param, const P* grad, const State* state, int64_t count, bool ahead,
                       double* out) {
    const int64_t blocks = count / block, stepped = blocks * block;
    Unmeasured unmeasured;
    if (out != nullptr) {
      Measured<V> sums;
      step_blocks(rule, param, grad, state, blocks, ahead, sums);
      out[statistic::grads] += sums.grads.total();
      out[statistic::params] += sums.params.total();
      out[statistic::updates] += sums.updates.total();
      out[statistic::returned] += sums.returned.total();
    } else if (blocks > 0) {
      step_blocks(rule, param, grad, state, blocks, ahead, unmeasured);
    }

    if constexpr (!eight_bit) {  // which come in whole blocks
      State end[states + 1];
      for (int k = 0; k < states; ++k) end[k] = state[k].from(stepped);
      if (count > stepped) step_tail(rule, param.from(stepped), grad + stepped, end, size_t(count - stepped), out);
    }
  }

  static void step_tail(const Rule& rule, const W& param_end, const P* grad, const State* state, size_t tail,
                        double* out) {
    Unmeasured unmeasured;
    alignas(64) P number_tail[block] = {}, grad_tail[block] = {};
    alignas(64) typename W::Kept kept_tail[block] = {};
    const W param_tail{number_tail, kept_tail, param_end.random};
    alignas(64) S state_tail[states + 1][block] = {};
    State state_at[states + 1];
    param_tail.copy(param_end, tail);
    std::memcpy(grad_tail, grad, tail * sizeof(P));
    for (int k = 0; k < states; ++k) {
      if (Rule::reads_states) std::memcpy(state_tail[k], state[k].at, tail * sizeof(S));
      state_at[k] = State(state_tail[k]);
    }
    float exact[rounds ? block : 1];
    if constexpr (rounds)
      if (out != nullptr) exact_values(rule, param_tail, grad_tail, state_at, tail, exact);
    step_blocks(rule, param_tail, grad_tail, state_at, 1, false, unmeasured);
    if (out != nullptr) measure_tail(param_end, param_tail, grad_tail, rounds ? exact : nullptr, tail, out);
    param_end.copy(param_tail, tail);
    for (int k = 0; k < states; ++k) std::memcpy(state[k].at, state_tail[k], tail * sizeof(S));
  }

  // What a tail's step computes before it is rounded: the same in float32.
  FUSED_L2_SMALL static void exact_values(const Rule& rule, const W& param, const P* grad, const State* state,
                                          size_t tail, float* exact) {
    using T = typename V::T;
    alignas(64) T values[block] = {}, wide_grad[block], wide_state[states + 1][block] = {};
    StateAt<T> state_at[states + 1];
    for (size_t i = 0; i < tail; ++i) values[i] = static_cast<T>(param.value(i));
    for (int i = 0; i < block; ++i) {
      wide_grad[i] = widen(grad[i]);
      for (int k = 0; k < states; ++k) wide_state[k][i] = widen(state[k].at[i]);
    }
    for (int k = 0; k < states; ++k) state_at[k] = StateAt<T>(wide_state[k]);
    Unmeasured unmeasured;
    Sweep<V, Stored<T>, T, Rule>::step_blocks(rule, {values, nullptr, 0}, wide_grad, state_at, 1, false, unmeasured);
    std::copy(values, values + tail, exact);
  }
};

// Whether cautious decay and amsgrad are compiled for these types; for the rest such steps are staged.
template <class W, class S>
constexpr bool has_all_rules = W::plain && (std::is_same_v<typename W::Number, S> ||
                                            (sizeof(typename W::Number) == 2 && std::is_same_v<S, float>));

// Calls f with the vector type and the storage types of parameters and states of a bucket's dtype signature, or of what
// it is stepped in.
template <class F> void with_dtypes(const Piece& piece, F&& f) {
  const Bucket& bucket = *piece.bucket;
  const bool is_bfloat16 = bucket.param_dtype == dtype::bfloat16, wide_state = state_dtype(bucket) == dtype::float32;
  if (is_staged(piece)) return f(F32{}, Stored<float>{}, float{});
  if (bucket.param_dtype == dtype::float64) return f(F64{}, Stored<double>{}, double{});
  if constexpr (!kLoads16Bit) {
    return f(F32{}, Stored<float>{}, float{});
  } else {
    if constexpr (kGroupIsTwoVectors) {
      if (bucket.flags & flag::eight_bit) {
        if (bucket.param_dtype == dtype::float32) return f(F32{}, Stored<float>{}, EightBit{});
        if (bucket.flags & flag::remainder) return f(F32{}, Stored<BFloat16, int16_t>{}, EightBit{});
        if (bucket.flags & flag::remainder8) return f(F32{}, Stored<BFloat16, int8_t>{}, EightBit{});
        return f(F32{}, Stored<BFloat16>{}, EightBit{});
      }
    }
    if (bucket.param_dtype == dtype::float32)
      return state_dtype(bucket) == dtype::bfloat16 ? f(F32{}, Stored<float>{}, BFloat16{})
                                                    : f(F32{}, Stored<float>{}, float{});
    if (bucket.flags & flag::remainder) return f(F32{}, Stored<BFloat16, int16_t>{}, float{});
    if (bucket.flags & flag::remainder8) return f(F32{}, Stored<BFloat16, int8_t>{}, float{});
    if (bucket.flags & flag::master)
      return is_bfloat16 ? f(F32{}, Stored<BFloat16, float>{}, float{}) : f(F32{}, Stored<Float16, float>{}, float{});
    if (bucket.flags & flag::stochastic) return f(F32{}, Stored<BFloat16, Stochastic>{}, float{});
    if (bucket.flags & flag::kahan) return f(F32{}, Stored<BFloat16, Compensation>{}, float{});
    if (is_bfloat16)
      return wide_state ? f(F32{}, Stored<BFloat16>{}, float{}) : f(F32{}, Stored<BFloat16>{}, BFloat16{});
    return wide_state ? f(F32{}, Stored<Float16>{}, float{}) : f(F32{}, Stored<Float16>{}, Float16{});
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
