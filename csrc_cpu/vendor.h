// The CPU's words for what csrc_common is written in: a lane group is one lane, a launch is a parallel loop.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define LKV_DEVICE inline __attribute__((always_inline))
#define LKV_INLINE __attribute__((always_inline))  // of a lambda
#define LKV_UNROLL
#define LKV_ROLLED
#define LKV_DISPATCH_KEY "CPU"

namespace latentkv {

using std::max;
using std::min;

constexpr const char* kDeviceType = "cpu";

LKV_DEVICE float mul_rn(float a, float b) {
  return a * b;
}
LKV_DEVICE float add_rn(float a, float b) {
  return a + b;
}
LKV_DEVICE float sub_rn(float a, float b) {
  return a - b;
}
LKV_DEVICE float div_rn(float a, float b) {
  return a / b;
}
LKV_DEVICE float rcp_rn(float a) {
  return 1.f / a;
}
LKV_DEVICE float fma_rn(float a, float b, float c) {
  return std::fma(a, b, c);
}
LKV_DEVICE float sqrt_rn(float a) {
  return std::sqrt(a);
}
// Without a branch, so that the compiler can take several at once.
LKV_DEVICE uint32_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded;
}
LKV_DEVICE uint32_t pack_bf16(float low, float high) {
  return round_bf16(low) | round_bf16(high) << 16;
}
LKV_DEVICE uint32_t pack_fp16(float low, float high) {
  return c10::Half(low).x | uint32_t{c10::Half(high).x} << 16;
}
LKV_DEVICE float unpack_fp16(uint16_t bits) {
  return c10::Half(bits, c10::Half::from_bits());
}
constexpr bool kDividesByReciprocal = false;  // one division is cheaper than five emulated FMAs
constexpr bool kEncodesInIntegers = true;
constexpr bool kKeepsSubnormals = false;  // of fp32: a process may have them flushed to zero

}  // namespace latentkv

#include "fp8.h"
#include "launch.h"

namespace latentkv {

constexpr int kMaxLog2Lanes = 0;         // of a group
constexpr int kMaxGroupHeads = 1 << 20;  // heads that a group may turn, one after the other
constexpr int kHeadsInFlight = 2;        // at a time
constexpr int kLatentEights = 16;        // of a latent vector that a lane holds at a time
constexpr bool kHalvesLatent = false;    // whether two groups may share a latent vector
constexpr bool kSharedKeyCode = true;    // by both rope styles
// Of a row that is converted a lane takes so many turns, of so many eights each, for what it asks for at once.
constexpr int kConvertTurns = 1, kConvertEights = 16;
inline int64_t resident_lanes(int) {
  return 1;
}

inline bool checks_values(int) {
  return true;
}
class HostView {
 public:
  HostView(const void* data, size_t, int) : data_(data) {}
  const void* data() const { return data_; }

 private:
  const void* data_;
};

LKV_DEVICE void wait_for_producer() {}

// Over the lanes of a group, of which there is one.
LKV_DEVICE float group_sum(float x, const Group&) {
  return x;
}
template <int lanes>
LKV_DEVICE uint32_t group_max(uint32_t x) {
  return x;
}

template <class Bits>
LKV_DEVICE void store(void* p, const Bits& bits) {
  *static_cast<Bits*>(p) = bits;
}
template <class Bits>
LKV_DEVICE void store_row(void* p, const Bits& bits) {
  *static_cast<Bits*>(p) = bits;
}

template <int part, class Kernel>
void run_part(const Kernel& kernel, const Grid<Kernel::kParts>& grid) {
  torch::stable::parallel_for(0, grid.part[part].groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel.template run<part>(Group{static_cast<uint32_t>(i), 0, 1});
  });
  if constexpr (part + 1 < Kernel::kParts) run_part<part + 1>(kernel, grid);
}

template <class Kernel>
void launch(const Kernel& kernel, const Grid<Kernel::kParts>& grid, int) {
  run_part<0>(kernel, grid);
}

}  // namespace latentkv
