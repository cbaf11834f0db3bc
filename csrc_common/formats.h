// Activations and what they are stored as: the dtypes that come in, the codes of elements, the formats of rows.
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
// Piece k of some bits.
template <int bytes, int all>
LKV_DEVICE Bits<bytes> piece_of(const Bits<all>& bits, int k) {
  Bits<bytes> piece;
  if constexpr (bytes < 4) {
    piece.w[0] = static_cast<typename Bits<bytes>::Word>(bits.w[k * bytes / 4] >> (k * bytes % 4 * 8));
  } else {
    LKV_UNROLL
    for (int i = 0; i < bytes / 4; ++i) piece.w[i] = bits.w[k * bytes / 4 + i];
  }
  return piece;
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

// n activations of dtype A, or codes of an fp8 kind.
template <class A, int n>
using Chunk = Bits<A::bytes * n>;

template <class A, int n>
LKV_DEVICE void to_floats(const Bits<A::bytes * n>& chunk, float* out) {
  if constexpr (A::bytes == 4) {
    LKV_UNROLL
    for (int i = 0; i < n; ++i) out[i] = bits_float(chunk.w[i]);
  } else if constexpr (A::bytes == 1) {
    LKV_UNROLL
    for (int i = 0; i < n; i += 2) {
      Fp8Decoder<A>::decode_pair(static_cast<uint16_t>(chunk.w[i / 4] >> (i % 4 * 8)), out[i], out[i + 1]);
    }
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

// How an element is stored: as the activation that it is, or converted to fp8.
enum class Code : uint8_t { verbatim, e4m3fn, e4m3fnuz, e5m2 };

inline Code code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn: return Code::e4m3fn;
    case ScalarType::Float8_e4m3fnuz: return Code::e4m3fnuz;
    case ScalarType::Float8_e5m2: return Code::e5m2;
    default: return Code::verbatim;
  }
}

// Calls f with what a code stands for: Verbatim (which it is where all is copied), a kind that the chip has an
// instruction for, or AnyFp8.
struct Verbatim {};
template <bool copies, class F>
LKV_DEVICE void with_code(Code code, const F& f) {
  if constexpr (copies) {
    f(Verbatim{});
  } else {
    if (code == Code::verbatim) return f(Verbatim{});
    AnyFp8 any;
    const auto with = [&](auto kind) LKV_INLINE {
      if constexpr (Fp8Encoder<decltype(kind)>::is_native) {
        f(kind);
        return true;
      } else {
        any = AnyFp8::of(kind);
        return false;
      }
    };
    if (code == Code::e4m3fn ? with(E4M3FN{}) : code == Code::e4m3fnuz ? with(E4M3FNUZ{}) : with(E5M2{})) return;
    if constexpr (!kEncodesInIntegers) f(any);
  }
}

// x * factor before it becomes an fp8 code, where a Quotient is x / scale.
struct Factor {
  float factor;
  LKV_DEVICE float of(float x) const { return mul_rn(x, factor); }
};

template <class A, class Kind>
constexpr int kCodeBytes = std::is_same_v<Kind, Verbatim> ? A::bytes : 1;

// What n elements are stored as.
template <class A, int n, class Kind, class Scale>
LKV_DEVICE Bits<n * kCodeBytes<A, Kind>> encode(const Kind& kind, const Chunk<A, n>& x, const Scale& scale) {
  if constexpr (std::is_same_v<Kind, Verbatim>) {
    return x;
  } else {
    const auto pair = [&](float low, float high)
                          LKV_INLINE { return uint32_t{Fp8Encoder<Kind>::encode_pair(kind, low, high)}; };
    float q[n + n % 2] = {};
    to_floats<A, n>(x, q);
    LKV_UNROLL
    for (int i = 0; i < n; ++i) q[i] = scale.of(q[i]);
    Bits<n> codes;
    if constexpr (n == 1) {
      codes.w[0] = static_cast<uint8_t>(pair(q[0], 0.f));
    } else {
      LKV_UNROLL
      for (int i = 0; i < n; i += 4) codes.w[i / 4] = pair(q[i], q[i + 1]) | pair(q[i + 2], q[i + 3]) << 16;
    }
    return codes;
  }
}

// What the host knows of a format. A packed one has dimensions of its own, for bf16 activations: the latent vector is
// e4m3fn in tiles, each of them with a scale, and the rope key stays bf16.
struct FormatInfo {
  const char* name;
  ScalarType type;  // torch's own dtype for it; where `bytes_too`, uint8 may stand in
  Code code;        // of the latent vector
  bool bytes_too = false;
  int row_bytes = 0, tile = 0, latent_dim = 0, rope_dim = 0;  // of a packed format
  bool footed = false;                                        // a block holds its rows, then their scales

  int bytes() const { return code == Code::verbatim ? (type == ScalarType::Float ? 4 : 2) : 1; }
};
inline constexpr FormatInfo kFormats[] = {
    {"bf16", ScalarType::BFloat16, Code::verbatim},
    {"fp16", ScalarType::Half, Code::verbatim},
    {"fp32", ScalarType::Float, Code::verbatim},
    {"fp8_e4m3fn", ScalarType::Float8_e4m3fn, Code::e4m3fn, true},
    {"fp8_e4m3fnuz", ScalarType::Float8_e4m3fnuz, Code::e4m3fnuz, true},
    {"fp8_e5m2", ScalarType::Float8_e5m2, Code::e5m2, true},
    {"fp8_ds_mla", ScalarType::Byte, Code::e4m3fn, false, 656, 128, 512, 64},
    {"fp8_model1", ScalarType::Byte, Code::e4m3fn, false, 584, 64, 448, 64, true},
};
// The key of an indexer, which is no latent row.
inline constexpr FormatInfo kIndexerFormat{"indexer", ScalarType::Byte, Code::e4m3fn, false, 132, 128, 128, 0, true};

}  // namespace latentkv
