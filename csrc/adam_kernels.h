// Adam and AdamW. No include guard: compiled once per instruction set by foreach_capability.h.
#include "multi_tensor.h"
#include "update_rules.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

void adam(const Piece& piece) {
  const Bucket& bucket = *piece.bucket;
  const double* row = bucket.coefficients + piece.row[column::coefficients] * kCoefficients;
  with_dtypes(piece, [&](auto vector, auto param, auto state) {
    using V = decltype(vector);
    using W = decltype(param);
    using S = decltype(state);
    with_decay(bucket, row, [&](auto decay) {
      constexpr Decay kind = decltype(decay)::value;
      if constexpr (kind != Decay::cautious || has_all_rules<W, S>) {
        if constexpr (has_all_rules<W, S>)
          if (bucket.flags & flag::amsgrad) return Sweep<V, W, S, Adam<V, kind, true>>::run(piece, row);
        Sweep<V, W, S, Adam<V, kind, false>>::run(piece, row);
      }
    });
  });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
