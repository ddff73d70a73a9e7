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

template <class F> void resolve(void* library, const char* name, F& function) {
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
  resolve(library, "aoti_torch_get_dim", abi.get_dim);
  resolve(library, "aoti_torch_get_sizes", abi.get_sizes);
  resolve(library, "aoti_torch_get_strides", abi.get_strides);
  resolve(library, "aoti_torch_get_dtype", abi.get_dtype);
  resolve(library, "aoti_torch_get_device_index", abi.get_device_index);
  resolve(library, "aoti_torch_get_storage_offset", abi.get_storage_offset);
  resolve(library, "aoti_torch_dtype_element_size", abi.dtype_element_size);
  resolve(library, "aoti_torch_delete_tensor_object", abi.delete_tensor_object);
  return abi;
}

const TorchAbi& torch_abi() { return abi; }

}  // namespace fused_l2
