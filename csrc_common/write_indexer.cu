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

void write_indexer_cache_(const Tensor& k, const OptionalTensor& positions, const OptionalTensor& cos_sin_cache,
                          const Tensor& slot_mapping, const Tensor& cache, bool is_neox, bool power_of_two_scale) {
  const int device = k.is_cpu() ? -1 : k.get_device_index();
  const Arguments args("write_indexer_cache_", kDeviceType, device);
  args.tensor("k", k, kActivations, {{"N", -1}, {"D", kIndexerDim}});
  const int64_t n = k.size(0);
  if (positions.has_value() != cos_sin_cache.has_value()) {
    args.fail(positions ? "cos_sin_cache" : "positions", "a tensor, as for the other of positions and cos_sin_cache",
              "None");
  }
  IndexerParams params;
  params.power_of_two_scale = power_of_two_scale;
  Params& p = params.shared;
  const int64_t element = static_cast<int64_t>(k.element_size()), chunk = 16 / element;
  bool aligned = true, wide_angles = false;
  const auto align = [&](const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int64_t stride : strides) aligned = aligned && stride % bytes == 0;
  };
  if (cos_sin_cache) {
    args.tensor("positions", *positions, kIndexTypes, {{"N", n}});
    args.tensor("cos_sin_cache", *cos_sin_cache, kActivations, {{"max_position", -1}, {"R", -1}});
    const int64_t rope_dim = cos_sin_cache->size(1), bytes = static_cast<int64_t>(cos_sin_cache->element_size());
    if (rope_dim % 2 || rope_dim < 2 || rope_dim > kIndexerDim) {
      args.fail("cos_sin_cache", "an even R in 2 .. 128", rope_dim);
    }
    p.rotates = true, wide_angles = bytes == 4;
    p.positions = indices(*positions);
    p.table.data = static_cast<const char*>(cos_sin_cache->data_ptr()),
    p.table.stride = cos_sin_cache->stride(0) * bytes;
    p.table.max_position = cos_sin_cache->size(0), p.table.half_dim = static_cast<int>(rope_dim / 2);
    p.table.is_neox = is_neox, p.table.is_bf16 = cos_sin_cache->scalar_type() == ScalarType::BFloat16;
    aligned = rope_dim % (2 * chunk) == 0;
    align(p.table.data, chunk / 2 * bytes, {p.table.stride});
    p.table.angle_step = static_cast<int>(is_neox ? chunk / 2 : rope_dim / 4);
  }
  args.tensor("slot_mapping", slot_mapping, kIndexTypes, {{"T", -1}});
  const int64_t tokens = slot_mapping.size(0);
  if (tokens > n) args.fail("slot_mapping", "at most N=" + std::to_string(n) + " entries", tokens);
  const CacheView view = check_packed(args, kIndexerFormat, "cache", cache);
  if (tokens == 0) return;
  if (tokens > INT32_MAX) args.fail("k", "fewer than 2^31 rows", tokens);

  p.tokens = static_cast<uint32_t>(tokens);
  p.writes = true;
  p.slots = indices(slot_mapping);
  if (!p.rotates) p.positions = p.slots;
  p.capacity = static_cast<uint32_t>(view.blocks * view.block_size);
  p.key.data = static_cast<char*>(k.data_ptr()), p.key.token_stride = k.stride(0) * element;
  auto* const data = static_cast<char*>(cache.data_ptr());
  p.rows.block_size = Divisor(static_cast<uint32_t>(std::max<int64_t>(view.block_size, 1)));
  p.rows.latent = {data, view.block_stride, kIndexerDim};
  p.rows.scales = {data + kIndexerDim * view.block_size, view.block_stride, 4};
  align(p.key.data, 16, {p.key.token_stride});
  align(data, chunk, {view.block_stride});
  p.table.angle_shift = aligned && !is_neox ? 1 : 0;
  if (checks_values(device)) check_values(args, p, device);
  dispatch(k.scalar_type(), aligned, [&]<class A, int n>() {
    const Grid<1> grid{{{p.tokens, log2_lanes(kIndexerDim / 2 / n)}}};
    if (wide_angles) return launch(IndexerWrite<A, n, 4>{params}, grid, device);
    return launch(IndexerWrite<A, n, 2>{params}, grid, device);
  });
}

}  // namespace latentkv
