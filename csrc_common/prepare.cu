#include "vendor.h"
//
#include "prepare.h"

namespace latentkv {
namespace {

void check_one(const Arguments& args, const char* name, const Tensor* t) {
  if (!t) return;
  args.device(name, *t);
  args.dtype(name, *t, {ScalarType::Float});
  if (t->numel() != 1) args.fail(name, "one element", "shape " + shape_of(*t));
}

// A tensor of rows, [B, bs, C] or [B, 1, bs, C].
void check_rows(const Arguments& args, const FormatInfo& format, const char* name, const Tensor& t,
                const std::string& least, int64_t row) {
  args.device(name, t);
  if (t.scalar_type() != format.type && !(format.bytes_too && t.scalar_type() == ScalarType::Byte)) {
    args.fail(name,
              "dtype " + name_of(format.type) + (format.bytes_too ? " or uint8" : "") + " for format " + format.name,
              name_of(t.scalar_type()));
  }
  if (!(t.dim() == 3 || (t.dim() == 4 && t.size(1) == 1))) {
    args.fail(name, "shape [B, bs, C] or [B, 1, bs, C]", shape_of(t));
  }
  if (t.size(t.dim() - 1) < row) {
    args.fail(name, "rows of at least " + least, t.size(t.dim() - 1));
  }
  args.unit_stride(name, t);
  args.no_overlap(name, t);
}

void check_elements(const Arguments& args, const FormatInfo& format, const char* name, const Tensor& t,
                    const char* what, int64_t row) {
  check_rows(args, format, name, t, std::string(what) + "=" + std::to_string(row) + " elements", row);
}

void check_capacity(const Arguments& args, const char* name, const CacheView& view) {
  const int64_t rows = view.blocks * view.block_size;
  if (rows > INT32_MAX) args.fail(name, "fewer than 2^31 rows", rows);
}

// That rows of a_row bytes in one tensor and b_row bytes in the other share no byte.
void check_apart(const Arguments& args, const Stored& stored, int64_t a_row, int64_t b_row) {
  const Tensor &cache = *stored.cache, &rope_cache = *stored.rope_cache;
  const CacheView a(cache), b(rope_cache);
  const std::string name = stored.name;
  if (a.blocks != b.blocks || a.block_size != b.block_size) {
    args.fail(stored.rope_name, "the blocks of " + name + ": " + shape_of(cache), shape_of(rope_cache));
  }
  const int64_t offset = static_cast<char*>(rope_cache.data_ptr()) - static_cast<char*>(cache.data_ptr());
  const bool apart =
      a.blocks * a.block_size == 0 || b_row == 0 || offset >= a.bytes(a_row) || -offset >= b.bytes(b_row);
  const bool same_blocks = a.block_stride == b.block_stride || a.blocks == 1;
  const bool entries_apart = same_blocks && a.entry_stride == b.entry_stride && a.entry_stride > 0 &&
                             a.block_stride % a.entry_stride == 0 && side_by_side(offset, a.entry_stride, b_row, a_row);
  const bool blocks_apart =
      same_blocks && a.blocks > 1 && side_by_side(offset, a.block_stride, b.block_bytes(b_row), a.block_bytes(a_row));
  if (!(apart || entries_apart || blocks_apart)) {
    args.fail(stored.rope_name, "a tensor that shares no bytes with " + name, "overlapping memory");
  }
}

}  // namespace

CacheView check_packed(const Arguments& args, const FormatInfo& format, const char* name, const Tensor& cache) {
  const std::string row = std::to_string(format.row_bytes) + " bytes";
  check_rows(args, format, name, cache, row, format.row_bytes);
  const CacheView view(cache);
  if (format.footed && view.block_size > 1 && view.entry_stride != format.row_bytes) {
    args.fail(name, "entries " + row + " apart, as scales lie after a block's rows", view.entry_stride);
  }
  const auto address = reinterpret_cast<uintptr_t>(cache.data_ptr());
  if (address % 4 || (view.blocks > 1 && view.block_stride % 4) || (view.block_size > 1 && view.entry_stride % 4)) {
    args.fail(name, "rows that start at a multiple of 4 bytes",
              "address " + std::to_string(address % 4) + " modulo 4 and strides " + list(cache.strides()));
  }
  check_capacity(args, name, view);
  return view;
}

const FormatInfo& known_format(const Arguments& args, const char* argument, const std::string& name) {
  for (const FormatInfo& known : kFormats) {
    if (name == known.name) return known;
  }
  args.fail(argument, "a known format name", "'" + name + "'");
}

// The tensors of a cache and its scale, for rows of so many elements, which are those of a packed format.
void check_stored(const Arguments& args, const Stored& stored, const FormatInfo& format, int64_t latent_dim,
                  int64_t rope_dim) {
  if (format.tile) {
    if (stored.rope_cache) args.fail(stored.rope_name, std::string("None for format ") + format.name, "a tensor");
    check_packed(args, format, stored.name, *stored.cache);
  } else if (stored.rope_cache) {
    check_elements(args, format, stored.name, *stored.cache, "L", latent_dim);
    check_elements(args, format, stored.rope_name, *stored.rope_cache, "R", rope_dim);
    check_apart(args, stored, latent_dim * format.bytes(), rope_dim * format.bytes());
  } else {
    check_elements(args, format, stored.name, *stored.cache, "L + R", latent_dim + rope_dim);
  }
  check_capacity(args, stored.name, CacheView(*stored.cache));
  check_one(args, stored.scale_name, stored.scale);
}

namespace {

Stored stored_of(const Call& call) {
  return {call.cache, call.rope_cache, call.scale, call.cache_name, call.rope_cache_name, call.scale_name};
}

const FormatInfo& check_cache(const Arguments& args, const Call& call, int64_t latent_dim, int64_t rope_dim) {
  const FormatInfo& format = known_format(args, "format", *call.format);
  const ScalarType copied = format.tile ? ScalarType::BFloat16 : format.type;
  if ((format.tile || format.code == Code::verbatim) && call.kv_c->scalar_type() != copied) {
    args.fail(call.kv_c_name, "dtype " + name_of(copied) + " for format " + format.name,
              name_of(call.kv_c->scalar_type()));
  }
  const auto dim = [&](const char* name, const std::string& what, int64_t expected, int64_t got) {
    if (got != expected) args.fail(name, what + std::to_string(expected) + " for format " + format.name, got);
  };
  if (format.tile) {
    dim(call.kv_c_name, "L=", format.latent_dim, latent_dim);
    dim(call.k_name, "R=", format.rope_dim, rope_dim);
  }
  check_stored(args, stored_of(call), format, latent_dim, rope_dim);
  return format;
}

// What only the decode prologue takes.
void check_prologue(const Arguments& args, const Call& call, ScalarType activation, int64_t n, int64_t latent_dim) {
  const int64_t heads = call.q->size(1), rope_dim = call.q->size(2);
  if (call.q_nope) {
    args.tensor("q_nope", *call.q_nope, {activation}, {{"N", n}, {"H", heads}, {"L", latent_dim}});
  }
  const auto out_types = {activation, ScalarType::Float8_e4m3fn, ScalarType::Float8_e4m3fnuz, ScalarType::Float8_e5m2};
  if (call.q_rope_out) {
    args.tensor("q_out", *call.q_out, out_types, {{"N", n}, {"H", heads}, {"L", latent_dim}});
    args.tensor("q_rope_out", *call.q_rope_out, {call.q_out->scalar_type()}, {{"N", n}, {"H", heads}, {"R", rope_dim}});
    args.no_overlap("q_rope_out", *call.q_rope_out);
  } else {
    args.tensor("q_out", *call.q_out, out_types, {{"N", n}, {"H", heads}, {"L + R", latent_dim + rope_dim}});
  }
  args.no_overlap("q_out", *call.q_out);
  check_one(args, "q_scale", call.q_scale);
  if (call.norm_weight) {
    const std::initializer_list<ScalarType> either = {activation, ScalarType::Float}, wide = {ScalarType::Float};
    args.tensor("kv_norm_weight", *call.norm_weight, activation == ScalarType::Float ? wide : either,
                {{"L", latent_dim}});
  }
  if (!call.kv_c_out) return;
  if (!call.norm_weight) args.fail("kv_c_out", "None without kv_norm_weight", "a tensor");
  args.tensor("kv_c_out", *call.kv_c_out, {activation}, {{"N", n}, {"L", latent_dim}});
  args.no_overlap("kv_c_out", *call.kv_c_out);
}

Code code_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float8_e4m3fn: return Code::e4m3fn;
    case ScalarType::Float8_e4m3fnuz: return Code::e4m3fnuz;
    case ScalarType::Float8_e5m2: return Code::e5m2;
    default: return Code::verbatim;
  }
}

const float* data_of(const Tensor* scale) {
  return scale ? static_cast<const float*>(scale->data_ptr()) : nullptr;
}

}  // namespace

// Where rows of a format lie in a cache.
Rows rows_of(const Stored& stored, const FormatInfo& format, int64_t latent_dim) {
  const CacheView view(*stored.cache), rope_view(stored.rope_cache ? *stored.rope_cache : *stored.cache);
  auto* const data = static_cast<char*>(stored.cache->data_ptr());
  Rows rows;
  rows.block_size = Divisor(static_cast<uint32_t>(std::max<int64_t>(view.block_size, 1)));
  rows.code = format.code, rows.tile = static_cast<uint8_t>(format.tile);
  rows.rope_code = format.tile ? Code::verbatim : format.code;
  if (format.tile == 128) {  // latent | scales | rope
    rows.latent = {data, view.block_stride, view.entry_stride};
    rows.scales = {data + 512, view.block_stride, view.entry_stride};
    rows.rope = {data + 528, view.block_stride, view.entry_stride};
  } else if (format.tile == 64) {  // latent | rope of every row of a block, then their scales
    rows.latent = {data, view.block_stride, 576};
    rows.rope = {data + 448, view.block_stride, 576};
    rows.scales = {data + 576 * view.block_size, view.block_stride, 8};
  } else {
    rows.latent = {data, view.block_stride, view.entry_stride};
    rows.rope = {
        stored.rope_cache ? static_cast<char*>(stored.rope_cache->data_ptr()) : data + latent_dim * format.bytes(),
        rope_view.block_stride, rope_view.entry_stride};
    rows.scale = format.code == Code::verbatim ? nullptr : data_of(stored.scale);
  }
  return rows;
}

Indices indices(const Tensor& t) {
  const auto* const data = static_cast<const char*>(t.data_ptr());
  const uint32_t bytes = t.scalar_type() == ScalarType::Long ? 8 : 4;
  return {data, bytes};
}

// The values of positions and slots, where they are looked at before the launch.
void check_values(const Arguments& args, const Params& p, int device) {
  const HostIndices slots(p.slots, p.tokens, device), positions(p.positions, p.tokens, device);
  for (uint32_t t = 0; t < p.tokens; ++t) {
    const int64_t slot = p.writes ? slots[t] : -1;
    if (slot >= int64_t{p.capacity}) {
      args.fail("slot_mapping", "slots below the capacity of " + std::to_string(p.capacity),
                std::to_string(slot) + " at row " + std::to_string(t));
    }
    if (!p.rotates || (slot < 0 && !p.rope_masked)) continue;
    const int64_t position = positions[t];
    if (position < 0 || position >= p.table.max_position) {
      args.fail("positions", "values in 0 .. " + std::to_string(p.table.max_position - 1),
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

Launch prepare(const Call& call) {
  Launch launch;
  const Tensor& lead = call.kv_c ? *call.kv_c : *call.q;
  launch.device = lead.is_cpu() ? -1 : lead.get_device_index();
  const Arguments args(call.op, kDeviceType, launch.device);

  // Checks. kv_c leads, or q where there is none: it says what device, dtype and N the others must have.
  if (call.kv_c) {
    args.tensor(call.kv_c_name, lead, kActivations, {{"N", -1}, {"L", -1}});
  } else {
    args.tensor(call.q_name, lead, kActivations, {{"N", -1}, {"H", -1}, {"R", -1}});
  }
  const int64_t tokens_all = lead.size(0), latent_dim = call.kv_c ? lead.size(1) : 0;
  const ScalarType activation = launch.activation = lead.scalar_type();
  const bool in_place = call.table && !call.q_out;  // q and k are turned where they lie
  int64_t rope_dim = 0;
  if ((call.positions == nullptr) != (call.table == nullptr)) {
    args.fail(call.table ? "positions" : "cos_sin_cache", "a tensor, as for the other of positions and cos_sin_cache",
              "None");
  }
  if (call.positions) args.tensor("positions", *call.positions, kIndexTypes, {{"N", tokens_all}});
  if (call.q) {
    args.tensor(call.q_name, *call.q, kActivations, {{"N", tokens_all}, {"H", -1}, {"R", -1}});
    rope_dim = call.q->size(2);
    if (in_place) args.no_overlap(call.q_name, *call.q);
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
    if (in_place) args.no_overlap(call.k_name, *call.k);
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
    format = &check_cache(args, call, latent_dim, rope_dim);
  }
  if (call.q_out) check_prologue(args, call, activation, tokens_all, latent_dim);
  const int64_t query_tokens = call.q_out ? tokens_all : tokens;  // a query that goes elsewhere is zero in padding rows
  if (query_tokens == 0) return launch;
  if (query_tokens > INT32_MAX) args.fail(call.q ? call.q_name : call.kv_c_name, "fewer than 2^31 rows", query_tokens);

  // Parameters.
  PrologueParams& p = launch.params;
  p.tokens = static_cast<uint32_t>(tokens);
  p.rope_masked = call.rope_masked;
  p.table.is_neox = call.is_neox, p.table.inverse = call.inverse;
  p.table.half_dim = static_cast<int>(rope_dim / 2);
  const int64_t element = static_cast<int64_t>(lead.element_size()), chunk = 16 / element;
  bool& aligned = launch.aligned = rope_dim % (2 * chunk) == 0 && latent_dim % chunk == 0;
  const auto align = [&](const void* data, int64_t bytes, std::initializer_list<int64_t> strides) {
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int64_t stride : strides) aligned = aligned && stride % bytes == 0;
  };
  if (call.table && rope_dim) {
    const int64_t bytes = static_cast<int64_t>(call.table->element_size());
    launch.wide_angles = bytes == 4;
    p.rotates = true;
    p.positions = indices(*call.positions);
    p.table.data = static_cast<const char*>(call.table->data_ptr());
    p.table.stride = call.table->stride(0) * bytes, p.table.max_position = call.table->size(0);
    p.table.is_bf16 = call.table->scalar_type() == ScalarType::BFloat16;
    align(p.table.data, chunk / 2 * bytes, {p.table.stride});
  }
  const auto head_part = [&](const Tensor& t) {
    const int64_t bytes = static_cast<int64_t>(t.element_size());
    HeadPart part;
    part.data = static_cast<char*>(t.data_ptr()), part.token_stride = t.stride(0) * bytes, part.count = 1;
    if (t.dim() == 3) part.head_stride = t.stride(1) * bytes, part.count = static_cast<int>(t.size(1));
    align(part.data, chunk * bytes, {part.token_stride, part.head_stride});
    return part;
  };
  if (call.q && rope_dim && (in_place || call.q_out)) p.query = head_part(*call.q);
  if (call.k && rope_dim) p.key = head_part(*call.k);
  if (call.slots) {
    p.writes = true;
    p.slots = indices(*call.slots);
    p.kv_c = static_cast<const char*>(call.kv_c->data_ptr());
    p.kv_c_stride = call.kv_c->stride(0) * element, p.latent_dim = static_cast<int>(latent_dim);
    align(p.kv_c, 16, {p.kv_c_stride});
    const CacheView view(*call.cache);
    p.capacity = static_cast<uint32_t>(view.blocks * view.block_size);
    p.rows = rows_of(stored_of(call), *format, latent_dim);
    const int64_t bytes = format->tile ? 16 : chunk * format->bytes();
    align(p.rows.latent.data, bytes, {p.rows.latent.block_stride, p.rows.latent.entry_stride});
    if (rope_dim) align(p.rows.rope.data, bytes, {p.rows.rope.block_stride, p.rows.rope.entry_stride});
  }
  if (call.q_out) {
    const int64_t bytes = static_cast<int64_t>(call.q_out->element_size());
    p.query_code = code_of(call.q_out->scalar_type());
    p.query_scale = p.query_code == Code::verbatim ? nullptr : data_of(call.q_scale);
    p.nope = head_part(*call.q_out);
    p.rope_out = p.nope.data + latent_dim * bytes;
    p.rope_token_stride = p.nope.token_stride, p.rope_head_stride = p.nope.head_stride;
    if (call.q_rope_out) {
      const HeadPart part = head_part(*call.q_rope_out);
      p.rope_out = part.data, p.rope_token_stride = part.token_stride, p.rope_head_stride = part.head_stride;
    }
    if (call.q_nope) {
      const HeadPart part = head_part(*call.q_nope);
      p.nope_from = part.data;
      p.nope_from_token_stride = part.token_stride, p.nope_from_head_stride = part.head_stride;
    }
    if (call.norm_weight) {
      p.norm.weight = static_cast<const char*>(call.norm_weight->data_ptr());
      p.norm.weight_is_wide = call.norm_weight->scalar_type() != activation;
      p.norm.dim = static_cast<float>(latent_dim);
      p.norm.inverse_dim = (latent_dim & (latent_dim - 1)) == 0 ? 1.f / p.norm.dim : 0.f;
      p.norm.eps = static_cast<float>(call.norm_eps);
      align(p.norm.weight, 16, {});
    }
    if (call.kv_c_out) {
      p.kv_c_out = static_cast<char*>(call.kv_c_out->data_ptr());
      p.kv_c_out_stride = call.kv_c_out->stride(0) * element;
      align(p.kv_c_out, 16, {p.kv_c_out_stride});
    }
  }
  if (!p.writes && !p.rotates) return launch;
  if (!p.writes) p.slots = p.positions;
  if (!p.rotates) p.positions = p.slots;
  p.table.angle_shift = aligned && !call.is_neox ? 1 : 0;
  p.table.angle_step = static_cast<int>(call.is_neox ? chunk / 2 : rope_dim / 4);
  if (checks_values(launch.device)) check_values(args, p, launch.device);

  launch.copies = aligned && p.rows.code == Code::verbatim && p.query_code == Code::verbatim;

  // The grid. Where the batch fills the device anyway, a lane group takes several heads.
  const int64_t chunk_used = aligned ? chunk : 1;
  const uint32_t log2_latent_lanes = log2_lanes((latent_dim + 7) / 8);
  Part* const parts = launch.grid.part;
  if (call.slots) {
    const int64_t eights = (latent_dim + 7) / 8, lanes = int64_t{1} << log2_latent_lanes;
    // So few rows leave lanes idle on any GPU. Both halves read all of a row, so it must not change meanwhile.
    p.halves = !launch.copies && kMaxLog2Lanes > 0 && eights > lanes && eights <= 2 * lanes && tokens <= 512 &&
               p.kv_c_out != p.kv_c;
    parts[0] = {p.halves ? 2 * p.tokens : p.tokens, log2_latent_lanes};
  }
  const auto place = [&](int part, HeadPart& heads, int64_t rows, int max_heads, uint32_t log2, const char* name) {
    if (heads.count == 0) return;
    while (heads.group_heads < max_heads && heads.group_heads < heads.count &&
           (rows * heads.count << log2) > heads.group_heads * resident_lanes(launch.device)) {
      heads.group_heads *= 2;
    }
    const int64_t groups = (heads.count + heads.group_heads - 1) / heads.group_heads;
    if (rows * groups > INT32_MAX) args.fail(name, "fewer than 2^31 heads in all", rows * groups);
    heads.groups = Divisor(static_cast<uint32_t>(groups));
    parts[part] = {static_cast<uint32_t>(rows * groups), log2};
  };
  const uint32_t log2_head_lanes = log2_lanes(rope_dim / 2 / chunk_used);
  place(1, p.key, tokens, 1, log2_head_lanes, call.k_name);
  place(2, p.query, query_tokens, kMaxGroupHeads, log2_head_lanes, call.q_name);
  if (call.q_out) {
    if (!p.nope_from) p.nope.group_heads = p.nope.count;
    place(3, p.nope, query_tokens, kMaxGroupHeads, log2_lanes(latent_dim / chunk_used), "q_out");
  }
  return launch;
}

}  // namespace latentkv
