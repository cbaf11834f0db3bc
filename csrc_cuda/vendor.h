// CUDA's words for what csrc_common is written in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#define LKV_DEVICE __device__ __forceinline__
#define LKV_UNROLL _Pragma("unroll")
#define LKV_DISPATCH_KEY "CUDA"
// Torch's shim hides this behind USE_CUDA; it lives in libtorch_cuda.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace latentkv {

constexpr const char* kDeviceType = "cuda";

LKV_DEVICE float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
LKV_DEVICE float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
LKV_DEVICE float sub_rn(float a, float b) {
  return __fsub_rn(a, b);
}
LKV_DEVICE float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
LKV_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
LKV_DEVICE uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return __bfloat16_as_ushort(pair.x) | static_cast<uint32_t>(__bfloat16_as_ushort(pair.y)) << 16;
}
LKV_DEVICE uint32_t pack_fp16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return __half_as_ushort(pair.x) | static_cast<uint32_t>(__half_as_ushort(pair.y)) << 16;
}
LKV_DEVICE float unpack_fp16(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
constexpr bool kDividesByReciprocal = true;

}  // namespace latentkv

#include "fp8.h"
#include "launch.h"

namespace latentkv {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
template <>
struct Fp8Encoder<E4M3FN> {
  LKV_DEVICE static uint16_t encode_pair(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  }
};
template <>
struct Fp8Encoder<E5M2> {
  LKV_DEVICE static uint16_t encode_pair(float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E5M2);
  }
};
#endif

constexpr int kMaxLog2Lanes = 5;   // of a group
constexpr int kMaxGroupHeads = 2;  // heads that a group may turn, one after the other
constexpr int kBlock = 128;        // threads of a block

inline void cuda_check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("latentkv: CUDA: ") + cudaGetErrorString(error));
}

inline int64_t resident_lanes(int device) {
  static const std::vector<int64_t> lanes = [] {
    int count = 0;
    cuda_check(cudaGetDeviceCount(&count));
    std::vector<int64_t> result;
    for (int d = 0; d < count; ++d) {
      int processors = 0, threads = 0;
      cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d));
      cuda_check(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, d));
      result.push_back(int64_t{processors} * threads);
    }
    return result;
  }();
  return lanes[device];
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) throw std::runtime_error("latentkv: no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Values are read back and checked only on demand: that waits for the stream, which a graph capture cannot.
inline bool checks_values(int device) {
  static const bool enabled = [] {
    const char* value = std::getenv("LATENTKV_CHECKS");
    return value && std::strcmp(value, "1") == 0;
  }();
  if (!enabled) return false;
  cudaStreamCaptureStatus status;
  cuda_check(cudaStreamIsCapturing(current_stream(device), &status));
  return status == cudaStreamCaptureStatusNone;
}
class HostView {
 public:
  HostView(const void* data, size_t bytes, int device) : copy_(bytes) {
    const cudaStream_t stream = current_stream(device);
    cuda_check(cudaMemcpyAsync(copy_.data(), data, bytes, cudaMemcpyDeviceToHost, stream));
    cuda_check(cudaStreamSynchronize(stream));
  }
  const void* data() const { return copy_.data(); }

 private:
  std::vector<char> copy_;
};

// Programmatic dependent launch (sm_90 and later): a grid may start while the one before it drains. Every kernel calls
// this before it touches memory that others share. The next grid is let go right away: it waits in its turn.
LKV_DEVICE void wait_for_producer() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}
inline bool& overlap_enabled() {
  static bool enabled = true;
  return enabled;
}

// Block b belongs to the part whose blocks start at the last `first_block` up to b.
template <int parts>
struct Blocks {
  Part part[parts];
  uint32_t first_block[parts + 1];
};

template <int part, class Kernel>
LKV_DEVICE void run_part(const Kernel& kernel, const Blocks<Kernel::kParts>& blocks) {
  if (part == 0 || blockIdx.x >= blocks.first_block[part]) {
    const uint32_t block = blockIdx.x - blocks.first_block[part], shift = blocks.part[part].log2_lanes;
    const Group group{block * (kBlock >> shift) + (threadIdx.x >> shift),
                      static_cast<int>(threadIdx.x & ((1 << shift) - 1)), 1 << shift};
    if (group.index < blocks.part[part].groups) kernel.template run<part>(group);
  } else if constexpr (part > 0) {
    run_part<part - 1>(kernel, blocks);
  }
}

template <class Kernel>
__global__ void __launch_bounds__(kBlock)
    run_lane_groups(const __grid_constant__ Blocks<Kernel::kParts> blocks, const __grid_constant__ Kernel kernel) {
  run_part<Kernel::kParts - 1>(kernel, blocks);
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    cuda_check(cudaGetDevice(&previous_));
    if (previous_ != device_) cuda_check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// Without the wait in its code a grid must not overlap: the machine code that a device uses says whether it has it.
template <class Kernel>
bool waits_for_producer(int device) {
  static std::array<std::atomic<int>, 64> known{};  // by device: 0 unknown, 1 no, 2 yes
  std::atomic<int>& answer = known[device % known.size()];
  if (answer == 0) {
    cudaFuncAttributes attributes;
    cuda_check(cudaFuncGetAttributes(&attributes, run_lane_groups<Kernel>));
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
  }
  return answer == 2;
}

template <class Kernel>
void launch(const Kernel& kernel, const Grid<Kernel::kParts>& grid, int device) {
  Blocks<Kernel::kParts> blocks{};
  for (int i = 0; i < Kernel::kParts; ++i) {
    const uint64_t threads = uint64_t{grid.part[i].groups} << grid.part[i].log2_lanes;
    blocks.part[i] = grid.part[i];
    blocks.first_block[i + 1] = blocks.first_block[i] + static_cast<uint32_t>((threads + kBlock - 1) / kBlock);
  }
  if (blocks.first_block[Kernel::kParts] == 0) return;
  const DeviceGuard guard(device);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks.first_block[Kernel::kParts]);
  config.blockDim = dim3(kBlock);
  config.stream = current_stream(device);
  config.attrs = &overlap;
  config.numAttrs = overlap_enabled() && waits_for_producer<Kernel>(device) ? 1 : 0;
  cuda_check(cudaLaunchKernelEx(&config, run_lane_groups<Kernel>, blocks, kernel));
}

}  // namespace latentkv

extern "C" __attribute__((visibility("default"), used)) inline void latentkv_set_overlap(bool enabled) {
  latentkv::overlap_enabled() = enabled;
}
