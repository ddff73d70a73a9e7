#include "steps.h"

#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace fused_l2 {

int64_t check(const Bucket* buckets, int64_t count) {
  int64_t position = 0;
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      ++position;
      if (row[column::numel] != 0) {
        const int states = buckets[b].rule == rule::sgd ? (buckets[b].flags & flag::momentum ? 1 : 0)
                                                        : (buckets[b].flags & flag::amsgrad ? 3 : 2);
        for (int k = 0; k < column::state0 + states; ++k)
          if (row[k] == 0) return position;
        if (buckets[b].flags & (flag::master | flag::remainder | flag::kahan) && row[column::kept] == 0)
          return position;
      }
      if (row[column::step] == 0) continue;
      float step;
      std::memcpy(&step, address<const void>(row[column::step]), sizeof step);
      if (static_cast<double>(step) != buckets[b].steps[row[column::coefficients]]) return position;
    }
  }
  return 0;
}

void count_steps(const Bucket* buckets, int64_t count) {
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      void* counter = address<void>(buckets[b].row(r)[column::step]);
      if (counter == nullptr) continue;
      float step;
      std::memcpy(&step, counter, sizeof step);
      step += 1;
      std::memcpy(counter, &step, sizeof step);
    }
  }
}

void step(const Bucket* buckets, int64_t count) {
  for_each_piece(buckets, count, [](const Piece& piece) { kernel_of(piece)(piece); });
  count_steps(buckets, count);
}

}  // namespace fused_l2
