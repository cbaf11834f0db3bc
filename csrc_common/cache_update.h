// The MLA cache update in one launch: rotate the query heads and the shared rope key, and write each token's latent
// vector and rotated key into its row of a paged cache. In place, the rotated heads go back where they came from; the
// decode prologue puts the query together elsewhere, and may normalise the latent vector on the way.
#pragma once

#include <algorithm>

#include "latent.h"
#include "prepare.h"
#include "rope.h"

namespace latentkv {

// A: activation dtype. n: elements of a chunk, 16 bytes of them or 1. angle_bytes: of a table entry. copies: whether
// all is stored as it is, which asks for less code.
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
    } else if constexpr (part < 3) {
      heads<part == 1>(group);
    } else {
      nope(group);
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

  // A group takes the latent vector of one token, or one of its two halves: they share a small batch's conversions.
  LKV_DEVICE void latent(Group group) const {
    const bool halves = kHalvesLatent && p.halves;
    const uint32_t token = halves ? group.index / 2 : group.index;
    wait_for_producer();
    const auto slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = p.rows.scale ? *p.rows.scale : 1.f;
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

  // A group turns a few heads of one token. A lane holds two chunks R/2 elements apart: NeoX pairs lie across them,
  // GPT-J pairs within each. So one lane owns both members of every pair, and both styles read and write the same
  // addresses.
  template <bool is_key>
  LKV_DEVICE void heads(Group group) const {
    constexpr bool moves = is_prologue && !is_key;  // the heads go elsewhere, zeros where a token is not alive
    const HeadPart& heads = is_key ? p.key : p.query;
    const uint32_t token = heads.groups.divide(group.index);
    wait_for_producer();
    const bool present = !moves || token < p.tokens;
    Indices::Loaded slot{}, position{};
    if (present) slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = scale_of<is_key>();

    int c = group.lane * n;
    if (c >= p.table.half_dim) return;
    const int first_head = (group.index - token * heads.groups.d) * heads.group_heads;
    const int count = min(heads.group_heads, heads.count - first_head);
    const int64_t stride = heads.head_stride;
    char* const first = heads.data + token * heads.token_stride + first_head * stride;
    constexpr int batch = is_key || moves ? 1 : kHeadsInFlight;  // a group has one key head
    Chunk<A, n> a[batch], b[batch];
    int at_a, at_b;
    const auto load_heads = [&](const char* head, int left) {
      LKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (i < left) {  // no break: each load has its condition, and none waits for the slot
          a[i] = load<A::bytes * n>(head + i * stride + at_a * A::bytes);
          b[i] = load<A::bytes * n>(head + i * stride + at_b * A::bytes);
        }
      }
    };
    const auto seek = [&] {
      at_a = first_of_pair<n>(p.table, c), at_b = second_of_pair<n>(p.table, c);
      load_heads(first, present ? count : 0);
    };
    seek();
    const Plan plan = present ? this->plan(slot, position) : Plan{};
    if (is_key && !plan.write && (is_prologue || !plan.rotate)) return;
    if (!is_prologue && !is_key && !plan.rotate) return;
    for (;;) {
      Angles<n, angle_bytes> angles;
      if (plan.rotate) angles.load(p.table, plan.position, c);
      // While the angles are on their way.
      [[maybe_unused]] Factor factor{0.f};
      if (moves && !copies && plan.alive) factor.factor = rcp_rn(scale);
      if (plan.rotate) angles.convert(p.table);
      char* head = first;
      for (int h = 0;;) {
        const int some = min(batch, count - h);
        const auto rotate_some = [&](bool is_neox) LKV_INLINE {
          LKV_UNROLL
          for (int i = 0; i < batch; ++i) {
            if (i < some) {
              rotate<A>(a[i], b[i], angles, is_neox);
              if constexpr (!is_prologue) {
                store(head + i * stride + at_a * A::bytes, a[i]);
                store(head + i * stride + at_b * A::bytes, b[i]);
              }
            }
          }
        };
        if (!plan.rotate) {
          if (moves && !plan.alive) {
            LKV_UNROLL
            for (int i = 0; i < batch; ++i) a[i] = b[i] = {};
          }
        } else if constexpr (is_key && kSharedKeyCode) {
          rotate_some(p.table.is_neox);
        } else if (n == 1 || p.table.is_neox) {
          rotate_some(true);
        } else {
          rotate_some(false);
        }
        if constexpr (moves) {
          char* const to = p.rope_out + token * p.rope_token_stride + (first_head + h) * p.rope_head_stride;
          with_code<copies>(p.query_code, [&](auto kind) LKV_INLINE {
            store_heads(kind, to, p.rope_head_stride, some, at_a, at_b, a, b, factor);
          });
        }
        h += batch;
        if (is_key || kMaxGroupHeads <= batch || h >= count) break;
        head += batch * stride;
        load_heads(head, present ? count - h : 0);
      }
      if constexpr (is_key) {
        if (plan.write) {  // there is one key head, where there is a cache
          char* const row = p.rows.at(p.rows.rope, plan.slot);
          with_code<copies>(p.rows.rope_code, [&](auto kind) LKV_INLINE {
            store_heads(kind, row, 0, 1, at_a, at_b, a, b, Quotient(scale));
          });
        }
      }
      c += n * group.lanes;
      if (c >= p.table.half_dim) return;
      seek();
    }
  }

  template <class Kind, int batch, class Scale>
  LKV_DEVICE static void store_heads(const Kind& kind, char* to, int64_t stride, int count, int at_a, int at_b,
                                     const Chunk<A, n> (&a)[batch], const Chunk<A, n> (&b)[batch], const Scale& scale) {
    constexpr int bytes = kCodeBytes<A, Kind>;
    LKV_UNROLL
    for (int i = 0; i < batch; ++i) {
      if (i < count) {
        store_row(to + i * stride + at_a * bytes, encode<A, n>(kind, a[i], scale));
        store_row(to + i * stride + at_b * bytes, encode<A, n>(kind, b[i], scale));
      }
    }
  }

  // Of what heads are stored as: the row's for a key, the query's where that may be quantised.
  template <bool is_key>
  LKV_DEVICE float scale_of() const {
    const float* scale = nullptr;
    if constexpr (is_key) {
      scale = p.rows.scale;
    } else if constexpr (is_prologue) {
      scale = p.query_scale;
    }
    return scale ? *scale : 1.f;
  }

  // A group copies the latent parts of a few heads of one token. Those that are there already only become zero where
  // the token is not alive, and a group has all heads.
  LKV_DEVICE void nope(Group group) const {
    const uint32_t token = p.nope.groups.divide(group.index);
    wait_for_producer();
    const bool present = token < p.tokens, moves = p.nope_from != nullptr;
    Indices::Loaded slot{}, position{};
    if (present) slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = scale_of<false>();
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
void launch_update(const Launch& x) {
  constexpr int parts = is_prologue ? 4 : 3;
  Grid<parts> grid;
  std::copy_n(x.grid.part, parts, grid.part);
  dispatch(x.activation, x.aligned, [&]<class A, int n>() {
    const auto with = [&]<int angle_bytes, bool copies>() {
      launch(CacheUpdate<A, n, angle_bytes, copies, is_prologue>{{x.params}}, grid, x.device);
    };
    if constexpr (n > 1) {
      if (x.copies) {
        return x.wide_angles ? with.template operator()<4, true>() : with.template operator()<2, true>();
      }
    }
    x.wide_angles ? with.template operator()<4, false>() : with.template operator()<2, false>();
  });
}

}  // namespace latentkv
