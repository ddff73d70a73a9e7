// Sums of squares. No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// Sixteen running sums, element i going to sum i % 16, added up pairwise at the end: the same bits on every
// instruction set, because the order is written down rather than left to the vector width.
template <class S> double sum_of_squares_of(const S* x, int64_t count) {
  constexpr int lanes = 16;
  double sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) {
      const double value = widen(x[i + lane]);
      sums[lane] += value * value;
    }
  for (int lane = 0; i + lane < count; ++lane) {
    const double value = widen(x[i + lane]);
    sums[lane] += value * value;
  }
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
}

double sum_of_squares(const void* x, int64_t element_type, int64_t count) {
  switch (element_type) {
    case dtype::float32: return sum_of_squares_of(static_cast<const float*>(x), count);
    case dtype::float64: return sum_of_squares_of(static_cast<const double*>(x), count);
    case dtype::bfloat16: return sum_of_squares_of(static_cast<const BFloat16*>(x), count);
    default: return sum_of_squares_of(static_cast<const Float16*>(x), count);
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
