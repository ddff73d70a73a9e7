// No include guard: compiled once per instruction set by foreach_capability.h.
#include "../csrc/multi_tensor.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

template <class V, int states_> struct Stream {
  static constexpr int64_t id = states_ == 2 ? rule::adam : rule::sgd;
  static constexpr int states = states_;
  static constexpr bool reads_states = true;
  V zero;
  Stream(const double* row, const Bucket&) : zero(V::broadcast(static_cast<typename V::T>(row[7]))) {}
  FUSED_L2_INLINE void operator()(V& param, V grad, V* state) const {
    param = fma(grad, zero, param);
    for (int k = 0; k < states; ++k) state[k] = fma(grad, zero, state[k]);
  }
};

void stream(const Piece& piece) {
  static const double zeros[kCoefficients] = {};
  with_dtypes(piece, [&](auto vector, auto param, auto state) {
    using V = decltype(vector);
    if (piece.bucket->rule == rule::adam)
      return Sweep<V, decltype(param), decltype(state), Stream<V, 2>>::run(piece, zeros);
    Sweep<V, decltype(param), decltype(state), Stream<V, 1>>::run(piece, zeros);
  });
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
