// Sums of squares in the order of sums.h. No include guard: compiled once per instruction set by foreach_capability.h.
#include "sums.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// f(lane, i) for 0 <= i < count, in an inner loop of a fixed length, which compilers make vectors of.
template <class F> FUSED_L2_INLINE void for_each_lane(int64_t count, F&& f) {
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - begin);
    int64_t lane = 0;
    for (; lane + 16 <= here; lane += 16)
      for (int k = 0; k < 16; ++k) f(lane + k, begin + lane + k);
    for (; lane < here; ++lane) f(lane, begin + lane);
  }
}

template <class S> void add_squares(double* sums, const S* x, int64_t count) {
  for_each_lane(count, [&](int64_t lane, int64_t i) {
    const double value = widen(x[i]);
    sums[lane] += value * value;
  });
}

template <class S> double sum_of_squares_of(const S* x, int64_t count) {
  alignas(64) double sums[kLanes];
  const int lanes = lanes_for(count);
  std::fill(sums, sums + lanes, 0.0);
  add_squares(sums, x, count);
  return pairwise_sum(sums, lanes);
}

// f of x as a pointer to elements of its type.
template <class F> double with_elements(const void* x, int64_t element_type, F&& f) {
  switch (element_type) {
    case dtype::float32: return f(static_cast<const float*>(x));
    case dtype::float64: return f(static_cast<const double*>(x));
    case dtype::bfloat16: return f(static_cast<const BFloat16*>(x));
    default: return f(static_cast<const Float16*>(x));
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
