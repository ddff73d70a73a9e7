// SGD with and without momentum. No include guard: compiled once per instruction set by foreach_capability.h.
#include "multi_tensor.h"
#include "update_rules.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

template <class V, class W, class S, Decay decay, Momentum momentum>
void sgd_piece(const Piece& piece, const double* row) {
  const int64_t flags = piece.bucket->flags;
  if constexpr (momentum != Momentum::none) {
    if (flags & flag::nesterov) return Sweep<V, W, S, Sgd<V, decay, momentum, true>>::run(piece, row);
  }
  Sweep<V, W, S, Sgd<V, decay, momentum, false>>::run(piece, row);
}

template <class V, class W, class S, Decay decay> void sgd_piece(const Piece& piece, const double* row) {
  if (!(piece.bucket->flags & flag::momentum))
    return sgd_piece<V, W, typename W::Number, decay, Momentum::none>(piece, row);
  if constexpr (W::plain && std::is_same_v<typename W::Number, S> && std::is_same_v<typename V::T, S>)
    if (is_first_step(piece)) return sgd_piece<V, W, S, decay, Momentum::first_step>(piece, row);
  sgd_piece<V, W, S, decay, Momentum::running>(piece, row);
}

void sgd(const Piece& piece) {
  const Bucket& bucket = *piece.bucket;
  const double* row = bucket.coefficients + piece.row[column::coefficients] * kCoefficients;
  with_dtypes(piece, [&](auto vector, auto param, auto state) {
    using V = decltype(vector);
    using W = decltype(param);
    using S = decltype(state);
    with_decay(bucket, row, [&](auto decay) {
      constexpr Decay kind = decltype(decay)::value;
      if constexpr (kind != Decay::cautious || has_all_rules<W, S>) sgd_piece<V, W, S, kind>(piece, row);
    });
  });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
