// The update rules on loaded values: a vector of V, computed in V::T, every fma written out.
// fused_l2/reference.py states the same formulas in PyTorch; tests compare the two bit by bit.
// No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

enum class Decay { coupled, decoupled, cautious };  // what weight decay does in this row
enum class Momentum { none, first_step, running };  // of SGD: is there a buffer, does it hold anything yet

// Calls f with the kind of decay of a row, as a type. Without weight decay it is `decoupled`, whatever the flags say:
// the factor is 1, which changes no bit.
template <class F> FUSED_L2_INLINE void with_decay(const Bucket& bucket, const double* row, F&& f) {
  static_assert(int(sgd_coefficient::weight_decay) == int(adam_coefficient::weight_decay));
  if (row[sgd_coefficient::weight_decay] != 0) {
    if (!(bucket.flags & flag::decoupled)) return f(std::integral_constant<Decay, Decay::coupled>{});
    if (bucket.flags & flag::cautious) return f(std::integral_constant<Decay, Decay::cautious>{});
  }
  f(std::integral_constant<Decay, Decay::decoupled>{});
}

// What happens to every gradient before its rule sees it.
template <class V> struct GradientTransform {
  bool scaled, maximize;
  V factor;

  explicit GradientTransform(const Bucket& bucket)
      : scaled(bucket.flags & flag::scaled && *bucket.factor != 1),
        maximize(bucket.flags & flag::maximize),
        factor(V::broadcast(static_cast<typename V::T>(scaled ? *bucket.factor : 1))) {}

  FUSED_L2_INLINE V operator()(V grad) const {
    if (scaled) grad = grad * factor;
    return maximize ? negate(grad) : grad;
  }
};

template <class V, Decay decay_kind, Momentum momentum_kind, bool nesterov> struct Sgd {
  static constexpr int64_t id = rule::sgd;
  static constexpr int states = momentum_kind == Momentum::none ? 0 : 1;
  static constexpr bool reads_states = momentum_kind == Momentum::running;
  V weight_decay, decay, momentum, one_minus_dampening, neg_lr;
  GradientTransform<V> transform;

  Sgd(const double* row, const Bucket& bucket) : transform(bucket) {
    namespace at = sgd_coefficient;
    const auto rounded = [&](int i) { return V::broadcast(static_cast<typename V::T>(row[i])); };
    weight_decay = rounded(at::weight_decay);
    decay = rounded(at::decay);
    momentum = rounded(at::momentum);
    one_minus_dampening = rounded(at::one_minus_dampening);
    neg_lr = rounded(at::neg_lr);
  }

  FUSED_L2_INLINE void operator()(V& param, V grad, V* state) const {
    grad = transform(grad);
    if constexpr (decay_kind == Decay::coupled) grad = fma(param, weight_decay, grad);
    V update = grad;
    if constexpr (momentum_kind != Momentum::none) {
      V& buffer = state[0];
      buffer = momentum_kind == Momentum::first_step ? grad : fma(grad, one_minus_dampening, buffer * momentum);
      update = nesterov ? fma(buffer, momentum, grad) : buffer;
    }
    if constexpr (decay_kind == Decay::decoupled) param = param * decay;
    if constexpr (decay_kind == Decay::cautious) param = where_agree(update, param, param * decay, param);
    param = fma(update, neg_lr, param);
  }
};

// x / c for one c and many x, correctly rounded, without the divider.
// With y = RN(1/c), q a faithful quotient and r = x - q*c exact, RN(q + r*y) = RN(x/c) (Markstein 1990, theorem 8.1);
// q is faithful because y + y_low holds 1/c to twice the precision. Holds for finite x away from under- and overflow,
// which sqrt(v) / bias_correction2_sqrt with a bias correction in (0, 1] is: sqrt(v) lies in {0} or [2^-75, 2^64].
template <class V> struct ConstantDivisor {
  V divisor, reciprocal, reciprocal_low;

  explicit ConstantDivisor(double value) {
    using T = typename V::T;
    const T c = static_cast<T>(value), y = T(1) / c;
    divisor = V::broadcast(c);
    reciprocal = V::broadcast(y);
    reciprocal_low = V::broadcast(static_cast<T>(1.0 / static_cast<double>(c) - static_cast<double>(y)));
  }

  FUSED_L2_INLINE V divide(V x) const {
    if (FUSED_L2_LIKELY(all_finite(x))) {
      const V q = fma(x, reciprocal, x * reciprocal_low);
      const V r = negated_fma(q, divisor, x);
      return fma(r, reciprocal, q);
    }
    return x / divisor;  // inf, NaN; and every x of a type for which all_finite() is not worth asking
  }
};

template <class V, Decay decay_kind, bool amsgrad> struct Adam {
  using T = typename V::T;
  static constexpr int64_t id = rule::adam;
  static constexpr int states = amsgrad ? 3 : 2;
  static constexpr bool reads_states = true;
  V weight_decay, decay, lerp_weight, beta2, one_minus_beta2, eps, neg_step_size;
  ConstantDivisor<V> bias_correction2_sqrt;
  GradientTransform<V> transform;
  bool lerp_from_end;

  Adam(const double* row, const Bucket& bucket)
      : bias_correction2_sqrt(row[adam_coefficient::bias_correction2_sqrt]), transform(bucket) {
    namespace at = adam_coefficient;
    const auto rounded = [&](int i) { return V::broadcast(static_cast<T>(row[i])); };
    weight_decay = rounded(at::weight_decay);
    decay = rounded(at::decay);
    beta2 = rounded(at::beta2);
    one_minus_beta2 = rounded(at::one_minus_beta2);
    eps = rounded(at::eps);
    neg_step_size = rounded(at::neg_step_size);
    const T weight = static_cast<T>(row[at::one_minus_beta1]);
    lerp_from_end = !(weight < T(0.5));  // torch.lerp takes the nearer end
    lerp_weight = V::broadcast(lerp_from_end ? weight - T(1) : weight);
  }

  FUSED_L2_INLINE void operator()(V& param, V grad, V* state) const {
    V &exp_avg = state[0], &exp_avg_sq = state[1];
    grad = transform(grad);
    if constexpr (decay_kind == Decay::coupled) grad = fma(param, weight_decay, grad);
    if constexpr (decay_kind == Decay::decoupled) param = param * decay;  // 1 where there is none
    const V difference = grad - exp_avg;
    if (!FUSED_L2_LIKELY(!lerp_from_end)) exp_avg = grad;
    exp_avg = fma(lerp_weight, difference, exp_avg);
    if constexpr (decay_kind == Decay::cautious) param = where_agree(exp_avg, param, param * decay, param);
    exp_avg_sq = fma(one_minus_beta2 * grad, grad, exp_avg_sq * beta2);
    V second_moment = exp_avg_sq;
    if constexpr (amsgrad) second_moment = state[2] = maximum(state[2], exp_avg_sq);
    const V denominator = bias_correction2_sqrt.divide(sqrt(second_moment)) + eps;
    param = param + (neg_step_size * exp_avg) / denominator;
  }
};

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
