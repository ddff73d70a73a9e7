#include <cstddef>

#include "torch_abi.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace fused_l2 {
namespace {

TorchAbi abi{};

#if defined(_WIN32)
void* open_loaded(const char* path) { return reinterpret_cast<void*>(GetModuleHandleA(path)); }
void* find(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(library), name));
}
#else
#ifndef RTLD_NOLOAD
#define RTLD_NOLOAD 0
#endif
void* open_loaded(const char* path) { return dlopen(path, RTLD_NOW | RTLD_NOLOAD); }
void* find(void* library, const char* name) { return dlsym(library, name); }
#endif

template <class F>
void resolve(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(find(library, name));
}

}  // namespace

const TorchAbi& connect_torch_abi(const char* library_path) {
  void* library = open_loaded(library_path);
  if (library == nullptr) return abi;
  resolve(library, "torch_parallel_for", abi.parallel_for);
  resolve(library, "torch_get_num_threads", abi.num_threads);
  resolve(library, "aoti_torch_get_data_ptr", abi.get_data_ptr);
  resolve(library, "aoti_torch_get_storage_size", abi.get_storage_size);
  resolve(library, "aoti_torch_get_storage_offset", abi.get_storage_offset);
  resolve(library, "aoti_torch_get_dim", abi.get_dim);
  resolve(library, "aoti_torch_get_sizes", abi.get_sizes);
  resolve(library, "aoti_torch_get_strides", abi.get_strides);
  resolve(library, "aoti_torch_get_dtype", abi.get_dtype);
  resolve(library, "aoti_torch_get_layout", abi.get_layout);
  resolve(library, "aoti_torch_dtype_element_size", abi.dtype_element_size);
  resolve(library, "aoti_torch_delete_tensor_object", abi.delete_tensor_object);
  return abi;
}

const TorchAbi& torch_abi() { return abi; }

TensorFacts TorchAbi::facts(void* tensor) const {
  TensorFacts f{};
  void* data = nullptr;
  int64_t storage_bytes = 0, offset = 0, *sizes = nullptr, *strides = nullptr;
  int32_t type = 0;
  if (get_data_ptr(tensor, &data) != 0 || get_storage_size(tensor, &storage_bytes) != 0 ||
      get_storage_offset(tensor, &offset) != 0 || get_dim(tensor, &f.dim) != 0 || get_sizes(tensor, &sizes) != 0 ||
      get_strides(tensor, &strides) != 0 || get_dtype(tensor, &type) != 0)
    return f;
  const int64_t element = static_cast<int64_t>(dtype_element_size(type));
  int64_t extent = 1;  // elements from the first to one past the last
  for (int64_t d = 0; d < f.dim; ++d) extent = sizes[d] == 0 || extent == 0 ? 0 : extent + (sizes[d] - 1) * strides[d];
  f.address = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  f.bytes_needed = extent * element;
  f.bytes_from_address = storage_bytes - offset * element;
  f.dtype = type;
  f.sizes = sizes;
  f.strides = strides;
  f.valid = f.bytes_from_address >= f.bytes_needed;
  return f;
}

}  // namespace fused_l2
