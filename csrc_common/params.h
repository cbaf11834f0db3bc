// What a launch of the cache-update kernel needs to know.
#pragma once

#include <cstdint>

#include "formats.h"

namespace latentkv {

// n / d for 0 <= n < 2^31 by a multiply and a shift (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t d = 1, multiplier = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : d(divisor) {
    while ((uint64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  LKV_DEVICE uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>((uint64_t{n} * multiplier) >> 32) + n) >> shift;
  }
};

// int32 or int64 values, one per token, read as 32-bit words: the lowest and the highest, which may be the same. No
// load depends on the type, so none waits for another.
struct Indices {
  const char* data = nullptr;
  uint32_t bytes = 4;  // of a value: 4 or 8
  struct Loaded {
    int32_t low, high;
  };
  LKV_DEVICE Loaded load(uint32_t i) const {
    const char* const at = data + uint64_t{i} * bytes;
    return {*reinterpret_cast<const int32_t*>(at), *reinterpret_cast<const int32_t*>(at + (bytes - 4))};
  }
  LKV_DEVICE int64_t value(Loaded x) const {
    const int32_t high = bytes == 8 ? x.high : x.high >> 31;
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                                static_cast<uint32_t>(x.low));
  }
};

// Heads of queries or keys, [tokens, count, dim]. A token's take `groups` lane groups of up to `group_heads` each.
struct HeadPart {
  char* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
  int count = 0, group_heads = 1;
  Divisor groups;
};

// One part (latent, rope or scales) of every cache row.
struct RowPart {
  char* data = nullptr;
  int64_t block_stride = 0, entry_stride = 0;

  LKV_DEVICE char* at(uint32_t block, uint32_t entry) const {
    return data + block * block_stride + entry * entry_stride;
  }
};

// Where rows go, and how their elements are stored.
struct Rows {
  Divisor block_size;
  Code code = Code::verbatim, rope_code = Code::verbatim;
  uint8_t tile = 0;              // elements of a tile: 128 (fp8_ds_mla), 64 (fp8_model1), or 0 where nothing is packed
  const float* scale = nullptr;  // one element, or null for 1
  RowPart rope, latent, scales;  // scales: of tiles, where a format is packed

  LKV_DEVICE char* at(const RowPart& part, uint32_t slot) const {
    const uint32_t block = block_size.divide(slot), entry = slot - block * block_size.d;
    return part.at(block, entry);
  }
};

// The cos/sin table: [max_position, 2 half_dim], cos half | sin half.
struct Table {
  int half_dim = 0;
  // A lane takes n angles in two runs of n/2: from c >> angle_shift on, and angle_step further.
  int angle_shift = 0, angle_step = 0;
  bool is_neox = false, inverse = false;
  bool is_wide = false, is_bf16 = false;  // fp32; which of the 16-bit types it is where it is not
  const char* data = nullptr;
  int64_t stride = 0, max_position = 0;
};

// All strides count bytes. What the query heads need comes first: constants arrive by the cache line.
struct Params {
  HeadPart query;
  Indices slots;          // [tokens]; where there is no cache, anything that may be read
  Indices positions;      // [tokens]; where nothing is rotated, likewise
  uint32_t tokens = 0;    // T
  uint32_t capacity = 0;  // slots 0 .. capacity-1 exist
  bool writes = false, rotates = false, rope_masked = false;
  Table table;
  HeadPart key;
  Rows rows;
  const char* kv_c = nullptr;  // [tokens, latent_dim]
  int64_t kv_c_stride = 0;
  int latent_dim = 0;
  bool halves = false;  // a latent vector has two groups
};

// RMSNorm of the latent vectors.
struct Norm {
  const char* weight = nullptr;    // [dim] of the activation dtype or fp32; null: no RMSNorm
  bool weight_is_wide = false;     // fp32 for 16-bit activations
  float dim = 0, inverse_dim = 0;  // inverse_dim: where that is exact, else 0
  float eps = 0;
};

// What the decode prologue adds: where the query goes, and RMSNorm.
struct PrologueParams : Params {
  Code query_code = Code::verbatim;
  const float* query_scale = nullptr;  // one element, or null for 1
  char* rope_out = nullptr;            // [N, query.count, 2 half_dim]
  int64_t rope_token_stride = 0, rope_head_stride = 0;
  HeadPart nope;                    // [N, count, latent_dim]: where the query's latent part goes
  const char* nope_from = nullptr;  // where it comes from; null: it is there
  int64_t nope_from_token_stride = 0, nope_from_head_stride = 0;

  Norm norm;
  char* kv_c_out = nullptr;  // [tokens, latent_dim], or null
  int64_t kv_c_out_stride = 0;
};

}  // namespace latentkv
