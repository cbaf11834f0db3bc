// fp8 in integer arithmetic: every device can write and read every kind. A vendor header may put an instruction of its
// chip in the place of `encode_pair` or `decode_pair` for the kinds that the chip knows.
#pragma once

#include <cstdint>
#include <cstring>

namespace latentkv {

// A kind is named by its layout: mantissa bits, exponent bias, the code of NaN, and whether a negative zero exists.
// `max` is its largest finite value, `infinite` the first magnitude past it: infinity, or a NaN where mantissa bits are
// set. E4M3FNUZ has none, but NaN in the place of -0.
struct E4M3FN {
  static constexpr int bytes = 1;
  static constexpr int mantissa = 3, bias = 7;
  static constexpr uint8_t nan = 0x7F;
  static constexpr float max = 448.f;
  static constexpr uint32_t infinite = 0x7F;
  static constexpr bool negative_zero = true;
};
struct E4M3FNUZ {
  static constexpr int bytes = 1;
  static constexpr int mantissa = 3, bias = 8;
  static constexpr uint8_t nan = 0x80;
  static constexpr float max = 240.f;
  static constexpr uint32_t infinite = 0x80;
  static constexpr bool negative_zero = false;
};
struct E5M2 {
  static constexpr int bytes = 1;
  static constexpr int mantissa = 2, bias = 15;
  static constexpr uint8_t nan = 0x7F;
  static constexpr float max = 57344.f;
  static constexpr uint32_t infinite = 0x7C;
  static constexpr bool negative_zero = true;
};
// Any of them, known when the kernel runs.
struct AnyFp8 {
  int mantissa, bias;
  uint8_t nan;
  float max;
  bool negative_zero;

  template <class Kind>
  LKV_DEVICE static AnyFp8 of(Kind) {
    return {Kind::mantissa, Kind::bias, Kind::nan, Kind::max, Kind::negative_zero};
  }
};

LKV_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
LKV_DEVICE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Clamps to the finite range and rounds to nearest, ties to even; +-inf becomes +-max.
template <class Kind>
LKV_DEVICE uint8_t encode_fp8(const Kind& kind, float x) {
  const int drop = 23 - kind.mantissa;                                       // mantissa bits to round away
  const uint32_t min_normal = static_cast<uint32_t>(128 - kind.bias) << 23;  // the kind's smallest normal, as fp32 bits
  const uint32_t bits = float_bits(x), sign = bits >> 24 & 0x80;
  uint32_t u = bits & 0x7FFFFFFF;
  if (u > 0x7F800000) return kind.nan;
  if (u > float_bits(kind.max)) u = float_bits(kind.max);
  uint32_t code;
  if (u < min_normal) {
    // The sum's last mantissa bit is worth one subnormal step, so the addition does the rounding.
    const uint32_t step = static_cast<uint32_t>(128 - kind.bias + drop) << 23;
    code = float_bits(add_rn(bits_float(u), bits_float(step))) - step;
  } else {
    u += (uint32_t{1} << (drop - 1)) - 1 + (u >> drop & 1);
    code = (u >> drop) - (static_cast<uint32_t>(127 - kind.bias) << kind.mantissa);
  }
  return static_cast<uint8_t>(code | (kind.negative_zero || code ? sign : 0));
}

// Two values, the first in the low byte. Kinds that the chip has no instruction for share one piece of code, AnyFp8.
template <class Kind>
struct Fp8Encoder {
  static constexpr bool is_native = kEncodesInIntegers;
  LKV_DEVICE static uint16_t encode_pair(const Kind& kind, float low, float high) {
    return static_cast<uint16_t>(encode_fp8(kind, low) | encode_fp8(kind, high) << 8);
  }
};

// The number that a code of eight bits stands for.
template <class Kind>
LKV_DEVICE float decode_fp8(Kind, uint32_t code) {
  const uint32_t magnitude = code & 0x7F, at_place = magnitude << (23 - Kind::mantissa);
  uint32_t bits;
  if constexpr (kKeepsSubnormals) {
    // Exponent and mantissa at fp32's place are too small by the difference of the biases; the product is exact.
    bits = float_bits(mul_rn(bits_float(at_place), bits_float(static_cast<uint32_t>(254 - Kind::bias) << 23)));
  } else {
    // A subnormal is what its mantissa adds to the smallest normal.
    const uint32_t up = static_cast<uint32_t>(127 - Kind::bias) << 23, least = up + (1 << 23);
    const uint32_t subnormal = float_bits(sub_rn(bits_float(at_place + least), bits_float(least)));
    bits = magnitude >> Kind::mantissa ? at_place + up : subnormal;
  }
  if (magnitude >= Kind::infinite) bits |= 0x7F800000;
  if (!Kind::negative_zero && code == Kind::nan) bits = 0x7FC00000;
  return bits_float(bits | (code & 0x80) << 24);
}

// The reverse of an encoder: the first value is the low byte's.
template <class Kind>
struct Fp8Decoder {
  LKV_DEVICE static void decode_pair(uint16_t codes, float& low, float& high) {
    low = decode_fp8(Kind{}, codes & 0xFF), high = decode_fp8(Kind{}, codes >> 8);
  }
};

// x / scale, correctly rounded, for many x. A GPU's division is a long sequence with a branch in it, while divisions by
// one number can share its reciprocal: with y = RN(1/s), q0 = RN(x y) is off by less than two ulps, q1 = q0 + r0 y is a
// faithful quotient and q2 = q1 + r1 y the correctly rounded one, r = x - q s being exact (Markstein 1990; Muller et
// al., Handbook of Floating-Point Arithmetic, division with FMA). A power of two keeps s, and a clamp x, where no step
// leaves the normal range for any quotient that fp8 tells from zero and from its maximum.
class Quotient {
 public:
  Quotient() = default;
  LKV_DEVICE explicit Quotient(float scale) : sign_(float_bits(scale) & 0x80000000) {
    const float s = bits_float(float_bits(scale) & 0x7FFFFFFF);
    shift_ = s < 0x1p-60f ? 0x1p96f : s > 0x1p60f ? 0x1p-64f : 1.f;
    scale_ = kDividesByReciprocal ? mul_rn(s, shift_) : scale;
    reciprocal_ = kDividesByReciprocal ? rcp_rn(scale_) : 0.f;
    limit_ = mul_rn(scale_, 0x1p17f);
    regular_ = s > 0.f && s <= 0x1.fffffep127f;
  }
  LKV_DEVICE float of(float x) const {
    if constexpr (!kDividesByReciprocal) return div_rn(x, scale_);
    const float magnitude = bits_float(float_bits(x) & 0x7FFFFFFF), a = min(mul_rn(magnitude, shift_), limit_);
    const float q0 = mul_rn(a, reciprocal_);
    const float q1 = fma_rn(fma_rn(-q0, scale_, a), reciprocal_, q0);
    const float q2 = fma_rn(fma_rn(-q1, scale_, a), reciprocal_, q1);
    // A NaN, which the clamp swallows, and the scales 0, inf and NaN need no rounding: there the product is the
    // quotient.
    const float q = regular_ && x == x ? q2 : mul_rn(magnitude, reciprocal_);
    return bits_float(float_bits(q) | ((float_bits(x) ^ sign_) & 0x80000000));
  }

 private:
  uint32_t sign_;
  float scale_, shift_, reciprocal_, limit_;
  bool regular_;
};

}  // namespace latentkv
