// A step that measures what it steps. No include guard: compiled once per instruction set by foreach_capability.h.
#include "parallel.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// The figures of a step that is skipped, and the count of gradients that are not finite.
template <class P> void measure_of(const Piece& chunk, bool skipped, double* out) {
  const P* param = address<const P>(chunk.row[column::param]) + chunk.begin;
  const P* grad = address<const P>(chunk.row[column::grad]) + chunk.begin;
  if (skipped) {
    out[statistic::grads] = sum_of_squares_of(grad, chunk.count);
    out[statistic::params] = sum_of_squares_of(param, chunk.count);
  }
  if (std::isfinite(out[statistic::grads])) return;  // of float64 gradients finite ones overflow, too
  for (int64_t i = 0; i < chunk.count; ++i)
    out[statistic::nonfinite] += !std::isfinite(static_cast<double>(widen(grad[i])));
}

void step_measured(const Piece& chunk, PieceFunction update, double* out) {
  std::fill(out, out + statistic::count, 0.0);
  if (update != nullptr) {
    Piece piece = chunk;
    piece.measured = out;
    update(piece);
  }
  const bool skipped = update == nullptr;
  switch (chunk.bucket->param_dtype) {
    case dtype::float32: return measure_of<float>(chunk, skipped, out);
    case dtype::float64: return measure_of<double>(chunk, skipped, out);
    case dtype::bfloat16: return measure_of<BFloat16>(chunk, skipped, out);
    default: return measure_of<Float16>(chunk, skipped, out);
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
