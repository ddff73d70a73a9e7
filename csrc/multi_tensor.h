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

// Two vectors are in flight at a time; the end of a tensor, shorter than two vectors, passes through a buffer of that
// size and the same code, so that no element's result depends on where it stands.
template <class V, class P, class S, class Rule> struct Sweep {
  static constexpr int width = V::width, block = 2 * width, states = Rule::states;
  // Any order of lanes does as long as all streams share it, so it takes one storage type.
  static constexpr bool interleaved = std::is_same_v<P, S> || states == 0;
  static constexpr bool rounds = sizeof(P) < sizeof(typename V::T);
  template <class M> static constexpr bool measures = !std::is_same_v<M, Unmeasured>;

  template <class M>
  static FUSED_L2_INLINE void step(const Rule& rule, P* param, const P* grad, S* const* state, M& measured) {
    V p[2], g[2], s[2][states + 1];
    load2<V, interleaved>(param, p[0], p[1]);
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
    store2<interleaved>(param, p[0], p[1]);
    for (int k = 0; k < states; ++k) store2<interleaved>(state[k], s[0][k], s[1][k]);
    if constexpr (measures<M>) {
      const V exact[2] = {p[0], p[1]};
      if constexpr (rounds) load2<V, interleaved>(param, p[0], p[1]);
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
  static FUSED_L2_NOINLINE void step_blocks(const Rule& constants, P* param, const P* grad, S* const* states_begin,
                                            int64_t blocks, bool ahead, M& out) {
    const Rule rule = constants;
    M measured = out;
    S* state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = states_begin[k];
    for (; blocks > 0; --blocks) {
      if (ahead) {
        prefetch(param);
        prefetch(grad);
        for (int k = 0; k < states; ++k) prefetch(state[k]);
      }
      step(rule, param, grad, state, measured);
      param += block;
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
          step_all(rule, param, grad, state, count, false, measured);
        };
        return step_staged(piece, states, Rule::reads_states, loop);
      }
    }
    P* param = address<P>(piece.row[column::param]) + piece.begin;
    const P* grad = address<const P>(piece.row[column::grad]) + piece.begin;
    S* state[states + 1];
    for (int k = 0; k < states; ++k) state[k] = address<S>(piece.row[column::state0 + k]) + piece.begin;
    step_all(rule, param, grad, state, piece.count, piece.prefetch, piece.measured);
  }

  // Elements that lie in a row. `out`: where statistics are added to, or null.
  static void step_all(const Rule& rule, P* param, const P* grad, S* const* state, int64_t count, bool ahead,
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
    alignas(64) P param_tail[block] = {}, grad_tail[block] = {};
    alignas(64) S state_tail[states + 1][block] = {};
    S* state_at[states + 1];
    std::memcpy(param_tail, param + stepped, tail * sizeof(P));
    std::memcpy(grad_tail, grad + stepped, tail * sizeof(P));
    for (int k = 0; k < states; ++k) {
      if (Rule::reads_states) std::memcpy(state_tail[k], state[k] + stepped, tail * sizeof(S));
      state_at[k] = state_tail[k];
    }
    if constexpr (rounds)
      if (out != nullptr) out[statistic::returned] += returned(rule, param_tail, grad_tail, state_at, tail);
    step_blocks(rule, param_tail, grad_tail, state_at, 1, false, unmeasured);
    if (out != nullptr) {
      for (size_t i = 0; i < tail; ++i) {
        const double g = widen(grad_tail[i]), before = widen(param[stepped + static_cast<int64_t>(i)]);
        const double change = static_cast<double>(widen(param_tail[i])) - before;
        out[statistic::grads] += g * g;
        out[statistic::params] += before * before;
        out[statistic::updates] += change * change;
      }
    }
    std::memcpy(param + stepped, param_tail, tail * sizeof(P));
    for (int k = 0; k < states; ++k) std::memcpy(state[k] + stepped, state_tail[k], tail * sizeof(S));
  }

  // What rounding will give back of a tail's step: once more, in float32.
  static double returned(const Rule& rule, const P* param, const P* grad, S* const* state, size_t tail) {
    using T = typename V::T;
    alignas(64) T exact[block], wide_grad[block], wide_state[states + 1][block] = {};
    T* state_at[states + 1];
    for (int i = 0; i < block; ++i) {
      exact[i] = widen(param[i]);
      wide_grad[i] = widen(grad[i]);
      for (int k = 0; k < states; ++k) wide_state[k][i] = widen(state[k][i]);
    }
    for (int k = 0; k < states; ++k) state_at[k] = wide_state[k];
    Unmeasured unmeasured;
    Sweep<V, T, T, Rule>::step_blocks(rule, exact, wide_grad, state_at, 1, false, unmeasured);
    P stored[block];
    for (size_t i = 0; i < tail; ++i) narrow(exact[i], stored[i]);
    double sum = 0;
    for (size_t i = 0; i < tail; ++i)
      sum += static_cast<double>(widen(param[i])) * static_cast<double>(widen(stored[i]) - exact[i]);
    return sum;
  }
};

// Calls f with the storage types and the vector type of a bucket's dtype signature, or of what it is stepped in.
template <class F> void with_dtypes(const Bucket& bucket, F&& f) {
  if (is_staged(bucket)) return f(F32{}, float{}, float{});
  if (bucket.param_dtype == dtype::float32) return f(F32{}, float{}, float{});
  if (bucket.param_dtype == dtype::float64) return f(F64{}, double{}, double{});
  if constexpr (kLoads16Bit) {
    const bool wide_state = bucket.state_dtype == dtype::float32;
    if (bucket.param_dtype == dtype::bfloat16)
      return wide_state ? f(F32{}, BFloat16{}, float{}) : f(F32{}, BFloat16{}, BFloat16{});
    return wide_state ? f(F32{}, Float16{}, float{}) : f(F32{}, Float16{}, Float16{});
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
