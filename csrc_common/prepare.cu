#include "vendor.h"
//
#include "prepare.h"

#include <cstdio>

namespace latentkv {

Indices indices(const Tensor& t) {
  const uint32_t bytes = t.scalar_type() == ScalarType::Long ? 8 : 4;
  return {static_cast<const char*>(t.data_ptr()), bytes};
}

Rows rows_of(const Cache& cache) {
  const auto part = [](const Tensor& t) {
    const int64_t bytes = static_cast<int64_t>(t.element_size());
    return RowPart{static_cast<char*>(t.data_ptr()), t.stride(0) * bytes, t.stride(t.dim() - 2) * bytes};
  };
  const FormatInfo& format = *cache.format;
  const RowPart data = part(*cache.data);
  const auto at = [&](int64_t bytes, int64_t entry_stride) {
    return RowPart{data.data + bytes, data.block_stride, entry_stride};
  };
  Rows rows;
  rows.block_size = Divisor(static_cast<uint32_t>(std::max<int64_t>(cache.block_size, 1)));
  rows.code = format.code, rows.tile = static_cast<uint8_t>(format.tile);
  rows.rope_code = format.tile ? Code::verbatim : format.code;
  rows.latent = data;
  if (format.footed) {  // latent and rope of every row of a block, then their scales
    const int64_t row = format.latent_dim + 2 * format.rope_dim;
    rows.latent.entry_stride = row;
    rows.rope = at(format.latent_dim, row);
    rows.scales = at(row * cache.block_size, format.row_bytes - row);
  } else if (format.tile) {  // latent, scales, rope
    rows.scales = at(format.latent_dim, data.entry_stride);
    rows.rope = at(format.row_bytes - 2 * format.rope_dim, data.entry_stride);
  } else {
    rows.rope = cache.rope_data ? part(*cache.rope_data) : at(cache.latent_dim * format.bytes(), data.entry_stride);
    rows.scale = cache.scale ? static_cast<const float*>(cache.scale->data_ptr()) : nullptr;
  }
  return rows;
}

// The lanes for a walk over so many chunks, as a power of two.
uint32_t log2_lanes(int64_t chunks) {
  uint32_t log2 = 0;
  while (log2 < kMaxLog2Lanes && (int64_t{1} << log2) < chunks) ++log2;
  return log2;
}

void check_scale(const char* op, const Name& name, const Tensor* scale, int device) {
  if (!scale || !checks_enabled() || !checks_values(device)) return;
  const HostView view(scale->data_ptr(), sizeof(float), device);
  const float value = *static_cast<const float*>(view.data());
  if (value > 0.f && value <= 0x1.fffffep127f) return;
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  fail(op, name, "a positive number", text);
}

Update::Update(const char* op, int device, const Tensor& lead, int64_t tokens)
    : op(op), device(device), activation(lead.scalar_type()), chunk(16 / static_cast<int64_t>(lead.element_size())) {
  params.tokens = static_cast<uint32_t>(tokens);
}

void Update::align(const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
  aligned = aligned && reinterpret_cast<uintptr_t>(data) % bytes == 0;
  for (int64_t stride : strides) aligned = aligned && stride % bytes == 0;
}

void Update::bind_rotation(const Rotation& rotation, int64_t rope_dim, bool rope_masked) {
  Table& table = params.table;
  params.rope_masked = rope_masked;
  table.is_neox = rotation.is_neox, table.inverse = rotation.inverse;
  table.half_dim = static_cast<int>(rope_dim / 2);
  aligned = aligned && rope_dim % (2 * chunk) == 0;
  if (!rotation.table) return;
  const int64_t bytes = static_cast<int64_t>(rotation.table->element_size());
  params.rotates = true;
  params.positions = indices(*rotation.positions);
  table.data = static_cast<const char*>(rotation.table->data_ptr());
  table.stride = rotation.table->stride(0) * bytes, table.max_position = rotation.table->size(0);
  table.is_wide = bytes == 4;
  table.is_bf16 = rotation.table->scalar_type() == ScalarType::BFloat16;
  table.angle_step = static_cast<int>(rotation.is_neox ? chunk / 2 : rope_dim / 4);
  align(table.data, chunk / 2 * bytes, {table.stride});
}

void Update::bind_slots(const Tensor& slots, const Cache& cache) {
  params.writes = true;
  params.slots = indices(slots);
  params.capacity = static_cast<uint32_t>(cache.capacity());
  check_scale(op, cache.scale_name, cache.scale, device);
}

void Update::bind_rows(const Tensor& kv_c, const Cache& cache) {
  params.kv_c = static_cast<const char*>(kv_c.data_ptr());
  params.kv_c_stride = kv_c.stride(0) * static_cast<int64_t>(kv_c.element_size());
  params.latent_dim = static_cast<int>(cache.latent_dim);
  aligned = aligned && cache.latent_dim % chunk == 0;
  align(params.kv_c, 16, {params.kv_c_stride});
  const Rows& rows = params.rows = rows_of(cache);
  const int64_t bytes = cache.format->tile ? 16 : chunk * cache.format->bytes();
  align(rows.latent.data, bytes, {rows.latent.block_stride, rows.latent.entry_stride});
  if (cache.rope_dim) align(rows.rope.data, bytes, {rows.rope.block_stride, rows.rope.entry_stride});
}

HeadPart Update::heads_of(const Tensor* t) {
  HeadPart part;
  if (!t || t->size(t->dim() - 1) == 0) return part;
  const int64_t bytes = static_cast<int64_t>(t->element_size());
  part.data = static_cast<char*>(t->data_ptr()), part.token_stride = t->stride(0) * bytes, part.count = 1;
  if (t->dim() == 3) part.head_stride = t->stride(1) * bytes, part.count = static_cast<int>(t->size(1));
  align(part.data, chunk * bytes, {part.token_stride, part.head_stride});
  return part;
}

// The values of positions and slots, where they are looked at before the launch.
void Update::check_values() const {
  if (!checks_values(device)) return;
  const PrologueParams& p = params;
  const HostIndices slots(p.slots, p.tokens, device), positions(p.positions, p.tokens, device);
  for (uint32_t t = 0; t < p.tokens; ++t) {
    const int64_t slot = p.writes ? slots[t] : -1;
    if (slot >= int64_t{p.capacity}) {
      fail(op, "slot_mapping", "slots below the capacity of " + std::to_string(p.capacity),
           std::to_string(slot) + " at row " + std::to_string(t));
    }
  }
  for (uint32_t t = 0; p.rotates && t < p.tokens; ++t) {
    if (p.writes && slots[t] < 0 && !p.rope_masked) continue;
    const int64_t position = positions[t];
    if (position < 0 || position >= p.table.max_position) {
      fail(op, "positions", "values in 0 .. " + std::to_string(p.table.max_position - 1),
           std::to_string(position) + " at row " + std::to_string(t));
    }
  }
}

// Where the batch fills the device anyway, a lane group takes several heads.
void Update::place(int part, HeadPart& heads, int64_t rows, int max_heads, int64_t lane_chunks) {
  if (heads.count == 0) return;
  const uint32_t log2 = log2_lanes(lane_chunks);
  while (heads.group_heads < max_heads && heads.group_heads < heads.count &&
         (rows * heads.count << log2) > heads.group_heads * resident_lanes(device)) {
    heads.group_heads *= 2;
  }
  const int64_t groups = (heads.count + heads.group_heads - 1) / heads.group_heads;
  if (rows * groups > INT32_MAX) fail(op, "q", "fewer than 2^31 heads in all", rows * groups);
  heads.groups = Divisor(static_cast<uint32_t>(groups));
  grid.part[part] = {static_cast<uint32_t>(rows * groups), log2};
}

void Update::finish(int64_t query_tokens) {
  PrologueParams& p = params;
  if (query_tokens == 0 || (!p.writes && !p.rotates)) return;
  if (!p.writes) p.slots = p.positions;
  if (!p.rotates) p.positions = p.slots;
  p.table.angle_shift = aligned && !p.table.is_neox ? 1 : 0;
  check_values();
  copies = aligned && p.rows.code == Code::verbatim && p.query_code == Code::verbatim;
  const int64_t chunk_used = aligned ? chunk : 1, latent_dim = p.latent_dim,
                rope_chunks = p.table.half_dim / chunk_used;
  if (p.kv_c) {
    const uint32_t log2 = log2_lanes((latent_dim + 7) / 8);
    const int64_t eights = (latent_dim + 7) / 8, lanes = int64_t{1} << log2;
    // So few rows leave lanes idle on any GPU. Both halves read all of a row, so it must not change meanwhile.
    p.halves =
        !copies && kHalvesLatent && eights > lanes && eights <= 2 * lanes && p.tokens <= 512 && p.kv_c_out != p.kv_c;
    grid.part[0] = {p.halves ? 2 * p.tokens : p.tokens, log2};
  }
  place(1, p.key, p.tokens, 1, rope_chunks);
  place(2, p.query, query_tokens, kMaxGroupHeads, rope_chunks);
  if (!p.nope_from) p.nope.group_heads = p.nope.count;
  place(3, p.nope, query_tokens, kMaxGroupHeads, latent_dim / chunk_used);
}

}  // namespace latentkv
