// Adam and AdamW. No include guard: compiled once per instruction set by foreach_capability.h.
#include "multi_tensor.h"
#include "update_rules.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

template <class V, class W, class S, Decay decay> void adam_piece(const Piece& piece, const double* row) {
  if (piece.bucket->flags & flag::amsgrad) return Sweep<V, W, S, Adam<V, decay, true>>::run(piece, row);
  Sweep<V, W, S, Adam<V, decay, false>>::run(piece, row);
}

void adam(const Piece& piece) {
  const Bucket& bucket = *piece.bucket;
  const double* row = bucket.coefficients + piece.row[column::coefficients] * kCoefficients;
  with_dtypes(bucket, [&](auto vector, auto param, auto state) {
    using V = decltype(vector);
    using W = decltype(param);
    using S = decltype(state);
    with_decay(bucket, row, [&](auto decay) {
      // Without decay the factor is 1, which changes no bit: no kernels are compiled for that.
      constexpr Decay kind = decltype(decay)::value == Decay::none ? Decay::decoupled : decltype(decay)::value;
      adam_piece<V, W, S, kind>(piece, row);
    });
  });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
