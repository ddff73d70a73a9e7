#include "watch.h"

#include <algorithm>

#include "table.h"
#include "torch_abi.h"

namespace fused_l2 {

bool watches_hold(const int64_t* watches, int64_t count) {
  const int64_t* w = watches;
  const TorchAbi& torch = torch_abi();
  for (int64_t i = 0; i < count; ++i) {
    void* const tensor = address<void>(w[watch::handle]);
    void* data = nullptr;
    int64_t bytes = 0, dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t type = 0;
    if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &bytes) != 0 ||
        data != address<void>(w[watch::address]) || bytes != w[watch::storage_bytes])
      return false;
    const int64_t watched_dim = w[watch::dim];
    if (watched_dim < 0) {
      w += watch::sizes;
      continue;
    }
    if (torch.get_dtype(tensor, &type) != 0 || torch.get_dim(tensor, &dim) != 0 ||
        torch.get_sizes(tensor, &sizes) != 0 || torch.get_strides(tensor, &strides) != 0 || type != w[watch::dtype] ||
        dim != watched_dim || !std::equal(sizes, sizes + dim, w + watch::sizes) ||
        !std::equal(strides, strides + dim, w + watch::sizes + dim))
      return false;
    w += watch::sizes + 2 * dim;
  }
  return true;
}

bool words_hold(const int64_t* addresses, const int64_t* expected, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (*address<const int64_t>(addresses[i]) != expected[i]) return false;
  return true;
}

int64_t make_watch(int64_t handle, bool memory_only, int64_t* out) {
  const TorchAbi& torch = torch_abi();
  void* const tensor = address<void>(handle);
  void* data = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t type = 0;
  if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &out[watch::storage_bytes]) != 0 ||
      torch.get_dtype(tensor, &type) != 0 || torch.get_dim(tensor, &dim) != 0 || torch.get_sizes(tensor, &sizes) != 0 ||
      torch.get_strides(tensor, &strides) != 0)
    return 0;
  out[watch::handle] = handle;
  out[watch::address] = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  out[watch::dtype] = type;
  out[watch::dim] = memory_only ? -1 : dim;
  if (memory_only) return watch::sizes;
  std::copy(sizes, sizes + dim, out + watch::sizes);
  std::copy(strides, strides + dim, out + watch::sizes + dim);
  return watch::sizes + 2 * dim;
}

void release(const int64_t* handles, int64_t count) {
  for (int64_t i = 0; i < count; ++i) torch_abi().release(address<void>(handles[i]));
}

}  // namespace fused_l2
