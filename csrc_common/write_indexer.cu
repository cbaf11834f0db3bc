// The key of DeepSeek-V3.2's indexer: rotate its first elements, quantise all 128 with one scale, write the row. A
// block of the cache holds its rows' codes, then their scales.
#include "vendor.h"
//
#include "latent.h"
#include "ops.h"
#include "prepare.h"
#include "rope.h"

namespace latentkv {

constexpr int kIndexerDim = kIndexerFormat.latent_dim;  // elements of a key

struct IndexerParams {
  Params shared;  // slots, positions and their limits, the table; key: [tokens, 128]; rows.latent, rows.scales
  bool power_of_two_scale = false;
};

template <class A, int n, int angle_bytes>
struct IndexerWrite {
  static constexpr int kParts = 1;
  static constexpr int kPairs =
      kIndexerDim / 2 / n;  // pairs of chunks: R/2/n that are turned, then the others in order
  static constexpr int kLanes = kPairs < 1 << kMaxLog2Lanes ? kPairs : 1 << kMaxLog2Lanes, kOwn = kPairs / kLanes;
  IndexerParams params;

  template <int>
  LKV_DEVICE void run(Group group) const {
    const Params& p = params.shared;
    const uint32_t token = group.index;
    wait_for_producer();
    const auto loaded_slot = p.slots.load(token), loaded_position = p.positions.load(token);
    const char* const from = p.key.data + token * p.key.token_stride;
    Chunk<A, n> a[kOwn], b[kOwn];
    const auto first = [&](int c) { return c < p.table.half_dim ? first_of_pair<n>(p.table, c) : 2 * c; };
    const auto second = [&](int c) { return c < p.table.half_dim ? second_of_pair<n>(p.table, c) : 2 * c + n; };
    LKV_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int c = (group.lane + i * kLanes) * n;
      a[i] = load<A::bytes * n>(from + first(c) * A::bytes);
      b[i] = load<A::bytes * n>(from + second(c) * A::bytes);
    }
    const int64_t slot = p.slots.value(loaded_slot), position = p.positions.value(loaded_position);
    const bool in_cache = static_cast<uint64_t>(slot) < p.capacity;
    const bool in_table = static_cast<uint64_t>(position) < static_cast<uint64_t>(p.table.max_position);
    uint32_t amax = 0;
    LKV_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int c = (group.lane + i * kLanes) * n;
      if (p.rotates && in_table && c < p.table.half_dim) {
        Angles<n, angle_bytes> angles;
        angles.load(p.table, position, c);
        angles.convert(p.table);
        rotate<A>(a[i], b[i], angles, p.table.is_neox);
      }
      float x[2 * n];
      to_floats<A, n>(a[i], x);
      to_floats<A, n>(b[i], x + n);
      amax = max(amax, greatest_magnitude<2 * n>(x));
    }
    float scale = div_rn(max(bits_float(group_max<kLanes>(amax)), 1e-4f), E4M3FN::max);
    if (params.power_of_two_scale) scale = power_of_two_above(scale);
    if (!in_cache || (p.rotates && !in_table)) return;
    const Quotient quotient(scale);
    char* const row = p.rows.at(p.rows.latent, static_cast<uint32_t>(slot));
    const E4M3FN kind;
    LKV_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int c = (group.lane + i * kLanes) * n;
      store_row(row + first(c), encode<A, n>(kind, a[i], quotient));
      store_row(row + second(c), encode<A, n>(kind, b[i], quotient));
    }
    if (group.lane == 0) store(p.rows.at(p.rows.scales, static_cast<uint32_t>(slot)), Bits<4>{float_bits(scale)});
  }
};

void run(const WriteIndexerCache& x) {
  Update update(x.name, x.device, *x.k, x.T);
  update.bind_rotation(x.rotation, x.rotation.table ? int64_t{x.R} : 0, false);
  update.bind_slots(*x.slot_mapping, x.cache);
  update.params.key = update.heads_of(x.k);
  update.params.rows = rows_of(x.cache);
  update.align(update.params.rows.latent.data, update.chunk, {update.params.rows.latent.block_stride});
  if (x.T == 0) return;
  if (!update.params.rotates) update.params.positions = update.params.slots;
  update.params.table.angle_shift = update.aligned && !x.is_neox ? 1 : 0;
  update.check_values();
  const IndexerParams params{update.params, x.power_of_two_scale};
  dispatch(update.activation, update.aligned, [&]<class A, int n>() {
    const Grid<1> grid{{{update.params.tokens, log2_lanes(kIndexerDim / 2 / n)}}};
    if (params.shared.table.is_wide) return launch(IndexerWrite<A, n, 4>{params}, grid, x.device);
    return launch(IndexerWrite<A, n, 2>{params}, grid, x.device);
  });
}

}  // namespace latentkv
