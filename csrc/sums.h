// The order of sums. They are made side by side, element i going to sum i % kLanes, then neighbours are added in pairs
// until one is left. The order is written down rather than left to the vector width, so that every instruction set, any
// number of threads and the Triton kernels (kernels/sums.py) give the same bits.
#pragma once
#include <cstdint>

namespace fused_l2 {

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

}  // namespace fused_l2
