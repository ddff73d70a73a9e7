// What the kernel files offer to library.cpp.
#pragma once
#include "capability.h"
#include "parallel.h"

namespace fused_l2 {

extern const PerCapability<PieceFunction> sgd_kernels;
extern const PerCapability<PieceFunction> adam_kernels;

// Sums are made side by side, element i going to sum i % kLanes, then neighbours are added in pairs until
// one is left. The order is written down rather than left to the vector width, so that every instruction set, any
// number of threads and the Triton kernel (kernels/norms.py) give the same bits.
constexpr int kLanes = 512;

// How many lanes hold something, as a power of two: the others are zero and change no sum.
inline int lanes_for(int64_t count) {
  int lanes = kLanes;
  while (lanes / 2 >= count && lanes > 1) lanes /= 2;
  return lanes;
}

inline double pairwise_sum(double* sums, int lanes) {
  for (int left = lanes / 2; left > 0; left /= 2)
    for (int lane = 0; lane < left; ++lane) sums[lane] = sums[2 * lane] + sums[2 * lane + 1];
  return sums[0];
}

using Norm = double (*)(const void* x, int64_t element_type, int64_t count);
// Steps a chunk with `update` (null: a skipped step), and writes `statistic::count` numbers about it.
using StepMeasured = void (*)(const Piece& chunk, PieceFunction update, double* out);
extern const PerCapability<StepMeasured> step_measured_kernels;

// Over `count` elements, in float64: the sum of x^2, and the largest |x| (NaN if there is one).
extern const PerCapability<Norm> sum_of_squares_kernels, largest_kernels;

}  // namespace fused_l2
