// A step that measures what it steps.
#pragma once
#include <cstdint>

#include "table.h"

namespace fused_l2 {

// One step, and statistics of every chunk, rows of `statistic::count` in the order of buckets, tensors and chunks.
// `chunk` is a multiple of kLanes. With `skip` nothing is changed. `begun`: as for step().
void step_measured(const Bucket* buckets, int64_t count, int64_t chunk, bool skip, double* out, int64_t* begun);

}  // namespace fused_l2
