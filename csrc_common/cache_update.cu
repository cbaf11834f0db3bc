// The ops that turn q and k in place, write the cache, or both.
#include "vendor.h"
//
#include "cache_update.h"
#include "ops.h"

namespace latentkv {

void rope_(const Tensor& positions, const Tensor& q, const std::optional<Tensor>& k, const Tensor& cos_sin_cache,
           bool is_neox, bool inverse) {
  Call call{.op = "rope_", .positions = &positions, .q = &q, .k = pointer(k), .table = &cos_sin_cache};
  call.q_name = "q", call.k_name = "k", call.is_neox = is_neox, call.inverse = inverse;
  launch_update<false>(prepare(call));
}

void write_cache_(const Tensor& kv_c, const Tensor& k_pe, const Tensor& slot_mapping, const Tensor& cache,
                  const std::optional<Tensor>& rope_cache, const std::optional<Tensor>& scale,
                  const std::string& format) {
  Call call{.op = "write_cache_", .k = &k_pe, .kv_c = &kv_c, .slots = &slot_mapping, .cache = &cache};
  call.rope_cache = pointer(rope_cache), call.scale = pointer(scale), call.format = &format;
  launch_update<false>(prepare(call));
}

void rope_write_cache_(const std::optional<Tensor>& positions, const Tensor& q_pe, const Tensor& k_pe,
                       const Tensor& kv_c, const std::optional<Tensor>& cos_sin_cache, const Tensor& slot_mapping,
                       const Tensor& cache, const std::optional<Tensor>& rope_cache, const std::optional<Tensor>& scale,
                       const std::string& format, bool is_neox, bool rope_masked) {
  Call call{.op = "rope_write_cache_", .positions = pointer(positions), .q = &q_pe, .k = &k_pe, .kv_c = &kv_c};
  call.table = pointer(cos_sin_cache), call.slots = &slot_mapping, call.cache = &cache;
  call.rope_cache = pointer(rope_cache), call.scale = pointer(scale), call.format = &format;
  call.is_neox = is_neox, call.rope_masked = rope_masked;
  launch_update<false>(prepare(call));
}

}  // namespace latentkv
