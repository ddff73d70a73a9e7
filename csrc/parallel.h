// Splitting one step, all tensors of all its buckets, over torch's own threads.
#pragma once
#include <cstdint>

#include "patience.h"
#include "table.h"

namespace fused_l2 {

// How far ahead of the loop memory is asked for, in bytes per stream, once the step is larger than the caches.
constexpr int kPrefetchBytes = 1024;

// A contiguous part of one tensor, the work of one kernel call.
struct Piece {
  const Bucket* bucket;
  Row row;
  int64_t begin;  // element within the tensor
  int64_t count;
  bool streams;                // the step is larger than the caches
  bool prefetch;               // and this processor gains by asking for memory ahead
  double* measured = nullptr;  // where statistics are added to, `statistic::count` of them
};

using PieceFunction = void (*)(const Piece&);

// Calls f on pieces that cover every element of every row exactly once, on torch's threads. Sets *begun before the
// first call: what is thrown (std::bad_alloc) is thrown before.
void for_each_piece(const Bucket* buckets, int64_t count, PieceFunction f, int64_t* begun);

// Calls f(context, index) for 0 <= index < count, with indices shared out as pieces are, of so many `elements`
// together, and *begun set as there. `patience`: that of such work, for the same elements may be a longer or a shorter
// one.
void for_each_once(int64_t count, int64_t elements, void (*f)(void* context, int64_t index), void* context,
                   int64_t* begun, Patience& patience);
// That of steps.
extern Patience step_patience;

// Whether a step of so many elements is larger than the caches.
bool streams_from_memory(int64_t elements);

// Torch's thread pool, as C functions of its stable ABI (torch/csrc/stable/c/shim.h, since torch 2.10).
struct TorchThreads {
  int (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context);
  int (*num_threads)(uint32_t* count);
};
void use_threads_of(const TorchThreads&);
int64_t thread_count();

}  // namespace fused_l2
