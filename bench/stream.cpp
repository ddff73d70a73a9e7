// The memory floor of a step: fused_l2's own loop over the same streams, with one fma per stored stream in place of the
// update rule. Compiled on demand by bench/limit.py together with csrc/parallel.cpp and friends.
#define FUSED_L2_KERNELS "../bench/stream_kernels.h"
#include "../csrc/foreach_capability.h"
#include "../csrc/kernels.h"
#include "../csrc/torch_abi.h"

using namespace fused_l2;
static const PerCapability<PieceFunction> stream_kernels = FUSED_L2_PER_CAPABILITY(stream);

extern "C" __attribute__((visibility("default"))) void stream_connect(const char* path) {
  const TorchAbi& abi = connect_torch_abi(path);
  use_threads_of({abi.parallel_for, abi.num_threads});
}
extern "C" __attribute__((visibility("default"))) void stream_step(const Bucket* buckets, int64_t count) {
  int64_t begun = 0;
  for_each_piece(buckets, count, stream_kernels.get(), &begun);
}
