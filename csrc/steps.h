// Steps of whole buckets, and the step counters of their tensors.
#pragma once
#include <cstdint>

#include "table.h"

namespace fused_l2 {

// The tensors whose step counter is not what their coefficients were computed for: how many there are, and where
// `positions` is given, their positions over all rows of all buckets. Rows without a counter are none of them.
int64_t unexpected_counts(const Bucket* buckets, int64_t count, int64_t* positions);

// Adds one to every tensor's step counter.
void count_steps(const Bucket* buckets, int64_t count);

// One step of every tensor of every bucket, then its step counter. Sets *begun before it changes the first one; what is
// thrown (std::bad_alloc) is thrown before.
void step(const Bucket* buckets, int64_t count, int64_t* begun);

}  // namespace fused_l2
