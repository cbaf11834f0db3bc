// The MLA cache update in one launch: rotate the query heads and the shared rope key in place, and write each token's
// latent vector and rotated key into its row of a paged cache. `rope_` and `write_cache_` are the same kernel with one
// half left out. Device code first, checks and launch after.
#include "vendor.h"
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"
#include "formats.h"
#include "params.h"

namespace latentkv {

// ---------------------------------------------------------------------------------------------------------- device

// cos and sin of a lane's n pairs, from a table of `bytes` per angle. GPT-J takes n/2 pairs from either chunk of a
// lane, so its angles lie in two runs; NeoX's happen to meet. `load` only loads, so that more can be done before
// `convert` waits.
template <int n, int bytes>
struct Angles {
  static constexpr int run = n == 1 ? 1 : n / 2, runs = n / run;
  float cos[n], sin[n];

  LKV_DEVICE void load(const Params& p, int64_t position, int c) {
    const char* const row = p.table + position * p.table_stride + (c >> p.angle_shift) * bytes;
    LKV_UNROLL
    for (int i = 0; i < runs; ++i) {
      raw_[i] = latentkv::load<bytes * run>(row + i * p.angle_step * bytes);
      raw_[runs + i] = latentkv::load<bytes * run>(row + (i * p.angle_step + p.half_dim) * bytes);
    }
  }
  LKV_DEVICE void convert(const Params& p) {
    if constexpr (bytes == 4) {
      convert<Fp32>();
    } else if (p.table_is_bf16) {
      convert<Bf16>();
    } else {
      convert<Fp16>();
    }
    if (p.inverse) {
      LKV_UNROLL
      for (int i = 0; i < n; ++i) sin[i] = -sin[i];
    }
  }

 private:
  Bits<bytes * run> raw_[2 * runs];

  template <class T>
  LKV_DEVICE void convert() {
    LKV_UNROLL
    for (int i = 0; i < runs; ++i) {
      to_floats<T, run>(raw_[i], cos + i * run);
      to_floats<T, run>(raw_[runs + i], sin + i * run);
    }
  }
};

// Every product and sum is rounded to fp32 by itself.
LKV_DEVICE void turn(float& x, float& y, float cos, float sin) {
  const float turned = sub_rn(mul_rn(x, cos), mul_rn(y, sin));
  y = add_rn(mul_rn(y, cos), mul_rn(x, sin));
  x = turned;
}

// A: activation dtype. F: row format. n: elements of a chunk, 16 bytes of them or 1. angle_bytes: of a table entry.
//
// A small batch is all latency, so whatever can be asked for goes out at once: slot, position, scale and activations.
// What the angles need is at hand when the position arrives; a row that turns out dead has only been read.
template <class A, class F, int n, int angle_bytes>
struct CacheUpdate {
  static constexpr int kParts = 3;
  Params p;

  // The parts: the latent vectors, the key heads, the query heads.
  template <int part>
  LKV_DEVICE void run(Group group) const {
    if constexpr (part == 0) {
      latent(group);
    } else {
      heads<part == 1>(group);
    }
  }

  // What is done for one token: nothing, where its slot or position lies outside.
  struct Plan {
    bool rotate, write;
    int64_t position;
    uint32_t slot;
  };
  LKV_DEVICE Plan plan(Indices::Loaded loaded_slot, Indices::Loaded loaded_position) const {
    const int64_t slot = p.writes ? p.slots.value(loaded_slot) : -1, position = p.positions.value(loaded_position);
    const bool in_cache = static_cast<uint64_t>(slot) < p.capacity;
    const bool in_table = static_cast<uint64_t>(position) < static_cast<uint64_t>(p.max_position);
    const bool rotates = p.rotates && (in_cache || (slot < 0 && p.rope_masked));
    const bool alive = rotates ? in_table : in_cache;
    return {rotates && alive, in_cache && alive, position, static_cast<uint32_t>(slot)};
  }

  LKV_DEVICE char* row(const RowPart& part, uint32_t slot) const {
    const uint32_t block = p.block_size.divide(slot), entry = slot - block * p.block_size.d;
    return part.data + block * part.block_stride + entry * part.entry_stride;
  }

  // Group g writes the latent vector of token g.
  LKV_DEVICE void latent(Group group) const {
    wait_for_producer();
    const auto slot = p.slots.load(group.index), position = p.positions.load(group.index);
    const float scale = p.scale ? *p.scale : 1.f;
    const char* const from = p.kv_c + group.index * p.kv_c_stride;
    constexpr int batch = 2;  // chunks in flight
    const int step = n * group.lanes;
    Chunk<A, n> x[batch];
    int c = group.lane * n;
    const auto load_chunks = [&] {
      LKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (c + i * step < p.latent_dim) x[i] = load<A::bytes * n>(from + (c + i * step) * A::bytes);
      }
    };
    load_chunks();
    const Quotient quotient(scale);
    const Plan plan = this->plan(slot, position);
    if (!plan.write) return;
    char* const to = row(p.latent, plan.slot);
    while (c < p.latent_dim) {
      LKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (c + i * step < p.latent_dim)
          store_row(to + (c + i * step) * F::bytes, F::template encode<n>(x[i], quotient));
      }
      c += batch * step;
      load_chunks();
    }
  }

  // A group turns a few heads of one token. A lane holds two chunks R/2 elements apart: NeoX pairs lie across them,
  // GPT-J pairs within each. So one lane owns both members of every pair, and both styles read and write the same
  // addresses.
  template <bool is_key>
  LKV_DEVICE void heads(Group group) const {
    const HeadPart& heads = is_key ? p.key : p.query;
    const uint32_t token = heads.groups.divide(group.index);
    wait_for_producer();
    const auto slot = p.slots.load(token), position = p.positions.load(token);
    const float scale = is_key && p.scale ? *p.scale : 1.f;

    int c = group.lane * n;
    if (c >= p.half_dim) return;
    const int first = (group.index - token * heads.groups.d) * heads.group_heads;
    const int count = min(heads.group_heads, heads.count - first);
    const int64_t stride = heads.head_stride;
    char* const head = heads.data + token * heads.token_stride + first * stride;
    constexpr int batch = is_key || kMaxGroupHeads == 1 ? 1 : 2;  // heads in flight; a group has one key head
    Chunk<A, n> a[batch], b[batch];
    char *at_a, *at_b;
    const auto seek = [&] {
      at_a = head + (n == 1 && !p.is_neox ? 2 * c : c) * A::bytes;
      at_b = head + (n == 1 && !p.is_neox ? 2 * c + 1 : p.half_dim + c) * A::bytes;
    };
    const auto load_heads = [&](int h) {
      LKV_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (h + i < count) a[i] = load<A::bytes * n>(at_a + i * stride), b[i] = load<A::bytes * n>(at_b + i * stride);
      }
    };
    seek();
    load_heads(0);
    const Quotient quotient(scale);
    const Plan plan = this->plan(slot, position);
    if (!plan.rotate && !plan.write) return;
    const auto rotate_heads = [&](const Angles<n, angle_bytes>& angles, bool is_neox) {
      for (int h = 0;;) {
        LKV_UNROLL
        for (int i = 0; i < batch; ++i) {
          if (h + i < count) {
            rotate(a[i], b[i], angles, is_neox);
            store(at_a + i * stride, a[i]);
            store(at_b + i * stride, b[i]);
          }
        }
        h += batch;
        if (is_key || kMaxGroupHeads <= batch || h >= count) break;
        at_a += batch * stride, at_b += batch * stride;
        load_heads(h);
      }
    };
    for (;;) {
      if (plan.rotate) {
        Angles<n, angle_bytes> angles;
        angles.load(p, plan.position, c);
        angles.convert(p);
        if constexpr (is_key && kSharedKeyCode) {
          rotate(a[0], b[0], angles, p.is_neox);
          store(at_a, a[0]);
          store(at_b, b[0]);
        } else if (n == 1 || p.is_neox) {
          rotate_heads(angles, true);
        } else {
          rotate_heads(angles, false);
        }
      }
      if constexpr (is_key) {
        if (plan.write) {  // there is one key head, where there is a cache
          char* const to = row(p.rope, plan.slot);
          store_row(to + (at_a - head) / A::bytes * F::bytes, F::template encode<n>(a[0], quotient));
          store_row(to + (at_b - head) / A::bytes * F::bytes, F::template encode<n>(b[0], quotient));
        }
      }
      c += n * group.lanes;
      if (c >= p.half_dim) return;
      seek();
      load_heads(0);
    }
  }

  LKV_DEVICE static void rotate(Chunk<A, n>& a, Chunk<A, n>& b, const Angles<n, angle_bytes>& angles, bool is_neox) {
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
};

// ------------------------------------------------------------------------------------------------------------ host

// The arguments of the three ops. What an op does not take is null.
struct Call {
  const char* op;
  const Tensor *positions = nullptr, *q = nullptr, *k = nullptr, *kv_c = nullptr, *table = nullptr, *slots = nullptr;
  const Tensor *cache = nullptr, *rope_cache = nullptr, *scale = nullptr;
  const char *q_name = "q_pe", *k_name = "k_pe";
  const std::string* format = nullptr;
  bool is_neox = false, rope_masked = true, inverse = false;
};

// Blocks, entries and the last dimension of a cache tensor [B, bs, C] or [B, 1, bs, C].
struct CacheView {
  int64_t blocks, block_size, width, block_stride, entry_stride;
  explicit CacheView(const Tensor& t) {
    const int64_t e = t.dim() - 2;
    blocks = t.size(0), block_size = t.size(e), width = t.size(e + 1);
    const int64_t bytes = static_cast<int64_t>(t.element_size());
    block_stride = t.stride(0) * bytes, entry_stride = t.stride(e) * bytes;
  }
  int64_t block_bytes(int64_t row_bytes) const { return (block_size - 1) * entry_stride + row_bytes; }
  int64_t bytes(int64_t row_bytes) const { return (blocks - 1) * block_stride + block_bytes(row_bytes); }
};

constexpr auto kActivations = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float};
constexpr auto kIndexTypes = {ScalarType::Long, ScalarType::Int};

Indices indices(const Tensor& t) {
  const auto* const data = static_cast<const char*>(t.data_ptr());
  const uint32_t bytes = t.scalar_type() == ScalarType::Long ? 8 : 4;
  return {data, bytes};
}

const FormatInfo* check_cache(const Arguments& args, const Call& call, int64_t latent_dim, int64_t rope_dim) {
  const FormatInfo* format = nullptr;
  for (const FormatInfo& known : kFormats) {
    if (*call.format == known.name) format = &known;
  }
  if (!format) args.fail("format", "a known format name", "'" + *call.format + "'");
  if (!format->quantised && call.kv_c->scalar_type() != format->type) {
    args.fail("kv_c", "dtype " + name_of(format->type) + " for format " + format->name,
              name_of(call.kv_c->scalar_type()));
  }
  const auto check = [&](const char* name, const Tensor& t, const char* what, int64_t row) {
    args.device(name, t);
    const ScalarType type = t.scalar_type();
    if (type != format->type && !(format->quantised && type == ScalarType::Byte)) {
      args.fail(
          name,
          "dtype " + name_of(format->type) + (format->quantised ? " or uint8" : "") + " for format " + format->name,
          name_of(type));
    }
    if (!(t.dim() == 3 || (t.dim() == 4 && t.size(1) == 1))) {
      args.fail(name, "shape [B, bs, C] or [B, 1, bs, C]", shape_of(t));
    }
    if (t.size(t.dim() - 1) < row) {
      args.fail(name, "rows of at least " + std::string(what) + "=" + std::to_string(row) + " elements",
                t.size(t.dim() - 1));
    }
    args.unit_stride(name, t);
    args.no_overlap(name, t);
  };
  if (call.rope_cache) {
    check("cache", *call.cache, "L", latent_dim);
    check("rope_cache", *call.rope_cache, "R", rope_dim);
    const CacheView a(*call.cache), b(*call.rope_cache);
    if (a.blocks != b.blocks || a.block_size != b.block_size) {
      args.fail("rope_cache", "the blocks of cache: " + shape_of(*call.cache), shape_of(*call.rope_cache));
    }
    const int64_t a_row = latent_dim * format->bytes, b_row = rope_dim * format->bytes;
    const int64_t offset = static_cast<char*>(call.rope_cache->data_ptr()) - static_cast<char*>(call.cache->data_ptr());
    const bool apart =
        a.blocks * a.block_size == 0 || b_row == 0 || offset >= a.bytes(a_row) || -offset >= b.bytes(b_row);
    const bool same_blocks = a.block_stride == b.block_stride || a.blocks == 1;
    const bool entries_apart = same_blocks && a.entry_stride == b.entry_stride && a.entry_stride > 0 &&
                               a.block_stride % a.entry_stride == 0 &&
                               side_by_side(offset, a.entry_stride, b_row, a_row);
    const bool blocks_apart =
        same_blocks && a.blocks > 1 && side_by_side(offset, a.block_stride, b.block_bytes(b_row), a.block_bytes(a_row));
    if (!(apart || entries_apart || blocks_apart)) {
      args.fail("rope_cache", "a tensor that shares no bytes with cache", "overlapping memory");
    }
  } else {
    check("cache", *call.cache, "L + R", latent_dim + rope_dim);
  }
  const CacheView view(*call.cache);
  if (view.blocks * view.block_size > INT32_MAX) {
    args.fail("cache", "fewer than 2^31 rows", view.blocks * view.block_size);
  }
  if (call.scale) {
    args.device("scale", *call.scale);
    args.dtype("scale", *call.scale, {ScalarType::Float});
    if (call.scale->numel() != 1) args.fail("scale", "one element", "shape " + shape_of(*call.scale));
  }
  return format;
}

// The values of positions and slots, where they are looked at before the launch.
void check_values(const Arguments& args, const Params& p, int device) {
  const auto view = [&](const Indices& x) { return HostView(x.data, size_t{p.tokens} * x.bytes, device); };
  const auto value = [](const HostView& host, uint32_t bytes, uint32_t i) {
    return bytes == 8 ? static_cast<const int64_t*>(host.data())[i]
                      : int64_t{static_cast<const int32_t*>(host.data())[i]};
  };
  const HostView slots = view(p.slots), positions = view(p.positions);
  for (uint32_t t = 0; t < p.tokens; ++t) {
    const int64_t slot = p.writes ? value(slots, p.slots.bytes, t) : -1;
    if (slot >= int64_t{p.capacity}) {
      args.fail("slot_mapping", "slots below the capacity of " + std::to_string(p.capacity),
                std::to_string(slot) + " at row " + std::to_string(t));
    }
    if (!p.rotates || (slot < 0 && !p.rope_masked)) continue;
    const int64_t position = value(positions, p.positions.bytes, t);
    if (position < 0 || position >= p.max_position) {
      args.fail("positions", "values in 0 .. " + std::to_string(p.max_position - 1),
                std::to_string(position) + " at row " + std::to_string(t));
    }
  }
}

// The lanes for a walk over so many chunks, as a power of two.
uint32_t log2_lanes(int64_t chunks) {
  uint32_t log2 = 0;
  while (log2 < kMaxLog2Lanes && (int64_t{1} << log2) < chunks) ++log2;
  return log2;
}

void run(const Call& call) {
  const Tensor& lead = call.kv_c ? *call.kv_c : *call.q;
  const int device = lead.is_cpu() ? -1 : lead.get_device_index();
  const Arguments args(call.op, kDeviceType, device);

  // Checks. kv_c leads, or q where there is none: it says what device, dtype and N the others must have.
  if (call.kv_c) {
    args.tensor("kv_c", lead, kActivations, {{"N", -1}, {"L", -1}});
  } else {
    args.tensor(call.q_name, lead, kActivations, {{"N", -1}, {"H", -1}, {"R", -1}});
  }
  const int64_t tokens_all = lead.size(0), latent_dim = call.kv_c ? lead.size(1) : 0;
  const ScalarType activation = lead.scalar_type();
  int64_t rope_dim = 0;
  if ((call.positions == nullptr) != (call.table == nullptr)) {
    args.fail(call.table ? "positions" : "cos_sin_cache", "a tensor, as for the other of positions and cos_sin_cache",
              "None");
  }
  if (call.positions) args.tensor("positions", *call.positions, kIndexTypes, {{"N", tokens_all}});
  if (call.q) {
    args.tensor(call.q_name, *call.q, kActivations, {{"N", tokens_all}, {"H", -1}, {"R", -1}});
    rope_dim = call.q->size(2);
    if (call.table) args.no_overlap(call.q_name, *call.q);  // else it is only read
  }
  if (call.k) {
    const bool has_heads = call.k->dim() == 3;
    if (!call.q) rope_dim = call.k->dim() ? call.k->size(call.k->dim() - 1) : -1;
    if (call.cache || !has_heads) {
      args.tensor(call.k_name, *call.k, kActivations, {{"N", tokens_all}, {"R", rope_dim}});
    } else {
      args.tensor(call.k_name, *call.k, kActivations, {{"N", tokens_all}, {"K", -1}, {"R", rope_dim}});
    }
    args.dtype(call.k_name, *call.k, {activation});
    if (call.table) args.no_overlap(call.k_name, *call.k);
  }
  if (call.q) args.dtype(call.q_name, *call.q, {activation});
  if (rope_dim % 2) args.fail(call.q ? call.q_name : call.k_name, "an even rope dimension R", rope_dim);
  if (call.table) {
    args.tensor("cos_sin_cache", *call.table, kActivations, {{"max_position", -1}, {"R", rope_dim}});
  }
  const FormatInfo* format = nullptr;
  int64_t tokens = tokens_all;
  if (call.slots) {
    args.tensor("slot_mapping", *call.slots, kIndexTypes, {{"T", -1}});
    tokens = call.slots->size(0);
    if (tokens > tokens_all) {
      args.fail("slot_mapping", "at most N=" + std::to_string(tokens_all) + " entries", tokens);
    }
    format = check_cache(args, call, latent_dim, rope_dim);
  }
  if (tokens == 0) return;
  if (tokens > INT32_MAX) args.fail(call.q ? call.q_name : "kv_c", "fewer than 2^31 rows", tokens);

  // Parameters.
  Params p;
  p.tokens = static_cast<uint32_t>(tokens);
  p.is_neox = call.is_neox, p.rope_masked = call.rope_masked, p.inverse = call.inverse;
  p.half_dim = static_cast<int>(rope_dim / 2);
  const int64_t element = static_cast<int64_t>(lead.element_size()), chunk = 16 / element;
  bool aligned = rope_dim % (2 * chunk) == 0 && latent_dim % chunk == 0;  // every chunk is one access
  const auto align = [&](const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int64_t stride : strides) aligned = aligned && stride % bytes == 0;
  };
  if (call.table && rope_dim) {
    const int64_t bytes = static_cast<int64_t>(call.table->element_size());
    const ScalarType type = call.table->scalar_type();
    p.rotates = true;
    p.positions = indices(*call.positions);
    p.table = static_cast<const char*>(call.table->data_ptr());
    p.table_stride = call.table->stride(0) * bytes, p.max_position = call.table->size(0);
    p.table_is_bf16 = type == ScalarType::BFloat16;
    align(p.table, chunk / 2 * bytes, {p.table_stride});
  }
  const auto head_part = [&](const Tensor& t) {
    HeadPart part;
    part.data = static_cast<char*>(t.data_ptr()), part.token_stride = t.stride(0) * element, part.count = 1;
    if (t.dim() == 3) part.head_stride = t.stride(1) * element, part.count = static_cast<int>(t.size(1));
    align(part.data, 16, {part.token_stride, part.head_stride});
    return part;
  };
  if (call.q && p.rotates) p.query = head_part(*call.q);
  if (call.k && rope_dim) p.key = head_part(*call.k);
  if (call.slots) {
    p.writes = true;
    p.slots = indices(*call.slots);
    p.kv_c = static_cast<const char*>(call.kv_c->data_ptr());
    p.kv_c_stride = call.kv_c->stride(0) * element, p.latent_dim = static_cast<int>(latent_dim);
    align(p.kv_c, 16, {p.kv_c_stride});
    const CacheView view(*call.cache), rope_view(call.rope_cache ? *call.rope_cache : *call.cache);
    p.latent = {static_cast<char*>(call.cache->data_ptr()), view.block_stride, view.entry_stride};
    p.rope = {
        call.rope_cache ? static_cast<char*>(call.rope_cache->data_ptr()) : p.latent.data + latent_dim * format->bytes,
        rope_view.block_stride, rope_view.entry_stride};
    p.capacity = static_cast<uint32_t>(view.blocks * view.block_size);
    p.block_size = Divisor(static_cast<uint32_t>(std::max<int64_t>(view.block_size, 1)));
    p.scale = call.scale ? static_cast<const float*>(call.scale->data_ptr()) : nullptr;
    align(p.latent.data, chunk * format->bytes, {p.latent.block_stride, p.latent.entry_stride});
    if (rope_dim) align(p.rope.data, chunk * format->bytes, {p.rope.block_stride, p.rope.entry_stride});
  }
  if (!p.writes && !p.rotates) return;
  if (!p.writes) p.slots = p.positions;
  if (!p.rotates) p.positions = p.slots;
  p.angle_shift = aligned && !p.is_neox ? 1 : 0;
  p.angle_step = static_cast<int>(p.is_neox ? chunk / 2 : rope_dim / 4);
  if (checks_values(device)) check_values(args, p, device);

  // Launch. Where the batch fills the device anyway, a group turns several heads with the angles it has loaded.
  const int64_t chunk_used = aligned ? chunk : 1;
  const uint32_t log2_head_lanes = log2_lanes(rope_dim / 2 / chunk_used);
  Grid<3> grid;
  if (call.slots) grid.part[0] = {p.tokens, log2_lanes(latent_dim / chunk_used)};
  for (HeadPart* heads : {&p.key, &p.query}) {
    if (heads->count == 0) continue;
    while (heads == &p.query && heads->group_heads < kMaxGroupHeads && heads->group_heads < heads->count &&
           (tokens * heads->count << log2_head_lanes) > heads->group_heads * resident_lanes(device)) {
      heads->group_heads *= 2;
    }
    const int64_t groups = (heads->count + heads->group_heads - 1) / heads->group_heads;
    if (tokens * groups > INT32_MAX) {
      args.fail(heads == &p.key ? call.k_name : call.q_name, "fewer than 2^31 heads in all", tokens * groups);
    }
    heads->groups = Divisor(static_cast<uint32_t>(groups));
    grid.part[heads == &p.key ? 1 : 2] = {static_cast<uint32_t>(tokens * groups), log2_head_lanes};
  }
  const bool wide_angles = call.table && call.table->scalar_type() == ScalarType::Float;
  dispatch(activation, format, [&]<class A, class F>() {
    constexpr int n = 16 / A::bytes;
    if (aligned && wide_angles) return launch(CacheUpdate<A, F, n, 4>{p}, grid, device);
    if (aligned) return launch(CacheUpdate<A, F, n, 2>{p}, grid, device);
    if (wide_angles) return launch(CacheUpdate<A, F, 1, 4>{p}, grid, device);
    return launch(CacheUpdate<A, F, 1, 2>{p}, grid, device);
  });
}

const Tensor* pointer(const std::optional<Tensor>& t) {
  return t ? &*t : nullptr;
}

void rope_(const Tensor& positions, const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos_sin_cache,
           bool is_neox, bool inverse) {
  Call call{.op = "rope_", .positions = &positions, .q = &q, .k = pointer(k), .table = &cos_sin_cache};
  call.q_name = "q", call.k_name = "k", call.is_neox = is_neox, call.inverse = inverse;
  run(call);
}

void write_cache_(const Tensor& kv_c, const Tensor& k_pe, const Tensor& slot_mapping, const Tensor& cache,
                  const std::optional<Tensor>& rope_cache, const std::optional<Tensor>& scale,
                  const std::string& format) {
  Call call{.op = "write_cache_", .k = &k_pe, .kv_c = &kv_c, .slots = &slot_mapping, .cache = &cache};
  call.rope_cache = pointer(rope_cache), call.scale = pointer(scale), call.format = &format;
  run(call);
}

void rope_write_cache_(const std::optional<Tensor>& positions, const Tensor& q_pe, const Tensor& k_pe,
                       const Tensor& kv_c, const std::optional<Tensor>& cos_sin_cache, const Tensor& slot_mapping,
                       const Tensor& cache, const std::optional<Tensor>& rope_cache, const std::optional<Tensor>& scale,
                       const std::string& format, bool is_neox, bool rope_masked) {
  Call call{.op = "rope_write_cache_", .positions = pointer(positions), .q = &q_pe, .k = &k_pe, .kv_c = &kv_c};
  call.table = pointer(cos_sin_cache), call.slots = &slot_mapping, call.cache = &cache;
  call.rope_cache = pointer(rope_cache), call.scale = pointer(scale), call.format = &format;
  call.is_neox = is_neox, call.rope_masked = rope_masked;
  run(call);
}

}  // namespace latentkv

// Puts this library's kernels into a namespace whose schemas Python has defined; once for each namespace.
extern "C" __attribute__((visibility("default"))) void latentkv_register(const char* name_space) {
  using torch::stable::detail::StableLibrary;
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, LKV_DISPATCH_KEY, __FILE__, __LINE__);
  library->impl("rope_", TORCH_BOX(&latentkv::rope_));
  library->impl("write_cache_", TORCH_BOX(&latentkv::write_cache_));
  library->impl("rope_write_cache_", TORCH_BOX(&latentkv::rope_write_cache_));
}
