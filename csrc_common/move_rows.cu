// Moves rows: as they are, or from one format into another.
#include "vendor.h"
//
#include "move_rows.h"

#include "latent.h"

namespace latentkv {

// Rows that both sides store alike, `bytes` of them in one access.
template <int bytes>
struct CopyRows {
  static constexpr int kParts = 1;
  static constexpr int kHeld = 4;
  Move p;

  template <int>
  LKV_DEVICE void run(Group group) const {
    wait_for_producer();
    const Move::Plan plan = p.plan(group);
    if (!plan.moves) return;
    const Rows &from = p.from.rows, &to = p.to.rows;
    const int first = p.latent_bytes / bytes, all = first + p.rope_bytes / bytes;  // what is beyond `first` is rope
    const char* const latent = from.latent.at(plan.from.block, plan.from.entry);
    const char* const rope = from.rope.at(plan.from.block, plan.from.entry) - p.latent_bytes;
    char* const latent_to = to.latent.at(plan.to.block, plan.to.entry);
    char* const rope_to = to.rope.at(plan.to.block, plan.to.entry) - p.latent_bytes;
    for (int i = group.lane; i < all; i += kHeld * group.lanes) {
      Bits<bytes> x[kHeld] = {};
      LKV_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        const int at = i + k * group.lanes;
        if (plan.reads && at < all) x[k] = load<bytes>((at < first ? latent : rope) + int64_t{at} * bytes);
      }
      LKV_UNROLL
      for (int k = 0; k < kHeld; ++k) {
        const int at = i + k * group.lanes;
        if (at < all) store_row((at < first ? latent_to : rope_to) + int64_t{at} * bytes, x[k]);
      }
    }
    const char* const scales = from.scales.at(plan.from.block, plan.from.entry);
    char* const scales_to = to.scales.at(plan.to.block, plan.to.entry);
    for (int at = 4 * group.lane; at < p.scale_bytes; at += 4 * group.lanes)
      store(scales_to + at, load<4>(scales + at));
  }
};

// Rows that are stored otherwise on the two sides. Elements become fp32, eight at a time; n is 8, or 1 where they do
// not lie so that eight of them are an access of up to 16 bytes, or two. `bytes`: of what is read an element has as
// many, or less: 2 or 4.
//
// Codes are known when the kernel runs, so that all go through one piece of code, turn by turn: eights of the latent
// vector, then one of the rope key. They are asked for before the first turn.
template <int n, int bytes>
struct ConvertRows {
  static constexpr int kParts = 1;
  static constexpr int kTurns = kConvertTurns, kTaken = kConvertEights;  // of the latent vector; of a turn
  static constexpr int kHeld = kTurns * kTaken;
  template <class A>
  static constexpr int width = n == 1          ? 1
                               : A::bytes == 4 ? 4
                                               : 8;  // elements of an access
  struct Held {
    Bits<4> bits[2 * bytes];  // of eight elements that may be smaller
    float factor;             // of fp8
  };
  Move p;

  template <int>
  LKV_DEVICE void run(Group group) const {
    wait_for_producer();
    const Rows &from = p.from.rows, &to = p.to.rows;
    const float scale = from.scale ? *from.scale : 1.f, to_scale = to.scale ? *to.scale : 1.f;
    const Move::Plan plan = p.plan(group);
    if (!plan.moves) return;
    const char* const latent = from.latent.at(plan.from.block, plan.from.entry);
    const char* const rope = from.rope.at(plan.from.block, plan.from.entry);
    const char* const scales = from.scales.at(plan.from.block, plan.from.entry);
    char* const latent_to = to.latent.at(plan.to.block, plan.to.entry);
    char* const rope_to = to.rope.at(plan.to.block, plan.to.entry);

    const int lane = group.lane, step = kTaken * group.lanes;
    for (int i = lane, c = lane; 8 * (i - lane) < p.latent_dim || 8 * (c - lane) < p.rope_dim;
         i += kTurns * step, c += step) {
      Held x[kTurns + 1][kTaken] = {};  // zeros, where there is nothing to read
      if (plan.reads) {
        LKV_UNROLL
        for (int t = 0; t < kTurns; ++t) load_eights(x[t], latent, from.code, i + t * step, p.latent_dim, group);
        load_eights(x[kTurns], rope, from.rope_code, c, p.rope_dim, group);
        LKV_UNROLL
        for (int t = 0; t <= kTurns; ++t) {
          LKV_UNROLL
          for (int k = 0; k < kTaken; ++k) {
            const int at = i + t * step + k * group.lanes;
            x[t][k].factor = scale;
            if (from.tile && t < kTurns && 8 * at < p.latent_dim) x[t][k].factor = tile_factor(scales, at);
          }
        }
      }
      LKV_ROLLED
      for (int t = 0; t <= kTurns; ++t) {
        const bool is_rope = t == kTurns;
        const int first = is_rope ? c : i + t * step, dim = is_rope ? p.rope_dim : p.latent_dim;
        const Code code = is_rope ? from.rope_code : from.code, to_code = is_rope ? to.rope_code : to.code;
        char* const part = is_rope ? rope_to : latent_to;
        if (8 * (first - lane) < dim) {  // for any lane: they meet in store_tiles
          if (to.tile && !is_rope) {
            store_tiles(x[0], code, first, part, to.scales.at(plan.to.block, plan.to.entry), group);
          } else if (code == to_code && (is_rope || !from.tile) &&
                     (code == Code::verbatim ? p.from.type == p.to.type : scale == to_scale)) {
            store_bits(x[0], code, part, first, dim, group);
          } else {
            store_numbers(x[0], code, to_code, to_scale, part, first, dim, group);
          }
        }
        LKV_UNROLL
        for (int next = 0; next < kTurns; ++next) {
          LKV_UNROLL
          for (int k = 0; k < kTaken; ++k) x[next][k] = x[next + 1][k];
        }
      }
    }
  }

 private:
  // The scale of the tile that has an eight.
  LKV_DEVICE float tile_factor(const char* scales, int eight) const {
    if (p.from.rows.tile == 128) return bits_float(load<4>(scales + eight / 16 * 4).w[0]);
    return bits_float(uint32_t{load<1>(scales + eight / 8).w[0]} << 23);
  }

  // Calls f with an element type of the size of what is read.
  template <class F>
  LKV_DEVICE void with_size(Code code, const F& f) const {
    if (code != Code::verbatim) return f(E4M3FN{});
    f(std::conditional_t<bytes == 4, Fp32, Bf16>{});
  }
  template <class A>
  LKV_DEVICE static Eight<A> eight_of(const Held& held) {
    Eight<A> eight;
    LKV_UNROLL
    for (int i = 0; i < 2 * A::bytes; ++i) eight.w[i] = held.bits[i].w[0];
    return eight;
  }

  LKV_DEVICE void load_eights(Held (&x)[kTaken], const char* part, Code code, int first, int dim,
                              const Group& group) const {
    with_size(code, [&](auto size) LKV_INLINE {
      using A = decltype(size);
      LKV_UNROLL
      for (int k = 0; k < kTaken; ++k) {
        const int at = first + k * group.lanes;
        if (8 * at >= dim) continue;
        const Eight<A> eight = load_eight<A, width<A>>(part, at, dim);
        LKV_UNROLL
        for (int i = 0; i < 2 * A::bytes; ++i) x[k].bits[i].w[0] = eight.w[i];
      }
    });
  }

  LKV_DEVICE void store_bits(const Held (&x)[kTaken], Code code, char* part, int first, int dim,
                             const Group& group) const {
    with_size(code, [&](auto size) LKV_INLINE {
      using A = decltype(size);
      LKV_UNROLL
      for (int k = 0; k < kTaken; ++k) {
        const int at = first + k * group.lanes;
        if (8 * at < dim) store_eight<width<A>>(part, eight_of<A>(x[k]), at, dim);
      }
    });
  }

  LKV_DEVICE void to_numbers(const Held (&x)[kTaken], Code code, Eight<Fp32> (&numbers)[kTaken]) const {
    const auto decode = [&](auto element) LKV_INLINE {
      using A = decltype(element);
      LKV_UNROLL
      for (int k = 0; k < kTaken; ++k) {
        float values[8];
        to_floats<A, 8>(eight_of<A>(x[k]), values);
        if constexpr (A::bytes == 1) {
          LKV_UNROLL
          for (int j = 0; j < 8; ++j) values[j] = mul_rn(values[j], x[k].factor);
        }
        numbers[k] = from_floats<Fp32, 8>(values);
      }
    };
    if (code == Code::e4m3fn) return decode(E4M3FN{});
    if (code == Code::e4m3fnuz) return decode(E4M3FNUZ{});
    if (code == Code::e5m2) return decode(E5M2{});
    if constexpr (bytes == 4) {
      decode(Fp32{});
    } else {
      p.from.type == ScalarType::BFloat16 ? decode(Bf16{}) : decode(Fp16{});
    }
  }

  LKV_DEVICE void store_numbers(const Held (&x)[kTaken], Code code, Code to_code, float scale, char* part, int first,
                                int dim, const Group& group) const {
    Eight<Fp32> numbers[kTaken];
    to_numbers(x, code, numbers);
    const auto each = [&](const auto& store) LKV_INLINE {
      LKV_UNROLL
      for (int k = 0; k < kTaken; ++k) {
        const int at = first + k * group.lanes;
        if (8 * at < dim) store(numbers[k], at);
      }
    };
    with_code<false>(to_code, [&](auto kind) LKV_INLINE {
      if constexpr (std::is_same_v<decltype(kind), Verbatim>) {
        const auto round = [&](auto activation) LKV_INLINE {
          using A = decltype(activation);
          each([&](const Eight<Fp32>& eight, int at) LKV_INLINE {
            float values[8];
            to_floats<Fp32, 8>(eight, values);
            store_eight<width<A>>(part, from_floats<A, 8>(values), at, dim);
          });
        };
        if (p.to.type == ScalarType::BFloat16) return round(Bf16{});
        p.to.type == ScalarType::Half ? round(Fp16{}) : round(Fp32{});
      } else {
        const Quotient quotient(scale);
        each([&](const Eight<Fp32>& eight, int at)
                 LKV_INLINE { store_eight<n>(part, encode<Fp32, 8>(kind, eight, quotient), at, dim); });
      }
    });
  }

  LKV_DEVICE void store_tiles(const Held (&x)[kTaken], Code code, int first, char* row, char* scales,
                              const Group& group) const {
    Eight<Fp32> numbers[kTaken];
    to_numbers(x, code, numbers);
    const int dim = p.latent_dim;
    with_code<false>(Code::e4m3fn, [&](auto kind) LKV_INLINE {
      using Tiled = std::conditional_t<Fp8Encoder<E4M3FN>::is_native, E4M3FN, AnyFp8>;  // what a tile's kind comes as
      if constexpr (std::is_same_v<decltype(kind), Tiled>) {
        p.to.rows.tile == 128
            ? latentkv::store_tiles<Fp32, n, 128>(kind, numbers, first, dim / 8, dim, row, scales, group)
            : latentkv::store_tiles<Fp32, n, 64>(kind, numbers, first, dim / 8, dim, row, scales, group);
      }
    });
  }
};

Side side_of(const Cache& cache) {
  Side side{rows_of(cache), cache.format->tile ? ScalarType::BFloat16 : cache.format->type, {}};
  side.table.blocks = cache.block_size > 0 ? static_cast<uint32_t>(cache.blocks) : 0;
  return side;
}

void use_blocks(Side& side, const Tensor& table) {
  const int64_t columns = table.size(table.dim() - 1);
  side.table.numbers = indices(table);
  side.table.stride = table.dim() == 2 ? table.stride(0) * side.table.numbers.bytes : 0;
  side.table.tokens = static_cast<uint32_t>(std::min<int64_t>(columns * side.rows.block_size.d, INT32_MAX));
}

namespace {

// The bits of everything that the addresses of a part are sums of multiples of.
uint64_t address_bits(const RowPart& part) {
  return reinterpret_cast<uintptr_t>(part.data) | static_cast<uint64_t>(part.block_stride | part.entry_stride);
}

bool stored_alike(const Side& a, const Side& b) {
  if (a.rows.tile || b.rows.tile) return a.rows.tile == b.rows.tile;
  if (a.rows.code != b.rows.code) return false;
  return a.rows.code == Code::verbatim ? a.type == b.type : !a.rows.scale && !b.rows.scale;
}

int64_t element_bytes(Code code, ScalarType type) {
  return code != Code::verbatim ? 1 : type == ScalarType::Float ? 4 : 2;
}

// Whether a row's rope part follows its latent part.
bool in_one_run(const Rows& rows, int latent_bytes) {
  return rows.rope.data == rows.latent.data + latent_bytes && rows.rope.block_stride == rows.latent.block_stride &&
         rows.rope.entry_stride == rows.latent.entry_stride;
}

// Lanes for so many chunks of which one may hold a few, or one each where so few rows leave lanes idle on any GPU.
uint32_t log2_lanes_of(const Move& move, int64_t chunks, int held) {
  return log2_lanes(move.rows <= 2048 ? chunks : (chunks + held - 1) / held);
}

}  // namespace

void launch_move(Move move, int device) {
  const Rows &from = move.from.rows, &to = move.to.rows;
  const auto with = [&]<class Kernel>(int64_t chunks, int held) {
    const uint32_t log2 = log2_lanes_of(move, chunks, held);
    move.parts = Divisor((1u << log2) + 1);
    launch(Kernel{move}, Grid<1>{{{move.rows, log2}}}, device);
  };
  if (stored_alike(move.from, move.to)) {
    const auto bytes = static_cast<int>(element_bytes(from.code, move.from.type));
    move.latent_bytes = from.tile == 128  ? 656  // with scales and rope key
                        : from.tile == 64 ? 576  // with the rope key
                                          : bytes * move.latent_dim;
    move.scale_bytes = from.tile == 64 ? 8 : 0;
    if (!from.tile) {
      move.rope_bytes = bytes * move.rope_dim;
      if (in_one_run(from, move.latent_bytes) && in_one_run(to, move.latent_bytes)) {
        move.latent_bytes += move.rope_bytes, move.rope_bytes = 0;
      }
    }
    uint64_t bits = address_bits(from.latent) | address_bits(to.latent) | move.latent_bytes | move.rope_bytes;
    if (move.rope_bytes) bits |= address_bits(from.rope) | address_bits(to.rope);
    const int64_t all = move.latent_bytes + move.rope_bytes;
    if (bits % 16 == 0) return with.template operator()<CopyRows<16>>(all / 16, CopyRows<16>::kHeld);
    if (bits % 4 == 0) return with.template operator()<CopyRows<4>>(all / 4, CopyRows<4>::kHeld);
    return with.template operator()<CopyRows<1>>(all, CopyRows<1>::kHeld);
  }
  bool aligned = move.latent_dim % 8 == 0 && move.rope_dim % 8 == 0;
  for (const Side* side : {&move.from, &move.to}) {
    const auto fits = [&](const RowPart& part, Code code) {
      return address_bits(part) % std::min<int64_t>(8 * element_bytes(code, side->type), 16) == 0;
    };
    aligned = aligned && fits(side->rows.latent, side->rows.code) &&
              (move.rope_dim == 0 || fits(side->rows.rope, side->rows.rope_code));
  }
  const int64_t eights = (move.latent_dim + 7) / 8;
  const auto convert = [&]<int n, int bytes>() {
    with.template operator()<ConvertRows<n, bytes>>(eights, ConvertRows<n, bytes>::kHeld);
  };
  if (from.code == Code::verbatim && move.from.type == ScalarType::Float) {
    return aligned ? convert.template operator()<8, 4>() : convert.template operator()<1, 4>();
  }
  aligned ? convert.template operator()<8, 2>() : convert.template operator()<1, 2>();
}

}  // namespace latentkv
