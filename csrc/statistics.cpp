#include "statistics.h"

#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "steps.h"

#define FUSED_L2_KERNELS "statistics_kernels.h"
#include "foreach_capability.h"

namespace fused_l2 {
namespace {

// Steps a chunk with `update` (null: a skipped step), and writes `statistic::count` numbers about it.
using StepChunk = void (*)(const Piece& chunk, PieceFunction update, double* out);
const PerCapability<StepChunk> step_chunk_kernels = FUSED_L2_PER_CAPABILITY(step_chunk);

}  // namespace

void step_measured(const Bucket* buckets, int64_t count, int64_t chunk, bool skip, double* out, int64_t* begun) {
  struct Context {
    std::vector<Piece> pieces;
    bool skip;
    double* out;
  } context{{}, skip, out};
  int64_t elements = 0;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) elements += buckets[b].row(r)[column::numel];
  const bool streams = streams_from_memory(elements), prefetch = streams && is_intel();
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      for (int64_t begin = 0; begin < row[column::numel]; begin += chunk)
        context.pieces.push_back(
            {&buckets[b], row, begin, std::min(chunk, row[column::numel] - begin), streams, prefetch});
    }
  const auto one = [](void* opaque, int64_t i) {
    const Context& c = *static_cast<Context*>(opaque);
    const Piece& piece = c.pieces[static_cast<size_t>(i)];
    step_chunk_kernels.get()(piece, c.skip ? nullptr : kernel_of(piece), c.out + i * statistic::count);
  };
  for_each_once(static_cast<int64_t>(context.pieces.size()), elements, one, &context, begun, step_patience);
  if (!skip) count_steps(buckets, count);
}

}  // namespace fused_l2
