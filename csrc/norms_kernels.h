// Sums of squares, largest values. No include guard: compiled once per instruction set by foreach_capability.h.
#include "sums_kernels.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// NaN if there is one.
template <class S> double largest_of(const S* x, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = std::fabs(static_cast<double>(widen(x[i])));
    if (!(value <= largest)) largest = largest != largest ? largest : value;
  }
  return largest;
}

double sum_of_squares(const void* x, int64_t element_type, int64_t count) {
  return with_elements(x, element_type, [&](const auto* values) { return sum_of_squares_of(values, count); });
}

double largest(const void* x, int64_t element_type, int64_t count) {
  return with_elements(x, element_type, [&](const auto* values) { return largest_of(values, count); });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
