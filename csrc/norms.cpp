#include "norms.h"

#include <vector>

#include "parallel.h"
#include "sums.h"

#define FUSED_L2_KERNELS "norms_kernels.h"
#include "foreach_capability.h"

namespace fused_l2 {
namespace {

// Over `count` elements, in float64: the sum of x^2, and the largest |x| (NaN if there is one).
using Norm = double (*)(const void* x, int64_t element_type, int64_t count);
const PerCapability<Norm> sum_of_squares_kernels = FUSED_L2_PER_CAPABILITY(sum_of_squares);
const PerCapability<Norm> largest_kernels = FUSED_L2_PER_CAPABILITY(largest);

Patience patience;  // of norms, which read one stream where a step reads four

// Tensors cut into chunks, each measured on its own: no result depends on the number of threads.
struct Chunks {
  struct Chunk {
    const char* x;
    int64_t dtype, count;
    double value;
  };
  std::vector<Chunk> all;
  int64_t elements = 0;

  void add(int64_t x, int64_t dtype, int64_t numel, int64_t chunk) {
    constexpr int64_t sizes[] = {4, 8, 2, 2};
    static_assert(sizeof sizes / sizeof *sizes == dtype::count);
    elements += numel;
    for (int64_t begin = 0; begin < numel; begin += chunk)
      all.push_back({address<const char>(x) + begin * sizes[dtype], dtype, std::min(chunk, numel - begin), 0});
  }

  void measure(Norm norm) {
    struct Context {
      std::vector<Chunk>& all;
      Norm norm;
    } context{all, norm};
    const auto one = [](void* opaque, int64_t i) {
      const Context& c = *static_cast<Context*>(opaque);
      Chunk& chunk = c.all[static_cast<size_t>(i)];
      chunk.value = c.norm(chunk.x, chunk.dtype, chunk.count);
    };
    int64_t begun;
    for_each_once(static_cast<int64_t>(all.size()), elements, one, &context, &begun, patience);
  }
};

}  // namespace

void sums_of_squares(const int64_t* addresses, const int64_t* dtypes, const int64_t* numels, int64_t count,
                     double* out) {
  Chunks chunks;
  std::vector<size_t> first;
  for (int64_t i = 0; i < count; ++i) {
    first.push_back(chunks.all.size());
    chunks.add(addresses[i], dtypes[i], numels[i], 65536);
  }
  first.push_back(chunks.all.size());
  chunks.measure(sum_of_squares_kernels.get());
  for (size_t i = 0; i + 1 < first.size(); ++i) {
    out[i] = 0;
    for (size_t k = first[i]; k < first[i + 1]; ++k) out[i] += chunks.all[k].value;
  }
}

double measure_grads(const Bucket* buckets, int64_t count, int64_t chunk, bool largest) {
  Chunks chunks;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      chunks.add(row[column::grad], buckets[b].grad_dtype, row[column::numel], chunk);
    }
  chunks.measure((largest ? largest_kernels : sum_of_squares_kernels).get());
  double lanes[kLanes] = {};
  for (size_t i = 0; i < chunks.all.size(); ++i) {
    double &lane = lanes[i % kLanes], value = chunks.all[i].value;
    if (!largest) lane += value;
    else if (!(value <= lane)) lane = lane != lane ? lane : value;
  }
  if (!largest) return pairwise_sum(lanes, kLanes);
  for (double lane : lanes)
    if (!(lane <= lanes[0])) lanes[0] = lanes[0] != lanes[0] ? lanes[0] : lane;
  return lanes[0];
}

}  // namespace fused_l2
