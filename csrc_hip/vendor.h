// ROCm's words for what csrc_common is written in. Waves have 64 lanes, lane groups at most 32: nothing here depends on
// the width of a wave.
#pragma once

#include <hip/hip_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#define LKV_DEVICE __device__ __forceinline__
#define LKV_INLINE __attribute__((always_inline))  // of a lambda
#define LKV_UNROLL _Pragma("unroll")
#define LKV_ROLLED _Pragma("unroll 1")
#define LKV_GRID_CONSTANT

namespace latentkv {

// The compiler contracts nothing (-ffp-contract=off).
LKV_DEVICE float mul_rn(float a, float b) {
  return a * b;
}
LKV_DEVICE float add_rn(float a, float b) {
  return a + b;
}
LKV_DEVICE float sub_rn(float a, float b) {
  return a - b;
}
LKV_DEVICE float fma_rn(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
LKV_DEVICE float sqrt_rn(float a) {
  return __builtin_sqrtf(a);
}
// The compiler's sequence is correctly rounded unless b's mantissa is all ones: there the error of v_rcp_f32 may leave
// the quotient an ulp too small, next to the midpoint. Of the two that one is right which leaves the smaller remainder.
LKV_DEVICE float div_rn(float a, float b) {
  const float q = a / b, next = __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, q) + 1);
  return __builtin_fabsf(fma_rn(-next, b, a)) < __builtin_fabsf(fma_rn(-q, b, a)) ? next : q;
}
LKV_DEVICE float rcp_rn(float a) {
  return div_rn(1.f, a);
}
// One instruction on gfx950, integer arithmetic elsewhere.
LKV_DEVICE uint32_t pack_bf16(float low, float high) {
  using Pair = __bf16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, Pair{static_cast<__bf16>(low), static_cast<__bf16>(high)});
}
// Kept apart from the product before it: one instruction for both adds a zero, which changes the sign of -0.
LKV_DEVICE uint32_t pack_fp16(float low, float high) {
  asm("" : "+v"(low), "+v"(high));
  using Pair = _Float16 __attribute__((ext_vector_type(2)));
  return __builtin_bit_cast(uint32_t, Pair{static_cast<_Float16>(low), static_cast<_Float16>(high)});
}
LKV_DEVICE float unpack_fp16(uint16_t bits) {
  return __builtin_bit_cast(_Float16, bits);
}
constexpr bool kDividesByReciprocal = true;
constexpr bool kEncodesInIntegers = false;
constexpr bool kKeepsSubnormals = true;  // of fp32

}  // namespace latentkv

#include "fp8.h"
#include "launch.h"

namespace latentkv {

// The conversions of gfx942 know the FNUZ kinds, those of gfx950 the OCP ones. They neither saturate nor promise which
// NaN they make, so the clamp comes before them and NaN goes round them: in as 0, out as `nan`. A device without them
// encodes in integer arithmetic.
#if defined(__gfx942__) || defined(__gfx950__)
template <class Kind>
LKV_DEVICE float clamp_fp8(float x) {
  return x == x ? __builtin_amdgcn_fmed3f(x, -Kind::max, Kind::max) : 0.f;
}
template <class Kind>
LKV_DEVICE uint16_t with_nan(int codes, float low, float high) {
  return static_cast<uint16_t>(codes | (low == low ? 0 : Kind::nan) | (high == high ? 0 : Kind::nan << 8));
}
#endif
#ifdef __gfx942__
template <>
struct Fp8Encoder<E4M3FNUZ> {
  static constexpr bool is_native = true;
  LKV_DEVICE static uint16_t encode_pair(E4M3FNUZ, float low, float high) {
    return with_nan<E4M3FNUZ>(
        __builtin_amdgcn_cvt_pk_fp8_f32(clamp_fp8<E4M3FNUZ>(low), clamp_fp8<E4M3FNUZ>(high), 0, false), low, high);
  }
};
#endif
#ifdef __gfx950__
template <>
struct Fp8Encoder<E4M3FN> {
  static constexpr bool is_native = true;
  LKV_DEVICE static uint16_t encode_pair(E4M3FN, float low, float high) {
    return with_nan<E4M3FN>(__builtin_amdgcn_cvt_pk_fp8_f32(clamp_fp8<E4M3FN>(low), clamp_fp8<E4M3FN>(high), 0, false),
                            low, high);
  }
};
template <>
struct Fp8Encoder<E5M2> {
  static constexpr bool is_native = true;
  LKV_DEVICE static uint16_t encode_pair(E5M2, float low, float high) {
    return with_nan<E5M2>(__builtin_amdgcn_cvt_pk_bf8_f32(clamp_fp8<E5M2>(low), clamp_fp8<E5M2>(high), 0, false), low,
                          high);
  }
};
#endif

// Heads that a group may turn, one after the other. A second one costs the registers of two waves; loading the angles
// again should cost little, as they lie in L1 (an assumption: no AMD GPU has measured it).
constexpr int kMaxGroupHeads = 1;
constexpr int kHeadsInFlight = 1;       // at a time
constexpr int kLatentEights = 2;        // of a latent vector that a lane holds at a time
constexpr bool kHalvesLatent = true;    // whether two groups may share a latent vector
constexpr bool kSharedKeyCode = false;  // by both rope styles: it would take more registers
// Of a row that is converted a lane takes so many turns, of so many eights each, for what it asks for at once.
constexpr int kConvertTurns = 4, kConvertEights = 1;

// The value of the lane whose number differs in the bit `step`: within any 32 lanes, whatever the width of a wave.
template <int step>
LKV_DEVICE uint32_t shuffle_xor(uint32_t x) {
  return static_cast<uint32_t>(__builtin_amdgcn_ds_swizzle(static_cast<int>(x), step << 10 | 0x1F));
}

// A grid starts when the one before it has ended.
LKV_DEVICE void wait_for_producer() {}

// Bits as one vector: words on their own may be stored apart, where two branches store some of them alike.
template <class Bits>
using Vector = typename Bits::Word __attribute__((ext_vector_type(sizeof(Bits) / sizeof(typename Bits::Word))));
template <class Bits>
LKV_DEVICE void store(void* p, const Bits& bits) {
  *static_cast<Vector<Bits>*>(p) = __builtin_bit_cast(Vector<Bits>, bits);
}
// Cache rows: written here, read by another kernel, so they need not displace what this one still reads.
template <class Bits>
LKV_DEVICE void store_row(void* p, const Bits& bits) {
  __builtin_nontemporal_store(__builtin_bit_cast(Vector<Bits>, bits), static_cast<Vector<Bits>*>(p));
}

}  // namespace latentkv

#include "gpu.h"

namespace latentkv {

template <auto kernel, class... Args>
void enqueue(uint32_t blocks, int device, const Args&... args) {
  if (uint64_t{blocks} * kBlock > UINT32_MAX) {  // some versions of HIP would run a part of the grid
    throw std::runtime_error("latentkv: HIP: expected fewer than 2^32 threads in a launch, got " +
                             std::to_string(uint64_t{blocks} * kBlock));
  }
  // By its own status: hipGetLastError may tell of others' errors.
  void* pointers[] = {const_cast<Args*>(&args)...};
  const auto* const function = reinterpret_cast<const void*>(kernel);
  gpu_check(hipLaunchKernel(function, dim3(blocks), dim3(kBlock), pointers, 0, current_stream(device)));
}

}  // namespace latentkv
