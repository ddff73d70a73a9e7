// Sums of squares and largest values of whole tensors, the same bits for any number of threads.
#pragma once
#include <cstdint>

#include "table.h"

namespace fused_l2 {

// out[i] = sum of squares of tensor i, in float64.
void sums_of_squares(const int64_t* addresses, const int64_t* dtypes, const int64_t* numels, int64_t count,
                     double* out);

// Over all gradients of all buckets: the sum of squares, or with `largest` the largest absolute value. `chunk` is a
// multiple of kLanes and part of the definition of the order.
double measure_grads(const Bucket* buckets, int64_t count, int64_t chunk, bool largest);

}  // namespace fused_l2
