#include "steps.h"

#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace fused_l2 {

namespace {
// A step counter is one float32 or, where the lowest bit of its address says so, one float64.
double counted(int64_t counter) {
  if (counter & 1) {
    double steps;
    std::memcpy(&steps, address<const void>(counter & ~int64_t(1)), sizeof steps);
    return steps;
  }
  float steps;
  std::memcpy(&steps, address<const void>(counter), sizeof steps);
  return static_cast<double>(steps);
}

void add_one(int64_t counter) {
  if (counter & 1) {
    const double steps = counted(counter) + 1;
    std::memcpy(address<void>(counter & ~int64_t(1)), &steps, sizeof steps);
  } else {
    const float steps = static_cast<float>(counted(counter)) + 1;
    std::memcpy(address<void>(counter), &steps, sizeof steps);
  }
}
}  // namespace

int64_t unexpected_counts(const Bucket* buckets, int64_t count, int64_t* positions) {
  int64_t position = 0, found = 0;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r, ++position) {
      const Row row = buckets[b].row(r);
      if (row[column::step] == 0 || counted(row[column::step]) == buckets[b].steps[row[column::coefficients]]) continue;
      if (positions != nullptr) positions[found] = position;
      ++found;
    }
  return found;
}

void count_steps(const Bucket* buckets, int64_t count) {
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const int64_t counter = buckets[b].row(r)[column::step];
      if (counter != 0) add_one(counter);
    }
}

void step(const Bucket* buckets, int64_t count, int64_t* begun) {
  for_each_piece(buckets, count, [](const Piece& piece) { kernel_of(piece)(piece); }, begun);
  count_steps(buckets, count);
}

}  // namespace fused_l2
