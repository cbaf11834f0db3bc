// A HIP runtime for one device that is not there: it takes the kernels that a library brings and hands every launch to
// a callback. Built as libamdhip64.so.7, the name that the library asks for.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  uint32_t x, y, z;
} dim3;
typedef struct {
  uint32_t magic, version;
  const void* bundle;
  void* unused;
} FatBinary;
typedef struct {
  const void *stub, *bundle;
  const char* name;
} Function;
typedef int (*Launch)(const void* bundle, const char* name, const dim3* grid, const dim3* block, void** arguments);

static Function functions[4096];
static int function_count;
static Launch on_launch;

void set_on_launch(Launch f) {
  on_launch = f;
}

void** __hipRegisterFatBinary(const void* data) {
  return (void**)data;
}
void __hipUnregisterFatBinary(void** module) {
  (void)module;
}
void __hipRegisterFunction(void** module, const void* stub, char* function, const char* name, unsigned limit, void* tid,
                           void* bid, dim3* block, dim3* grid, int* warp_size) {
  (void)function, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp_size;
  if (function_count < 4096) functions[function_count++] = (Function){stub, ((const FatBinary*)module)->bundle, name};
}

static dim3 pushed_grid, pushed_block;
int __hipPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  (void)stream;
  pushed_grid = grid, pushed_block = block;
  return shared ? 1 : 0;
}
int __hipPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void** stream) {
  *grid = pushed_grid, *block = pushed_block, *shared = 0, *stream = NULL;
  return 0;
}
int hipLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  (void)stream;
  for (int i = function_count; i-- > 0;) {
    if (functions[i].stub == stub && shared == 0) {
      return on_launch(functions[i].bundle, functions[i].name, &grid, &block, arguments);
    }
  }
  return 98;  // hipErrorInvalidDeviceFunction
}

// The tensors lie in host memory, whose device torch calls -1.
int hipGetDevice(int* device) {
  return *device = -1, 0;
}
int hipSetDevice(int device) {
  return device == -1 ? 0 : 101;
}
int hipGetDeviceCount(int* count) {
  return *count = 0, 0;
}
int hipDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  return *value = 0, 101;
}
int hipMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* stream) {
  (void)kind, (void)stream;
  return memcpy(to, from, bytes), 0;
}
int hipStreamSynchronize(void* stream) {
  return (void)stream, 0;
}
int hipStreamIsCapturing(void* stream, int* status) {
  return (void)stream, *status = 0, 0;
}
const char* hipGetErrorString(int error) {
  return (void)error, "the emulated launch failed";
}

int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  return (void)device, *stream = NULL, 0;
}
