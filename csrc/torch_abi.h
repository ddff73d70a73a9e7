// The few functions of libtorch's stable C ABI that are used, declared by hand and found at run time.
// tests/test_cpu_engine.py compiles these declarations against the installed torch's own headers.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fused_l2 {

struct TorchAbi {
  int (*parallel_for)(int64_t, int64_t, int64_t, void (*)(int64_t, int64_t, void*), void*);
  int (*num_threads)(uint32_t*);
  int (*get_data_ptr)(void* tensor, void** out);
  int (*get_storage_size)(void* tensor, int64_t* bytes);
  int (*get_dim)(void* tensor, int64_t* out);
  int (*get_sizes)(void* tensor, int64_t** out);
  int (*get_strides)(void* tensor, int64_t** out);
  int (*get_dtype)(void* tensor, int32_t* out);
  int (*get_device_index)(void* tensor, int32_t* out);
  int (*get_storage_offset)(void* tensor, int64_t* out);
  size_t (*dtype_element_size)(int32_t dtype);
  int (*delete_tensor_object)(void* tensor);

  bool has_threads() const { return parallel_for && num_threads; }
  bool has_tensors() const {
    return get_data_ptr && get_storage_size && get_dim && get_sizes && get_strides && get_dtype && get_device_index &&
           get_storage_offset && dtype_element_size && delete_tensor_object;
  }
  void release(void* tensor) const { delete_tensor_object(tensor); }
};

const TorchAbi& connect_torch_abi(const char* library_path);
const TorchAbi& torch_abi();

}  // namespace fused_l2
