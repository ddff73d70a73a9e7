// Adam and AdamW. No include guard: compiled once per instruction set by foreach_capability.h.
#include "multi_tensor.h"
#include "update_rules.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

void adam(const Piece& piece) {
  const Bucket& bucket = *piece.bucket;
  const double* row = bucket.coefficients + piece.row[column::coefficients] * kCoefficients;
  const bool amsgrad = bucket.flags & flag::amsgrad;
  const bool coupled = !(bucket.flags & flag::decoupled) && row[adam_coefficient::weight_decay] != 0;
  with_dtypes(bucket, [&](auto vector, auto param, auto state) {
    using V = decltype(vector);
    using P = decltype(param);
    using S = decltype(state);
    if (coupled && amsgrad) return Sweep<V, P, S, Adam<V, true, true>>::run(piece, row);
    if (coupled) return Sweep<V, P, S, Adam<V, true, false>>::run(piece, row);
    if (amsgrad) return Sweep<V, P, S, Adam<V, false, true>>::run(piece, row);
    Sweep<V, P, S, Adam<V, false, false>>::run(piece, row);
  });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
