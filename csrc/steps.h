// Steps of whole buckets, and the step counters of their tensors.
#pragma once
#include <cstdint>

#include "table.h"

namespace fused_l2 {

// Do all tensors have memory, and do the step counters stand where the coefficients were computed for?
// Returns 0 if so, else 1 + the position of the first row, over all buckets, that does not.
int64_t check(const Bucket* buckets, int64_t count);

// Adds one to every tensor's step counter.
void count_steps(const Bucket* buckets, int64_t count);

// One step of every tensor of every bucket, then its step counter.
void step(const Bucket* buckets, int64_t count);

}  // namespace fused_l2
