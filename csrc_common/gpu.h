// What the GPUs share, in CUDA's spelling, which hipify turns into HIP's: the host's side of a launch, and how lane
// groups are laid out over a grid. The vendor header includes it and brings `enqueue`.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#define LKV_DISPATCH_KEY "CUDA"  // a ROCm torch calls its devices so too
// Torch's shim hides this behind USE_CUDA; it lives in torch's library for the GPU.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace latentkv {

constexpr const char* kDeviceType = "cuda";
constexpr int kMaxLog2Lanes = 5;  // of a group
constexpr int kBlock = 128;       // threads of a block

// Over the lanes of a group, the far halves first: every lane gets the same sum, as an addition does not care which of
// its two lanes asks. Lanes that work on nothing must take part too.
template <int step = 1 << (kMaxLog2Lanes - 1)>
LKV_DEVICE float group_sum(float x, const Group& group) {
  if constexpr (step == 0) {
    return x;
  } else {
    if (step < group.lanes) x = add_rn(x, bits_float(shuffle_xor<step>(float_bits(x))));
    return group_sum<step / 2>(x, group);
  }
}
// The greatest value of so many neighbouring lanes.
template <int lanes>
LKV_DEVICE uint32_t group_max(uint32_t x) {
  if constexpr (lanes == 1) {
    return x;
  } else {
    return group_max<lanes / 2>(max(x, shuffle_xor<lanes / 2>(x)));
  }
}

inline void gpu_check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("latentkv: ") + cudaGetErrorString(error));
}

inline int64_t resident_lanes(int device) {
  static const std::vector<int64_t> lanes = [] {
    int count = 0;
    gpu_check(cudaGetDeviceCount(&count));
    std::vector<int64_t> result;
    for (int d = 0; d < count; ++d) {
      int processors = 0, threads = 0;
      gpu_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, d));
      gpu_check(cudaDeviceGetAttribute(&threads, cudaDevAttrMaxThreadsPerMultiProcessor, d));
      result.push_back(int64_t{processors} * threads);
    }
    return result;
  }();
  return lanes[device];
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != 0) throw std::runtime_error("latentkv: no GPU stream");
  return static_cast<cudaStream_t>(stream);
}

// Values are read back and checked only on demand: that waits for the stream, which a graph capture cannot.
inline bool checks_values(int device) {
  if (!checks_enabled()) return false;
  cudaStreamCaptureStatus status;
  gpu_check(cudaStreamIsCapturing(current_stream(device), &status));
  return status == cudaStreamCaptureStatus{};  // none: not every version of hipify knows its name
}
class HostView {
 public:
  HostView(const void* data, size_t bytes, int device) : copy_(bytes) {
    const cudaStream_t stream = current_stream(device);
    gpu_check(cudaMemcpyAsync(copy_.data(), data, bytes, cudaMemcpyDeviceToHost, stream));
    gpu_check(cudaStreamSynchronize(stream));
  }
  const void* data() const { return copy_.data(); }

 private:
  std::vector<char> copy_;
};

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    gpu_check(cudaGetDevice(&previous_));
    if (previous_ != device_) gpu_check(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) static_cast<void>(cudaSetDevice(previous_));
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

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
    run_lane_groups(const LKV_GRID_CONSTANT Blocks<Kernel::kParts> blocks, const LKV_GRID_CONSTANT Kernel kernel) {
  run_part<Kernel::kParts - 1>(kernel, blocks);
}

// Puts `kernel` on the current stream of the current device, which is `device`.
template <auto kernel, class... Args>
void enqueue(uint32_t blocks, int device, const Args&... args);

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
  enqueue<run_lane_groups<Kernel>>(blocks.first_block[Kernel::kParts], device, blocks, kernel);
}

}  // namespace latentkv
