// A step that measures what it steps. No include guard: compiled once per instruction set by foreach_capability.h.
#include "staged_kernels.h"
#include "sums_kernels.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

inline double sum_of_squared_params(const Piece& chunk) {
  const Row row = chunk.row;
  const int64_t type = chunk.bucket->param_dtype;
  if (!(chunk.bucket->flags & flag::low_precision))
    return with_elements(address<const void>(row[column::param]), type,
                         [&](const auto* values) { return sum_of_squares_of(values + chunk.begin, chunk.count); });
  Stretch param;
  double sum = 0;
  for (int64_t done = 0; done < chunk.count; done += kStretch) {
    Piece here = chunk;
    here.begin += done;
    here.count = std::min(kStretch, chunk.count - done);
    load_param(here, param);
    sum += sum_of_squares_of(param.at, here.count);
  }
  return sum;
}

// The figures of a step that is skipped, and the count of gradients that are not finite.
template <class G> void measure_of(const Piece& chunk, bool skipped, double* out) {
  const G* grad = address<const G>(chunk.row[column::grad]) + chunk.begin;
  if (skipped) {
    out[statistic::grads] = sum_of_squares_of(grad, chunk.count);
    out[statistic::params] = sum_of_squared_params(chunk);
  }
  if (std::isfinite(out[statistic::grads])) return;  // of float64 gradients finite ones overflow, too
  for (int64_t i = 0; i < chunk.count; ++i)
    out[statistic::nonfinite] += !std::isfinite(static_cast<double>(widen(grad[i])));
}

void step_chunk(const Piece& chunk, PieceFunction update, double* out) {
  std::fill(out, out + statistic::count, 0.0);
  if (update != nullptr) {
    Piece piece = chunk;
    piece.measured = out;
    update(piece);
    out[statistic::stepped] = out[statistic::params];
  }
  const bool skipped = update == nullptr;
  switch (chunk.bucket->grad_dtype) {
    case dtype::float32: return measure_of<float>(chunk, skipped, out);
    case dtype::float64: return measure_of<double>(chunk, skipped, out);
    case dtype::bfloat16: return measure_of<BFloat16>(chunk, skipped, out);
    default: return measure_of<Float16>(chunk, skipped, out);
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
