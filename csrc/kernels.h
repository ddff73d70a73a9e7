// The update kernels, and which of them steps a piece.
#pragma once
#include "capability.h"
#include "parallel.h"

namespace fused_l2 {

extern const PerCapability<PieceFunction> sgd_kernels;
extern const PerCapability<PieceFunction> adam_kernels;

// For the instruction set in use.
inline PieceFunction kernel_of(const Piece& piece) {
  return (piece.bucket->rule == rule::sgd ? sgd_kernels : adam_kernels).get();
}

}  // namespace fused_l2
