// Rotation of pairs (RoFormer, arXiv:2104.09864) in fp32: every product and sum is rounded by itself.
#pragma once

#include "params.h"

namespace latentkv {

// cos and sin of a lane's n pairs, from a table of `bytes` per angle; 0: of as many as the table says. GPT-J takes n/2
// pairs from either chunk of a lane, so its angles lie in two runs; NeoX's happen to meet. `load` only loads, so that
// more can be done before `convert` waits.
template <int n, int bytes>
struct Angles {
  static constexpr int run = n == 1 ? 1 : n / 2, runs = n / run;
  float cos[n], sin[n];

  LKV_DEVICE void load(const Table& t, int64_t position, int c) {
    if constexpr (bytes > 0) {
      load<bytes>(t, position, c);
    } else if (t.is_wide) {
      load<4>(t, position, c);
    } else {
      load<2>(t, position, c);
    }
  }
  LKV_DEVICE void convert(const Table& t) {
    if constexpr (bytes == 4) {
      convert<Fp32>();
    } else if constexpr (bytes == 2) {
      convert_short(t);
    } else if (t.is_wide) {
      convert<Fp32>();
    } else {
      convert_short(t);
    }
    if (t.inverse) {
      LKV_UNROLL
      for (int i = 0; i < n; ++i) sin[i] = -sin[i];
    }
  }

 private:
  Bits<(bytes ? bytes : 4) * run> raw_[2 * runs];

  template <int width>
  LKV_DEVICE void load(const Table& t, int64_t position, int c) {
    const char* const row = t.data + position * t.stride + (c >> t.angle_shift) * width;
    LKV_UNROLL
    for (int i = 0; i < runs; ++i) {
      keep(raw_[i], latentkv::load<width * run>(row + i * t.angle_step * width));
      keep(raw_[runs + i], latentkv::load<width * run>(row + (i * t.angle_step + t.half_dim) * width));
    }
  }
  template <int width>
  LKV_DEVICE static void keep(Bits<(bytes ? bytes : 4) * run>& raw, const Bits<width>& angles) {
    if constexpr (sizeof raw == width) {
      raw = angles;
    } else {
      static_assert(width <= 4);
      raw.w[0] = angles.w[0];
    }
  }
  LKV_DEVICE void convert_short(const Table& t) {
    if (t.is_bf16) {
      convert<Bf16>();
    } else {
      convert<Fp16>();
    }
  }
  template <class T>
  LKV_DEVICE void convert() {
    LKV_UNROLL
    for (int i = 0; i < runs; ++i) {
      to_floats<T, run>(piece_of<T::bytes * run>(raw_[i], 0), cos + i * run);
      to_floats<T, run>(piece_of<T::bytes * run>(raw_[runs + i], 0), sin + i * run);
    }
  }
};

LKV_DEVICE void turn(float& x, float& y, float cos, float sin) {
  const float turned = sub_rn(mul_rn(x, cos), mul_rn(y, sin));
  y = add_rn(mul_rn(y, cos), mul_rn(x, sin));
  x = turned;
}

// Two chunks, R/2 elements apart, which hold whole pairs of either style: NeoX pairs lie across them, GPT-J pairs
// within each. Where a chunk is one element, the two are a pair.
template <class A, int n, int angle_bytes>
LKV_DEVICE void rotate(Chunk<A, n>& a, Chunk<A, n>& b, const Angles<n, angle_bytes>& angles, bool is_neox) {
  float x[n], y[n];
  to_floats<A, n>(a, x);
  to_floats<A, n>(b, y);
  if (n == 1 || is_neox) {
    LKV_UNROLL
    for (int i = 0; i < n; ++i) turn(x[i], y[i], angles.cos[i], angles.sin[i]);
  } else {
    LKV_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      turn(x[2 * i], x[2 * i + 1], angles.cos[i], angles.sin[i]);
      turn(y[2 * i], y[2 * i + 1], angles.cos[n / 2 + i], angles.sin[n / 2 + i]);
    }
  }
  a = from_floats<A, n>(x);
  b = from_floats<A, n>(y);
}

// The elements at which the two chunks of lane position c begin.
template <int n>
LKV_DEVICE int first_of_pair(const Table& t, int c) {
  return n == 1 && !t.is_neox ? 2 * c : c;
}
template <int n>
LKV_DEVICE int second_of_pair(const Table& t, int c) {
  return n == 1 && !t.is_neox ? 2 * c + 1 : t.half_dim + c;
}

}  // namespace latentkv
