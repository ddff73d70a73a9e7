// Sums of squares, largest values. No include guard: compiled once per instruction set by foreach_capability.h.
namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

template <class S> double sum_of_squares_of(const S* x, int64_t count) {
  alignas(64) double sums[kLanes];
  const int lanes = lanes_for(count);
  std::fill(sums, sums + lanes, 0.0);
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const int64_t here = std::min<int64_t>(kLanes, count - begin);
    int64_t lane = 0;
    const auto add = [&](int64_t k) {
      const double value = widen(x[begin + k]);
      sums[k] += value * value;
    };
    for (; lane + 16 <= here; lane += 16)  // a fixed number of times, which compilers make vectors of
      for (int k = 0; k < 16; ++k) add(lane + k);
    for (; lane < here; ++lane) add(lane);
  }
  return pairwise_sum(sums, lanes);
}

// NaN if there is one.
template <class S> double largest_of(const S* x, int64_t count) {
  double largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = std::fabs(static_cast<double>(widen(x[i])));
    if (!(value <= largest)) largest = largest != largest ? largest : value;
  }
  return largest;
}

template <class F> double with_elements(const void* x, int64_t element_type, F&& f) {
  switch (element_type) {
    case dtype::float32: return f(static_cast<const float*>(x));
    case dtype::float64: return f(static_cast<const double*>(x));
    case dtype::bfloat16: return f(static_cast<const BFloat16*>(x));
    default: return f(static_cast<const Float16*>(x));
  }
}

double sum_of_squares(const void* x, int64_t element_type, int64_t count) {
  return with_elements(x, element_type, [&](const auto* values) { return sum_of_squares_of(values, count); });
}

double largest(const void* x, int64_t element_type, int64_t count) {
  return with_elements(x, element_type, [&](const auto* values) { return largest_of(values, count); });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
