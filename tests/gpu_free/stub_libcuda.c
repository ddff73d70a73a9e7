// A libcuda without a GPU behind it, for Triton's own launcher: everything succeeds, and a launch is told to whoever asked.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
} LaunchConfig;

typedef void (*OnLaunch)(unsigned programs, unsigned threads, void* stream, void** arguments);
static OnLaunch on_launch = NULL;
static int64_t launches = 0, modules = 0;

void stub_on_launch(OnLaunch callback) { on_launch = callback; }
int64_t stub_launches(void) { return launches; }
int64_t stub_modules(void) { return modules; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuGetErrorString(int error, const char** text) { return *text = "an error of the stub", 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10: return *value = 32, 0;      // warp size
    case 16: return *value = 132, 0;     // multiprocessors
    case 75: return *value = 9, 0;       // compute capability 9.0
    case 76: return *value = 0, 0;
    case 97: return *value = 232448, 0;  // shared memory per block
    default: return *value = 1024, 0;
  }
}
int cuCtxGetCurrent(void** context) { return *context = &launches, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &launches, 0; }
int cuModuleLoadData(void** module, const void* image) { return ++modules, *module = &modules, 0; }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &modules, 0; }
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return *clusters = 1, 0; }
int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) { return memcpy(value, &pointer, sizeof pointer), 0; }
int cuPointerGetAttributes(unsigned count, void* attributes, void** data, uint64_t pointer) { return 0; }
int cuStreamIsCapturing(void* stream, int* capturing) { return *capturing = 0, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuTensorMapEncodeIm2col(void) { return 1; }
int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
  ++launches;
  if (on_launch != NULL) on_launch(config->grid_x, config->block_x, config->stream, arguments);
  return 0;
}
