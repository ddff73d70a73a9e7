// Is every tensor still where and what it was? Asked before every step, through torch's own accessors.
#pragma once
#include <cstdint>

namespace fused_l2 {

// A watch over one tensor is int64: handle, address, bytes of its storage, dtype, dim, sizes, strides. Dim is -1 where
// only the memory is watched: for step counters.
namespace watch {
enum : int { handle, address, storage_bytes, dtype, dim, sizes };
}

// Is every watched tensor where and what it was when its watch was made?
bool watches_hold(const int64_t* watches, int64_t count);

// Do these words of memory still hold what they held?
bool words_hold(const int64_t* addresses, const int64_t* expected, int64_t count);

// Writes the watch of one tensor to `out`, which has room for it; its length, or 0 if the tensor has no memory to
// watch.
int64_t make_watch(int64_t handle, bool memory_only, int64_t* out);

// Gives back the handles that watches were made of.
void release(const int64_t* handles, int64_t count);

}  // namespace fused_l2
