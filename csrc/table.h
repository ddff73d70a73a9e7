// The memory layout that Python and C++ share: tensor rows, coefficient rows, flags.
//
// Every name stands once here and once in fused_l2/tables/tensor_table.py and fused_l2/tables/coefficients.py;
// `layout()` spells this side out and Python refuses a library whose spelling differs.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fused_l2 {

// One tensor of a step: int64 columns, addresses as integers.
// `kept` is what a low-precision flag keeps beside the parameter; `key`, for random bits: the parameter's key in the
// low 32 bits, the number of its first element in the high ones; `scale0` and `scale1` belong to 8-bit states: a byte
// for each kGroup elements.
#define FUSED_L2_COLUMNS(X) \
  X(param)                  \
  X(grad) X(state0) X(state1) X(state2) X(step) X(numel) X(coefficients) X(flags) X(kept) X(key) X(scale0) X(scale1)
// The tensors of one step that share a rule and a dtype signature: a struct here, int64 columns in Python.
// clang-format off
#define FUSED_L2_BUCKET(X)                                                                                  \
  X(int64_t, rule) X(int64_t, flags) X(int64_t, param_dtype) X(int64_t, grad_dtype) X(int64_t, state_dtype) \
  X(int64_t, rows)                                                                                          \
  X(const int64_t*, table)       /* [rows][column::count] */                                                \
  X(const double*, coefficients) /* [coefficient rows][kCoefficients] */                                    \
  X(const double*, steps)        /* [coefficient rows]: the step count each expects, unused by SGD */       \
  X(const double*, factor)       /* what gradients are multiplied by; looked at with flag::scaled */
// clang-format on
// The float64 scalars an update rule needs this step, one row per (param group, step count).
#define FUSED_L2_SGD(X) X(weight_decay) X(decay) X(momentum) X(one_minus_dampening) X(neg_lr)
#define FUSED_L2_ADAM(X) \
  X(weight_decay)        \
  X(decay) X(one_minus_beta1) X(beta2) X(one_minus_beta2) X(bias_correction2_sqrt) X(eps) X(neg_step_size)
#define FUSED_L2_RULES(X) X(sgd) X(adam)
#define FUSED_L2_DTYPES(X) X(float32) X(float64) X(bfloat16) X(float16)
// Flags of a bucket: the shape of the computation. Values are powers of two in this order.
// clang-format off
#define FUSED_L2_FLAGS(X)                                                                         \
  X(momentum) X(nesterov) X(maximize) X(decoupled) X(amsgrad) X(scaled) X(cautious) X(statistics) \
  X(master) X(remainder) X(kahan) X(stochastic) X(remainder8) X(eight_bit)
// clang-format on
// Flags of a row.
#define FUSED_L2_ROW_FLAGS(X) X(first_step)
// What a step with flag::statistics leaves of each chunk, as float64: sums of g^2, of w^2 before the step, of the
// update^2; how many gradients are not finite; the second sum again, 0 for a step that was not made; and how much of
// the step rounding to 16 bits gave back, the sum of w * (stored - exact), w before the step.
#define FUSED_L2_STATISTICS(X) X(grads) X(params) X(updates) X(nonfinite) X(stepped) X(returned)

#define FUSED_L2_ENUMERATOR(name) name,
namespace column {
enum : int { FUSED_L2_COLUMNS(FUSED_L2_ENUMERATOR) count };
}
namespace sgd_coefficient {
enum : int { FUSED_L2_SGD(FUSED_L2_ENUMERATOR) count };
}
namespace adam_coefficient {
enum : int { FUSED_L2_ADAM(FUSED_L2_ENUMERATOR) count };
}
namespace rule {
enum : int64_t { FUSED_L2_RULES(FUSED_L2_ENUMERATOR) count };
}
namespace dtype {
enum : int64_t { FUSED_L2_DTYPES(FUSED_L2_ENUMERATOR) count };
}
namespace flag {
namespace bit {
enum : int { FUSED_L2_FLAGS(FUSED_L2_ENUMERATOR) count };
}
enum : int64_t {
#define FUSED_L2_POWER(name) name = int64_t(1) << bit::name,
  FUSED_L2_FLAGS(FUSED_L2_POWER)
#undef FUSED_L2_POWER
      low_precision = master | remainder | kahan | stochastic | remainder8,  // one of them at most
};
}  // namespace flag
namespace row_flag {
enum : int64_t { first_step = 1 };
}
namespace statistic {
enum : int { FUSED_L2_STATISTICS(FUSED_L2_ENUMERATOR) count };
}
#undef FUSED_L2_ENUMERATOR

// Where a coefficient row of either rule has the step's count, for random bits: behind the longer one's columns.
constexpr int kStepCount = std::max<int>(sgd_coefficient::count, adam_coefficient::count);
constexpr int kCoefficients = kStepCount + 1;  // doubles from one coefficient row to the next

// How many elements of an 8-bit state share a scale.
constexpr int kGroup = 32;

using Row = const int64_t*;  // points at `column::count` integers

struct Bucket {
#define FUSED_L2_MEMBER(type, name) \
  type name;                        \
  static_assert(sizeof(type) == sizeof(int64_t));
  FUSED_L2_BUCKET(FUSED_L2_MEMBER)
#undef FUSED_L2_MEMBER

  Row row(int64_t index) const { return table + index * column::count; }
};

template <class T> T* address(int64_t value) { return reinterpret_cast<T*>(static_cast<intptr_t>(value)); }

// Every name above and what follows from them, in order.
const char* layout();

}  // namespace fused_l2
