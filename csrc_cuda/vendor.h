// CUDA's words for what csrc_common is written in.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

#define LKV_DEVICE __device__ __forceinline__
#define LKV_INLINE  // of a lambda: nvcc inlines them all
#define LKV_UNROLL _Pragma("unroll")
#define LKV_ROLLED _Pragma("unroll 1")
#define LKV_GRID_CONSTANT __grid_constant__

namespace latentkv {

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
LKV_DEVICE float rcp_rn(float a) {
  return __frcp_rn(a);
}
LKV_DEVICE float fma_rn(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
LKV_DEVICE float sqrt_rn(float a) {
  return __fsqrt_rn(a);
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
constexpr bool kEncodesInIntegers = false;
constexpr bool kKeepsSubnormals = true;  // of fp32

}  // namespace latentkv

#include "fp8.h"
#include "launch.h"

namespace latentkv {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
template <>
struct Fp8Encoder<E4M3FN> {
  static constexpr bool is_native = true;
  LKV_DEVICE static uint16_t encode_pair(E4M3FN, float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
  }
};
template <>
struct Fp8Encoder<E5M2> {
  static constexpr bool is_native = true;
  LKV_DEVICE static uint16_t encode_pair(E5M2, float low, float high) {
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E5M2);
  }
};
// Every code is exact in 16 bits.
LKV_DEVICE void to_pair(__half2_raw halves, float& low, float& high) {
  low = unpack_fp16(halves.x), high = unpack_fp16(halves.y);
}
template <>
struct Fp8Decoder<E4M3FN> {
  LKV_DEVICE static void decode_pair(uint16_t codes, float& low, float& high) {
    to_pair(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E4M3), low, high);
  }
};
template <>
struct Fp8Decoder<E5M2> {
  LKV_DEVICE static void decode_pair(uint16_t codes, float& low, float& high) {
    to_pair(__nv_cvt_fp8x2_to_halfraw2(codes, __NV_E5M2), low, high);
  }
};
#endif

constexpr int kMaxGroupHeads = 2;      // heads that a group may turn, one after the other
constexpr int kHeadsInFlight = 2;      // at a time
constexpr int kLatentEights = 2;       // of a latent vector that a lane holds at a time
constexpr bool kHalvesLatent = true;   // whether two groups may share a latent vector
constexpr bool kSharedKeyCode = true;  // by both rope styles: less code, which a batch of one token waits for
// Of a row that is converted a lane takes so many turns, of so many eights each, for what it asks for at once.
constexpr int kConvertTurns = 4, kConvertEights = 1;

// The value of the lane whose number differs in the bit `step`. Every lane of the warp that has not left takes part.
template <int step>
LKV_DEVICE uint32_t shuffle_xor(uint32_t x) {
  return __shfl_xor_sync(~0u, x, step);
}

// Programmatic dependent launch (sm_90 and later): a grid may start while the one before it drains. Every kernel calls
// this before it touches memory that others share. Only then is the next grid let go: what it reads before its own wait
// is older than the grid before it, and must not still be written by the one before that.
LKV_DEVICE void wait_for_producer() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <class Bits>
LKV_DEVICE void store(void* p, const Bits& bits) {
  *static_cast<Bits*>(p) = bits;
}
// Cache rows: written here, read by another kernel.
template <class Bits>
LKV_DEVICE void store_row(void* p, const Bits& bits) {
  *static_cast<Bits*>(p) = bits;
}

}  // namespace latentkv

#include "gpu.h"

namespace latentkv {

inline bool& overlap_enabled() {
  static bool enabled = true;
  return enabled;
}

// Without the wait in its code a grid must not overlap: the machine code that a device uses says whether it has it.
template <auto kernel>
bool waits_for_producer(int device) {
  static std::array<std::atomic<int>, 64> known{};  // by device: 0 unknown, 1 no, 2 yes
  std::atomic<int>& answer = known[device % known.size()];
  if (answer == 0) {
    cudaFuncAttributes attributes;
    gpu_check(cudaFuncGetAttributes(&attributes, kernel));
    answer = attributes.ptxVersion >= 90 ? 2 : 1;
  }
  return answer == 2;
}

template <auto kernel, class... Args>
void enqueue(uint32_t blocks, int device, const Args&... args) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kBlock);
  config.stream = current_stream(device);
  config.attrs = &overlap;
  config.numAttrs = overlap_enabled() && waits_for_producer<kernel>(device) ? 1 : 0;
  gpu_check(cudaLaunchKernelEx(&config, kernel, args...));
}

}  // namespace latentkv

extern "C" __attribute__((visibility("default"), used)) inline void latentkv_set_overlap(bool enabled) {
  latentkv::overlap_enabled() = enabled;
}
