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
  static constexpr bool is_random = std::is_same_v<K, Stochastic> || std::is_same_v<K, Compensation>;
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

// Two vectors are in flight at a time; the end of a tensor, shorter than two vectors, passes through a buffer of that
// size and the same code, so that no element's result depends on where it stands.
template <class V, class W, class S, class Rule> struct Sweep {
  using P = typename W::Number;
  static constexpr int width = V::width, block = 2 * width, states = Rule::states;
  // Any order of lanes does as long as all streams share it, so it takes one storage type.
  static constexpr bool interleaved = W::plain && (std::is_same_v<P, S> || states == 0);
  static constexpr bool rounds = (W::plain && sizeof(P) < sizeof(typename V::T)) || W::is_random;
  template <class M> static constexpr bool measures = !std::is_same_v<M, Unmeasured>;

  template <class M>
  static FUSED_L2_INLINE void step(const Rule& rule, W param, const P* grad, S* const* state, M& measured) {
    V p[2], g[2], s[2][states + 1];
    param.template load<interleaved>(p[0], p[1]);
    load2<V, interleaved>(grad, g[0], g[1]);
    if constexpr (Rule::reads_states)
      for (int k = 0; k < states; ++k) load2<V, interleaved>(state[k], s[0][k], s[1][k]);
    [[maybe_unused]] const V before[2] = {p[0], p[1]};
    if constexpr (measures<M>) {
      for (const V& x : g) measured.grads.add(x, x);
      for (const V& x : p) measured.params.add(x, x);
    }
    rule(p[0], g[0], s[0]);
    rule(p[1], g[1], s[1]);
    param.template store<interleaved>(p[0], p[1]);
    for (int k = 0; k < states; ++k) store2<interleaved>(state[k], s[0][k], s[1][k]);
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
  static FUSED_L2_NOINLINE void step_blocks(const Rule& constants, W param, const P* grad, S* const* states_begin,
                                            int64_t blocks, bool ahead, M& out) {
    const Rule rule = constants;
    M measured = out;
    S* state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = states_begin[k];
    for (; blocks > 0; --blocks) {
      if (ahead) {
        prefetch(param.param);
        if constexpr (W::keeps) prefetch(param.kept);
        prefetch(grad);
        for (int k = 0; k < states; ++k) prefetch(state[k]);
      }
      step(rule, param, grad, state, measured);
      param = param.from(block);
      grad += block;
      for (int k = 0; k < states; ++k) state[k] += block;
    }
    out = measured;
  }

  static void run(const Piece& piece, const double* coefficients) {
    const Rule rule(coefficients, *piece.bucket);
    if constexpr (std::is_same_v<P, float> && std::is_same_v<S, float>) {
      if (is_staged(*piece.bucket)) {
        const auto loop = [&](float* param, const float* grad, float* const* state, int64_t count, double* measured) {
          step_all(rule, W{param, nullptr, 0}, grad, state, count, false, measured);
        };
        return step_staged(piece, states, Rule::reads_states, loop);
      }
    }
    W param{address<P>(piece.row[column::param]) + piece.begin, nullptr, 0};
    if constexpr (W::keeps) param.kept = address<typename W::Kept>(piece.row[column::kept]) + piece.begin;
    if constexpr (W::is_random) param.random = RandomBits(piece, coefficients[kStepCount]).start;
    const P* grad = address<const P>(piece.row[column::grad]) + piece.begin;
    S* state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = address<S>(piece.row[column::state0 + k]) + piece.begin;
    step_all(rule, param, grad, state, piece.count, piece.prefetch, piece.measured);
  }

  // Elements that lie in a row. `out`: where statistics are added to, or null.
  static void step_all(const Rule& rule, W param, const P* grad, S* const* state, int64_t count, bool ahead,
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

    const size_t tail = static_cast<size_t>(count - stepped);
    if (tail == 0) return;
    alignas(64) P number_tail[block] = {}, grad_tail[block] = {};
    alignas(64) typename W::Kept kept_tail[block] = {};
    const W param_end = param.from(stepped), param_tail{number_tail, kept_tail, param_end.random};
    alignas(64) S state_tail[states + 1][block] = {};
    S* state_at[states + 1];
    param_tail.copy(param_end, tail);
    std::memcpy(grad_tail, grad + stepped, tail * sizeof(P));
    for (int k = 0; k < states; ++k) {
      if (Rule::reads_states) std::memcpy(state_tail[k], state[k] + stepped, tail * sizeof(S));
      state_at[k] = state_tail[k];
    }
    [[maybe_unused]] float exact[block];
    if constexpr (rounds)
      if (out != nullptr) exact_values(rule, param_tail, grad_tail, state_at, tail, exact);
    step_blocks(rule, param_tail, grad_tail, state_at, 1, false, unmeasured);
    if (out != nullptr) {
      for (size_t i = 0; i < tail; ++i) {
        const double g = widen(grad_tail[i]), before = param_end.value(i);
        const double change = param_tail.value(i) - before;
        out[statistic::grads] += g * g;
        out[statistic::params] += before * before;
        out[statistic::updates] += change * change;
        if constexpr (rounds)
          out[statistic::returned] += before * (param_tail.value(i) - static_cast<double>(exact[i]));
      }
    }
    param_end.copy(param_tail, tail);
    for (int k = 0; k < states; ++k) std::memcpy(state[k] + stepped, state_tail[k], tail * sizeof(S));
  }

  // What a tail's step computes before it is rounded: the same in float32.
  static void exact_values(const Rule& rule, const W& param, const P* grad, S* const* state, size_t tail,
                           float* exact) {
    using T = typename V::T;
    alignas(64) T values[block] = {}, wide_grad[block], wide_state[states + 1][block] = {};
    T* state_at[states + 1];
    for (size_t i = 0; i < tail; ++i) values[i] = static_cast<T>(param.value(i));
    for (int i = 0; i < block; ++i) {
      wide_grad[i] = widen(grad[i]);
      for (int k = 0; k < states; ++k) wide_state[k][i] = widen(state[k][i]);
    }
    for (int k = 0; k < states; ++k) state_at[k] = wide_state[k];
    Unmeasured unmeasured;
    Sweep<V, Stored<T>, T, Rule>::step_blocks(rule, {values, nullptr, 0}, wide_grad, state_at, 1, false, unmeasured);
    std::copy(values, values + tail, exact);
  }
};

// Calls f with the vector type and the storage types of parameters and states of a bucket's dtype signature, or of what
// it is stepped in.
template <class F> void with_dtypes(const Bucket& bucket, F&& f) {
  const bool is_bfloat16 = bucket.param_dtype == dtype::bfloat16, wide_state = bucket.state_dtype == dtype::float32;
  if (is_staged(bucket)) return f(F32{}, Stored<float>{}, float{});
  if (bucket.param_dtype == dtype::float64) return f(F64{}, Stored<double>{}, double{});
  if constexpr (!kLoads16Bit) {
    return f(F32{}, Stored<float>{}, float{});
  } else {
    if (bucket.param_dtype == dtype::float32)
      return bucket.state_dtype == dtype::bfloat16 ? f(F32{}, Stored<float>{}, BFloat16{})
                                                   : f(F32{}, Stored<float>{}, float{});
    if (bucket.flags & flag::remainder) return f(F32{}, Stored<BFloat16, int16_t>{}, float{});
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
