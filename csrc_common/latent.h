// What becomes of a latent vector on its way into the cache: RMSNorm, tiles with scales of their own. A lane takes
// eight elements at a time, as RMSNorm's order of summation has them.
#pragma once

#include "params.h"

namespace latentkv {

// Eight elements, or what they are stored as, go to and from memory in pieces, of which each is one access: as many
// bytes as n elements have. The last eight of a vector of `dim` may lack pieces, which then are zero.
template <class A>
using Eight = Chunk<A, 8>;

template <class A, int n>
LKV_DEVICE Eight<A> load_eight(const char* from, int i, int dim) {
  constexpr int bytes = n * A::bytes;
  Eight<A> eight{};
  LKV_UNROLL
  for (int k = 0; k < 8 / n; ++k) {
    if (n < 8 && 8 * i + k * n >= dim) break;
    const Bits<bytes> piece = load<bytes>(from + 8 * A::bytes * i + k * bytes);
    if constexpr (bytes < 4) {
      eight.w[k * bytes / 4] |= uint32_t{piece.w[0]} << (k * bytes % 4 * 8);
    } else {
      LKV_UNROLL
      for (int j = 0; j < bytes / 4; ++j) eight.w[k * bytes / 4 + j] = piece.w[j];
    }
  }
  return eight;
}
template <int n, int all>
LKV_DEVICE void store_eight(char* to, const Bits<all>& codes, int i, int dim) {
  constexpr int bytes = n * all / 8;
  if constexpr (n == 8) {  // without a loop, which costs clang the hint of store_row where it has one turn
    store_row(to + all * i, codes);
  } else {
    LKV_UNROLL
    for (int k = 0; k < 8 / n; ++k) {
      if (8 * i + k * n < dim) store_row(to + all * i + k * bytes, piece_of<bytes>(codes, k));
    }
  }
}

// The sum of squares of a vector, in one order everywhere: element i belongs to partial (i / 8) % 32, which sums in
// rising i; then the 32 are halved: 16 sums of two, 8, 4, 2, 1. A GPU's lane is a partial (lanes that are not there
// would add zeros), the CPU's one lane has all of them.
class SumOfSquares {
 public:
  template <class A>
  LKV_DEVICE void add(const Eight<A>& eight, int i) {
    float x[8];
    to_floats<A, 8>(eight, x);
    float& partial = partial_[i % kOwn];
    LKV_UNROLL
    for (int k = 0; k < 8; ++k) partial = add_rn(partial, mul_rn(x[k], x[k]));
  }
  LKV_DEVICE float total(const Group& group) {
    LKV_UNROLL
    for (int half = kOwn / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) partial_[i] = add_rn(partial_[i], partial_[i + half]);
    }
    return group_sum(partial_[0], group);
  }

 private:
  static constexpr int kOwn = 32 >> kMaxLog2Lanes;  // partials of a lane
  float partial_[kOwn] = {};
};

// out = (x * s) * weight, s = 1 / sqrt(sum of squares / L + eps), every step rounded.
LKV_DEVICE float inverse_rms(const Norm& norm, float sum) {
  const float mean = norm.inverse_dim ? mul_rn(sum, norm.inverse_dim) : div_rn(sum, norm.dim);
  return rcp_rn(sqrt_rn(add_rn(mean, norm.eps)));
}
template <class A, class W>
LKV_DEVICE Eight<A> normalised(const Eight<A>& eight, float s, const Eight<W>& weight) {
  float x[8], w[8];
  to_floats<A, 8>(eight, x);
  to_floats<W, 8>(weight, w);
  LKV_UNROLL
  for (int k = 0; k < 8; ++k) x[k] = mul_rn(mul_rn(x[k], s), w[k]);
  return from_floats<A, 8>(x);
}

LKV_DEVICE float power_of_two_above(float x) {
  return bits_float((float_bits(x) + 0x7FFFFF) & 0xFF800000);
}
// The scale of a tile, by the bits of its greatest magnitude: max(amax / 448, 1e-4), raised to a power of two. 448 is
// 1.75 * 2^8, so a mantissa above 1.75 carries into the exponent; the quotient's rounding cannot hide that.
LKV_DEVICE float tile_scale(uint32_t amax) {
  const int32_t bits = static_cast<int32_t>((amax + 0x1FFFFF) & 0xFF800000) - (8 << 23);
  const int32_t least = 114 << 23;  // 2^-13, the first power of two above 1e-4
  return bits_float(amax >= 0x7F800000 ? amax : static_cast<uint32_t>(max(bits, least)));
}
// Exact; that of infinity is 0.
LKV_DEVICE float reciprocal_of_power(float x) {
  return bits_float(static_cast<uint32_t>(max(0x7F000000 - static_cast<int32_t>(float_bits(x)), 0)));
}

// The bits of the greatest magnitude among n values; a NaN does not count. They compare like the values.
template <int n>
LKV_DEVICE uint32_t greatest_magnitude(const float* x) {
  uint32_t amax = 0;
  LKV_UNROLL
  for (int i = 0; i < n; ++i) {
    const uint32_t magnitude = float_bits(x[i]) & 0x7FFFFFFF;
    amax = magnitude > 0x7F800000 ? amax : max(amax, magnitude);
  }
  return amax;
}

// Stores the `held` eights of a lane, the first of them eight i of the vector and the next `group.lanes` further, up to
// `end`, as tiles of e4m3fn with a power of two for a scale. A tile's eights lie in neighbouring lanes, or all in one.
template <class A, int n, int tile, class Kind, int held>
LKV_DEVICE void store_tiles(const Kind& kind, const Eight<A> (&x)[held], int i, int end, int dim, char* row,
                            char* scales, const Group& group) {
  constexpr int eights = tile / 8, lanes = eights < 1 << kMaxLog2Lanes ? eights : 1 << kMaxLog2Lanes;
  constexpr int own = eights / lanes, tiles = held / own;
  uint32_t amax[tiles];
  LKV_UNROLL
  for (int t = 0; t < tiles; ++t) {
    amax[t] = 0;
    LKV_UNROLL
    for (int j = 0; j < own; ++j) {
      float values[8];
      to_floats<A, 8>(x[t * own + j], values);
      if (i + t * own * group.lanes < end) amax[t] = max(amax[t], greatest_magnitude<8>(values));
    }
    amax[t] = group_max<lanes>(amax[t]);
  }
  LKV_UNROLL
  for (int t = 0; t < tiles; ++t) {
    const int first = i + t * own * group.lanes;
    if (first >= end) continue;
    const float scale = tile_scale(amax[t]);
    const Factor inverse{reciprocal_of_power(scale)};
    int j = 0;  // at least one: see store_eight
    LKV_UNROLL
    do store_eight<n>(row, encode<A, 8>(kind, x[t * own + j], inverse), first + j, dim);
    while (++j < own);
    if (first % eights != 0) continue;
    if constexpr (tile == 128) {
      store(scales + 4 * (first / eights), Bits<4>{float_bits(scale)});
    } else {
      store(scales + first / eights, Bits<1>{static_cast<uint8_t>(float_bits(scale) >> 23)});
      if (first == 0) store(scales + dim / tile, Bits<1>{0});  // the byte that pads seven scales to eight
    }
  }
}

}  // namespace latentkv
