// What a launch of the cache-update kernel needs to know. Strides count elements of the tensor they belong to; cache
// strides count bytes, because a row may mix element types.
#pragma once

#include <cstdint>

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

// Query heads or key heads: [tokens, count, rope_dim]. A token's take `groups` lane groups of up to `group_heads` each.
struct HeadPart {
  char* data = nullptr;
  int64_t token_stride = 0, head_stride = 0;
  int count = 0, group_heads = 1;
  Divisor groups;
};

// One part (latent or rope) of every cache row.
struct RowPart {
  char* data = nullptr;
  int64_t block_stride = 0, entry_stride = 0;
};

// All strides count bytes. What the query heads need comes first: constants arrive by the cache line.
struct Params {
  HeadPart query;
  Indices slots;          // [tokens]; where there is no cache, anything that may be read
  Indices positions;      // [tokens]; where nothing is rotated, likewise
  int half_dim = 0;       // R/2
  uint32_t capacity = 0;  // slots 0 .. capacity-1 exist
  bool writes = false, rotates = false, rope_masked = false, is_neox = false, inverse = false;
  bool table_is_bf16 = false;  // where its angles have 16 bits

  const char* table = nullptr;  // [max_position, rope_dim]: cos half | sin half
  int64_t table_stride = 0, max_position = 0;
  // A lane takes n angles in two runs of n/2: from c >> angle_shift on, and angle_step further.
  int angle_shift = 0, angle_step = 0;

  HeadPart key;
  RowPart rope, latent;
  Divisor block_size;
  const float* scale = nullptr;  // one element, or null for 1

  const char* kv_c = nullptr;  // [tokens, latent_dim]
  int64_t kv_c_stride = 0;
  int latent_dim = 0;
  uint32_t tokens = 0;
};

}  // namespace latentkv
