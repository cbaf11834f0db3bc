// What lies between the projections and attention of a decode step, in one launch: the query put together of its latent
// part and its rotated part, RMSNorm of the latent vector, and the cache row.
#include "vendor.h"
//
#include "cache_update.h"
#include "ops.h"

namespace latentkv {

void decode_prologue(const std::optional<Tensor>& q_nope, const Tensor& q_pe, const Tensor& kv_c, const Tensor& k_pe,
                     const std::optional<Tensor>& positions, const std::optional<Tensor>& cos_sin_cache,
                     const Tensor& slot_mapping, const Tensor& cache, const std::optional<Tensor>& rope_cache,
                     const std::optional<Tensor>& scale, const std::string& format, const Tensor& q_out,
                     const std::optional<Tensor>& q_rope_out, const std::optional<Tensor>& kv_c_out,
                     const std::optional<Tensor>& q_scale, const std::optional<Tensor>& kv_norm_weight, bool is_neox,
                     double kv_norm_eps, bool rope_masked) {
  Call call{.op = "decode_prologue", .positions = pointer(positions), .q = &q_pe, .k = &k_pe, .kv_c = &kv_c};
  call.table = pointer(cos_sin_cache), call.slots = &slot_mapping, call.cache = &cache;
  call.rope_cache = pointer(rope_cache), call.scale = pointer(scale), call.format = &format;
  call.is_neox = is_neox, call.rope_masked = rope_masked;
  call.q_nope = pointer(q_nope), call.q_out = &q_out, call.q_rope_out = pointer(q_rope_out);
  call.q_scale = pointer(q_scale), call.norm_weight = pointer(kv_norm_weight), call.kv_c_out = pointer(kv_c_out);
  call.norm_eps = kv_norm_eps;
  launch_update<true>(prepare(call));
}

}  // namespace latentkv
