// The MLA cache update in one launch: rotate the query heads and the shared rope key, and write each token's latent
// vector and rotated key into its row of a paged cache. In place, the rotated heads go back where they came from; the
// decode prologue puts the query together elsewhere, and may normalise the latent vector on the way.
#pragma once

#include <algorithm>

#include "latent.h"
#include "prepare.h"
#include "rope.h"

namespace latentkv {

// A: activation dtype. n: elements of a chunk, 16 bytes of them or 1. angle_bytes: of a table entry, or 0 where kernels
// for either width would not be worth their compile time. copies: whether all is stored as it is, which asks for less
// code.
//
// A small batch is all latency, so whatever can be asked for goes out at once: slot, position, scale and activations.
// What the angles need is at hand when the position arrives; a row that turns out dead has only been read.
template <class A, int n, int angle_bytes, bool copies, bool is_prologue>
struct CacheUpdate {
  static constexpr int kParts = is_prologue ? 4 : 3;
  std::conditional_t<is_prologue, PrologueParams, Params> p;

  // The parts: the latent vectors, the key heads, the query heads, the query's latent parts.
  template <int part>
  LKV_DEVICE void run(Group group) const {
    if constexpr (part == 0) {
      latent(group);
    } else if constexpr (part == 1) {
      key(group);
    } else if constexpr (part == 3) {
      nope(group);
    } else if constexpr (is_prologue) {
      move_query(group);
    } else {
      turn_query(group);
    }
  }

  // What is done for one token. Not alive is one whose slot or position lies outside, or which is padding: a query
  // that goes elsewhere is zero there, and nothing else happens.
  struct Plan {
    bool alive = false, rotate = false, write = false;
    int64_t position = 0;
    uint32_t slot = 0;
  };
  LKV_DEVICE Plan plan(Indices::Loaded loaded_slot, Indices::Loaded loaded_position) const {
    const int64_t slot = p.writes ? p.slots.value(loaded_slot) : -1, position = p.positions.value(loaded_position);
    const bool in_cache = static_cast<uint64_t>(slot) < p.capacity;
    const bool in_table = static_cast<uint64_t>(position) < static_cast<uint64_t>(p.table.max_position);
    const bool rotates = p.rotates && (in_cache || (slot < 0 && p.rope_masked));
    const bool alive = rotates ? in_table : in_cache || slot < 0;
    return {alive, rotates && alive, in_cache && alive, position, static_cast<uint32_t>(slot)};
  }

  LKV_DEVICE static float value_of(const float* scale) { return scale ? *scale : 1.f; }

  // A group takes the latent vector of one token, or one of its two halves: they share a small batch's conversions.
  LKV_DEVICE void latent(Group group) const {
    const bool halves = kHalvesLatent && p.halves;
    const uint32_t token = halves ? group.index / 2 : group.index;
    wait_for_producer();
    const auto slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = value_of(p.rows.scale);
    const char* const from = p.kv_c + token * p.kv_c_stride;
    const int dim = p.latent_dim;
    constexpr int held = kLatentEights;
    Eight<A> x[held];
    int i = group.lane, end = (dim + 7) / 8;
    const auto load = [&](Eight<A>(&to)[held], const char* vector) LKV_INLINE {
      LKV_UNROLL
      for (int k = 0; k < held; ++k) {
        if (i + k * group.lanes < end) to[k] = load_eight<A, n>(vector, i + k * group.lanes, dim);
      }
    };
    load(x, from);
    [[maybe_unused]] float s = 0;
    [[maybe_unused]] Eight<A> weight[held];
    if constexpr (is_prologue) {
      if (p.norm.weight && !p.norm.weight_is_wide) load(weight, p.norm.weight);
    }
    Quotient quotient;
    if (!copies && p.rows.code != Code::verbatim && !p.rows.tile) quotient = Quotient(scale);
    if constexpr (is_prologue) {
      if (p.norm.weight) s = inverse_rms(p.norm, sum_of_squares(x, from, group));
    }
    const Plan plan = this->plan(slot, position);
    if (is_prologue ? !plan.alive : !plan.write) return;
    if (halves) {  // of two eights, the lane's share is the first or the second
      if (group.index % 2 == 1) i += group.lanes, x[0] = x[1], weight[0] = weight[1];
      end = min(end, i + 1);
    }
    char* const row = p.rows.at(p.rows.latent, plan.slot);
    for (;;) {
      if constexpr (is_prologue) {
        if (p.norm.weight) {
          LKV_UNROLL
          for (int k = 0; k < held; ++k) {
            const int at = i + k * group.lanes;
            if (at >= end) break;
            x[k] = p.norm.weight_is_wide
                       ? normalised<A, Fp32>(x[k], s, load_eight<Fp32, n == 1 ? 1 : 4>(p.norm.weight, at, dim))
                       : normalised<A, A>(x[k], s, weight[k]);
            if (p.kv_c_out) store_eight<n>(p.kv_c_out + token * p.kv_c_out_stride, x[k], at, dim);
          }
        }
      }
      if (plan.write) store_latent(x, i, end, row, quotient, plan.slot, group);
      i += held * group.lanes;
      if (halves || i >= end) return;
      load(x, from);
      if constexpr (is_prologue) {
        if (p.norm.weight && !p.norm.weight_is_wide) load(weight, p.norm.weight);
      }
    }
  }

  template <int held>
  LKV_DEVICE void store_latent(const Eight<A> (&x)[held], int i, int end, char* row, const Quotient& quotient,
                               uint32_t slot, const Group& group) const {
    const int dim = p.latent_dim;
    with_code<copies>(p.rows.code, [&](auto kind) LKV_INLINE {
      using Tiled = std::conditional_t<Fp8Encoder<E4M3FN>::is_native, E4M3FN, AnyFp8>;  // what a tile's kind comes as
      if constexpr (std::is_same_v<A, Bf16> && std::is_same_v<decltype(kind), Tiled>) {
        if (p.rows.tile) {
          char* const scales = p.rows.at(p.rows.scales, slot);
          return p.rows.tile == 128 ? store_tiles<A, n, 128>(kind, x, i, end, dim, row, scales, group)
                                    : store_tiles<A, n, 64>(kind, x, i, end, dim, row, scales, group);
        }
      }
      LKV_UNROLL
      for (int k = 0; k < held; ++k) {
        const int at = i + k * group.lanes;
        if (at < end) store_eight<n>(row, encode<A, 8>(kind, x[k], quotient), at, dim);
      }
    });
  }

  // Of the whole vector, of which the lane holds the first eights.
  template <int held>
  LKV_DEVICE float sum_of_squares(const Eight<A> (&x)[held], const char* from, const Group& group) const {
    const int eights = (p.latent_dim + 7) / 8;
    SumOfSquares sum;
    int i = group.lane;
    LKV_UNROLL
    for (int k = 0; k < held; ++k, i += group.lanes) {
      if (i < eights) sum.add<A>(x[k], i);
    }
    for (; i < eights; i += group.lanes) sum.add<A>(load_eight<A, n>(from, i, p.latent_dim), i);
    return sum.total(group);
  }

  // Heads are turned by pairs of chunks R/2 elements apart: NeoX pairs lie across the two, GPT-J pairs within each. So
  // one lane owns both members of every pair, and both styles read and write the same addresses.
  struct Two {
    Chunk<A, n> a, b;
  };
  struct Places {  // the elements at which they begin
    int a, b;
  };
  LKV_DEVICE Places places(int c) const { return {first_of_pair<n>(p.table, c), second_of_pair<n>(p.table, c)}; }
  LKV_DEVICE static Two load_two(const char* head, Places at) {
    return {load<A::bytes * n>(head + at.a * A::bytes), load<A::bytes * n>(head + at.b * A::bytes)};
  }
  LKV_DEVICE static void put_back(char* head, Places at, const Two& x) {
    store(head + at.a * A::bytes, x.a);
    store(head + at.b * A::bytes, x.b);
  }
  template <class Kind, class Scale>
  LKV_DEVICE static void store_two(const Kind& kind, char* to, Places at, const Two& x, const Scale& scale) {
    constexpr int bytes = kCodeBytes<A, Kind>;
    store_row(to + at.a * bytes, encode<A, n>(kind, x.a, scale));
    store_row(to + at.b * bytes, encode<A, n>(kind, x.b, scale));
  }
  // Calls f with the style of the pairs, known where it is compiled.
  template <class F>
  LKV_DEVICE void with_style(const F& f) const {
    if (n == 1 || p.table.is_neox) {
      f(true);
    } else {
      f(false);
    }
  }

  // The heads of one token that a group takes.
  struct Share {
    int first_head, count;
    char* first;
  };
  LKV_DEVICE static Share share_of(const HeadPart& heads, uint32_t token, const Group& group) {
    const int first = (group.index - token * heads.groups.d) * heads.group_heads;
    return {first, min(heads.group_heads, heads.count - first),
            heads.data + token * heads.token_stride + first * heads.head_stride};
  }

  // A group turns one key head and writes it into the row. Where there is a cache, there is one key head.
  LKV_DEVICE void key(Group group) const {
    const uint32_t token = p.key.groups.divide(group.index);
    wait_for_producer();
    const auto slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = value_of(p.rows.scale);
    int c = group.lane * n;
    if (c >= p.table.half_dim) return;
    char* const head = share_of(p.key, token, group).first;
    Places at = places(c);
    Two x = load_two(head, at);
    const Plan plan = this->plan(slot, position);
    if (!plan.write && (is_prologue || !plan.rotate)) return;
    for (;;) {
      if (plan.rotate) {
        Angles<n, angle_bytes> angles;
        angles.load(p.table, plan.position, c);
        angles.convert(p.table);
        const auto turn = [&](bool is_neox) LKV_INLINE {
          rotate<A>(x.a, x.b, angles, is_neox);
          if constexpr (!is_prologue) put_back(head, at, x);
        };
        if constexpr (kSharedKeyCode) {
          turn(p.table.is_neox);
        } else {
          with_style(turn);
        }
      }
      if (plan.write) {
        char* const row = p.rows.at(p.rows.rope, plan.slot);
        with_code<copies>(p.rows.rope_code,
                          [&](auto kind) LKV_INLINE { store_two(kind, row, at, x, Quotient(scale)); });
      }
      c += n * group.lanes;
      if (c >= p.table.half_dim) return;
      at = places(c), x = load_two(head, at);
    }
  }

  // A group turns a few query heads of one token where they lie.
  LKV_DEVICE void turn_query(Group group) const {
    const uint32_t token = p.query.groups.divide(group.index);
    wait_for_producer();
    const auto slot = p.slots.load(token), position = p.positions.load(token);
    int c = group.lane * n;
    if (c >= p.table.half_dim) return;
    const Share share = share_of(p.query, token, group);
    const int64_t stride = p.query.head_stride;
    constexpr int batch = kHeadsInFlight;
    Two x[batch];
    Places at = places(c);
    const auto load_heads = [&](const char* head, int left) LKV_INLINE {
      LKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (i < left) x[i] = load_two(head + i * stride, at);  // no break: none waits for the slot
      }
    };
    load_heads(share.first, share.count);
    const Plan plan = this->plan(slot, position);
    if (!plan.rotate) return;
    for (;;) {
      Angles<n, angle_bytes> angles;
      angles.load(p.table, plan.position, c);
      angles.convert(p.table);
      char* head = share.first;
      for (int left = share.count;;) {
        with_style([&](bool is_neox) LKV_INLINE {
          LKV_UNROLL
          for (int i = 0; i < batch; ++i) {
            if (i < left) {
              rotate<A>(x[i].a, x[i].b, angles, is_neox);
              put_back(head + i * stride, at, x[i]);
            }
          }
        });
        left -= batch;
        if (kMaxGroupHeads <= batch || left <= 0) break;
        head += batch * stride;
        load_heads(head, left);
      }
      c += n * group.lanes;
      if (c >= p.table.half_dim) return;
      at = places(c);
      load_heads(share.first, share.count);
    }
  }

  // A group turns a few query heads of one token on their way elsewhere: zeros where the token is not alive.
  LKV_DEVICE void move_query(Group group) const {
    const uint32_t token = p.query.groups.divide(group.index);
    wait_for_producer();
    const bool present = token < p.tokens;
    Indices::Loaded slot{}, position{};
    if (present) slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = value_of(p.query_scale);
    int c = group.lane * n;
    if (c >= p.table.half_dim) return;
    const Share share = share_of(p.query, token, group);
    Two x;
    Places at = places(c);
    if (present) x = load_two(share.first, at);
    const Plan plan = present ? this->plan(slot, position) : Plan{};
    for (;;) {
      Angles<n, angle_bytes> angles;
      if (plan.rotate) angles.load(p.table, plan.position, c);
      // While the angles are on their way.
      Factor factor{0.f};
      if (!copies && plan.alive) factor.factor = rcp_rn(scale);
      if (plan.rotate) angles.convert(p.table);
      const char* head = share.first;
      for (int h = 0;;) {
        if (plan.rotate) {
          with_style([&](bool is_neox) LKV_INLINE { rotate<A>(x.a, x.b, angles, is_neox); });
        } else if (!plan.alive) {
          x = {};
        }
        char* const to = p.rope_out + token * p.rope_token_stride + (share.first_head + h) * p.rope_head_stride;
        with_code<copies>(p.query_code, [&](auto kind) LKV_INLINE { store_two(kind, to, at, x, factor); });
        ++h;
        if (kMaxGroupHeads == 1 || h >= share.count) break;
        head += p.query.head_stride;
        if (present) x = load_two(head, at);
      }
      c += n * group.lanes;
      if (c >= p.table.half_dim) return;
      at = places(c);
      if (present) x = load_two(share.first, at);
    }
  }

  // A group copies the latent parts of a few heads of one token. Those that are there already only become zero where
  // the token is not alive, and a group has all heads.
  LKV_DEVICE void nope(Group group) const {
    const uint32_t token = p.nope.groups.divide(group.index);
    wait_for_producer();
    const bool present = token < p.tokens, moves = p.nope_from != nullptr;
    Indices::Loaded slot{}, position{};
    if (present) slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = value_of(p.query_scale);
    const int first_head = (group.index - token * p.nope.groups.d) * p.nope.group_heads;
    const int count = min(p.nope.group_heads, p.nope.count - first_head), step = n * group.lanes;
    const char* const from = p.nope_from + token * p.nope_from_token_stride + first_head * p.nope_from_head_stride;
    char* const to = p.nope.data + token * p.nope.token_stride + first_head * p.nope.head_stride;
    constexpr int batch = kHeadsInFlight, held = 2;  // chunks of each head
    Chunk<A, n> x[batch][held];
    int h = 0, c = group.lane * n;
    const auto each = [&](const auto& f) LKV_INLINE {
      LKV_UNROLL
      for (int j = 0; j < batch; ++j) {
        LKV_UNROLL
        for (int k = 0; k < held; ++k) {
          if (h + j < count && c + k * step < p.latent_dim) f(x[j][k], h + j, c + k * step);
        }
      }
    };
    const auto load_chunks = [&]() LKV_INLINE {
      if (!present || !moves) return;
      each([&](Chunk<A, n>& chunk, int head, int at)
               LKV_INLINE { chunk = load<A::bytes * n>(from + head * p.nope_from_head_stride + at * A::bytes); });
    };
    load_chunks();
    const Plan plan = present ? this->plan(slot, position) : Plan{};
    if (plan.alive && !moves) return;
    const Factor factor{!copies && plan.alive ? rcp_rn(scale) : 0.f};
    for (;;) {
      if (!plan.alive) {
        each([&](Chunk<A, n>& chunk, int, int) LKV_INLINE { chunk = {}; });
      }
      with_code<copies>(p.query_code, [&](auto kind) LKV_INLINE {
        each([&](const Chunk<A, n>& chunk, int head, int at) LKV_INLINE {
          constexpr int bytes = kCodeBytes<A, decltype(kind)>;
          store_row(to + head * p.nope.head_stride + at * bytes, encode<A, n>(kind, chunk, factor));
        });
      });
      c += held * step;
      if (c >= p.latent_dim) c = group.lane * n, h += batch;
      if (h >= count) return;
      load_chunks();
    }
  }
};

// Puts what was prepared on the current stream.
template <bool is_prologue>
void launch_update(const Update& x) {
  constexpr int parts = is_prologue ? 4 : 3;
  Grid<parts> grid;
  std::copy_n(x.grid.part, parts, grid.part);
  dispatch(x.activation, x.aligned, [&]<class A, int n>() {
    const auto with = [&]<int angle_bytes, bool copies>() {
      launch(CacheUpdate<A, n, angle_bytes, copies, is_prologue>{{x.params}}, grid, x.device);
    };
    const auto with_angles = [&]<int angle_bytes>() {
      if constexpr (n > 1) {
        if (x.copies) return with.template operator()<angle_bytes, true>();
      }
      with.template operator()<angle_bytes, false>();
    };
    if constexpr (n == 1 || A::bytes == 4) {
      with_angles.template operator()<0>();
    } else {
      x.params.table.is_wide ? with_angles.template operator()<4>() : with_angles.template operator()<2>();
    }
  });
}

}  // namespace latentkv
