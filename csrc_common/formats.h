// Activations and rows: the dtypes that come in, and the formats that a row may have. A format is one struct that turns
// a chunk of activations into codes, and one line in each of the two tables at the end.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <type_traits>

namespace latentkv {

using torch::headeronly::ScalarType;

// The bits of a few neighbouring elements, read and written in one access of up to 16 bytes.
template <int bytes>
struct alignas(bytes) Bits {
  using Word = std::conditional_t<bytes == 1, uint8_t, std::conditional_t<bytes == 2, uint16_t, uint32_t>>;
  Word w[bytes < 4 ? 1 : bytes / 4];
};
template <int bytes>
LKV_DEVICE Bits<bytes> load(const void* p) {
  return *static_cast<const Bits<bytes>*>(p);
}
template <int bytes>
LKV_DEVICE void store(void* p, const Bits<bytes>& bits) {
  *static_cast<Bits<bytes>*>(p) = bits;
}

// Activation dtypes: their bits to fp32 and back, rounded to nearest even. `pack` and `low`, `high` take two at a time.
struct Bf16 {
  static constexpr int bytes = 2;
  LKV_DEVICE static float low(uint32_t word) { return bits_float(word << 16); }
  LKV_DEVICE static float high(uint32_t word) { return bits_float(word & 0xFFFF0000); }
  LKV_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
};
struct Fp16 {
  static constexpr int bytes = 2;
  LKV_DEVICE static float low(uint32_t word) { return unpack_fp16(static_cast<uint16_t>(word)); }
  LKV_DEVICE static float high(uint32_t word) { return unpack_fp16(static_cast<uint16_t>(word >> 16)); }
  LKV_DEVICE static uint32_t pack(float low, float high) { return pack_fp16(low, high); }
};
struct Fp32 {
  static constexpr int bytes = 4;
};

// n activations of dtype A.
template <class A, int n>
using Chunk = Bits<A::bytes * n>;

template <class A, int n>
LKV_DEVICE void to_floats(const Bits<A::bytes * n>& chunk, float* out) {
  if constexpr (A::bytes == 4) {
    LKV_UNROLL
    for (int i = 0; i < n; ++i) out[i] = bits_float(chunk.w[i]);
  } else if constexpr (n == 1) {
    out[0] = A::low(chunk.w[0]);
  } else {
    LKV_UNROLL
    for (int i = 0; i < n / 2; ++i) out[2 * i] = A::low(chunk.w[i]), out[2 * i + 1] = A::high(chunk.w[i]);
  }
}
template <class A, int n>
LKV_DEVICE Bits<A::bytes * n> from_floats(const float* x) {
  Bits<A::bytes * n> chunk;
  if constexpr (A::bytes == 4) {
    LKV_UNROLL
    for (int i = 0; i < n; ++i) chunk.w[i] = float_bits(x[i]);
  } else if constexpr (n == 1) {
    chunk.w[0] = static_cast<uint16_t>(A::pack(x[0], 0.f));
  } else {
    LKV_UNROLL
    for (int i = 0; i < n / 2; ++i) chunk.w[i] = A::pack(x[2 * i], x[2 * i + 1]);
  }
  return chunk;
}

// 16- and 32-bit rows: a verbatim copy of the activation.
template <class A>
struct Verbatim {
  static constexpr int bytes = A::bytes;
  template <int n>
  LKV_DEVICE static Chunk<A, n> encode(const Chunk<A, n>& x, const Quotient&) {
    return x;
  }
};

// fp8 rows: convert(x / scale).
template <class A, class Kind>
struct Fp8 {
  static constexpr int bytes = 1;
  template <int n>
  LKV_DEVICE static Bits<n> encode(const Chunk<A, n>& x, const Quotient& scale) {
    float q[n + n % 2] = {};
    to_floats<A, n>(x, q);
    LKV_UNROLL
    for (int i = 0; i < n; ++i) q[i] = scale.of(q[i]);
    Bits<n> codes;
    if constexpr (n == 1) {
      codes.w[0] = static_cast<uint8_t>(Fp8Encoder<Kind>::encode_pair(q[0], 0.f));
    } else {
      LKV_UNROLL
      for (int i = 0; i < n; i += 4) {
        codes.w[i / 4] = Fp8Encoder<Kind>::encode_pair(q[i], q[i + 1]) |
                         uint32_t{Fp8Encoder<Kind>::encode_pair(q[i + 2], q[i + 3])} << 16;
      }
    }
    return codes;
  }
};

// What the host knows of a format: its name, torch's own dtype for it, whether uint8 may stand in.
struct FormatInfo {
  const char* name;
  ScalarType type;
  int bytes;
  bool quantised;
};
inline constexpr FormatInfo kFormats[] = {
    {"bf16", ScalarType::BFloat16, 2, false},
    {"fp16", ScalarType::Half, 2, false},
    {"fp32", ScalarType::Float, 4, false},
    {"fp8_e4m3fn", ScalarType::Float8_e4m3fn, 1, true},
    {"fp8_e4m3fnuz", ScalarType::Float8_e4m3fnuz, 1, true},
    {"fp8_e5m2", ScalarType::Float8_e5m2, 1, true},
};

// Calls `f.template operator()<A, Format>()` for an activation dtype and a format.
template <class A, class F>
void dispatch_format(const FormatInfo* format, const F& f) {
  if (!format || !format->quantised) return f.template operator()<A, Verbatim<A>>();
  switch (format->type) {
    case ScalarType::Float8_e4m3fn: return f.template operator()<A, Fp8<A, E4M3FN>>();
    case ScalarType::Float8_e4m3fnuz: return f.template operator()<A, Fp8<A, E4M3FNUZ>>();
    default: return f.template operator()<A, Fp8<A, E5M2>>();
  }
}
template <class F>
void dispatch(ScalarType activation, const FormatInfo* format, const F& f) {
  switch (activation) {
    case ScalarType::BFloat16: return dispatch_format<Bf16>(format, f);
    case ScalarType::Half: return dispatch_format<Fp16>(format, f);
    default: return dispatch_format<Fp32>(format, f);
  }
}

}  // namespace latentkv
