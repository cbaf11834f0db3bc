// What lies between the projections and attention of a decode step, in one launch: the query put together of its latent
// part and its rotated part, RMSNorm of the latent vector, and the cache row.
#include "vendor.h"
//
#include "cache_update.h"
#include "ops.h"

namespace latentkv {
namespace {

// Where the query comes from and goes.
void bind_query_out(Update& update, const DecodePrologue& x) {
  PrologueParams& p = update.params;
  p.query_code = code_of(x.q_out->scalar_type());
  if (p.query_code != Code::verbatim && x.q_scale) {
    p.query_scale = static_cast<const float*>(x.q_scale->data_ptr());
    check_scale(x.name, "q_scale", x.q_scale, x.device);
  }
  p.nope = update.heads_of(x.q_out);
  p.rope_out = p.nope.data + x.L * static_cast<int64_t>(x.q_out->element_size());
  p.rope_token_stride = p.nope.token_stride, p.rope_head_stride = p.nope.head_stride;
  if (x.q_rope_out) {
    const HeadPart part = update.heads_of(x.q_rope_out);
    p.rope_out = part.data, p.rope_token_stride = part.token_stride, p.rope_head_stride = part.head_stride;
  }
  if (x.q_nope) {
    const HeadPart part = update.heads_of(x.q_nope);
    p.nope_from = part.data;
    p.nope_from_token_stride = part.token_stride, p.nope_from_head_stride = part.head_stride;
  }
}

void bind_norm(Update& update, const DecodePrologue& x) {
  if (!x.kv_norm_weight) return;
  Norm& norm = update.params.norm;
  norm.weight = static_cast<const char*>(x.kv_norm_weight->data_ptr());
  norm.weight_is_wide = x.kv_norm_weight->scalar_type() != update.activation;
  norm.dim = static_cast<float>(x.L);
  norm.inverse_dim = (x.L & (x.L - 1)) == 0 ? 1.f / norm.dim : 0.f;
  norm.eps = static_cast<float>(x.kv_norm_eps);
  update.align(norm.weight, 16, {});
  if (!x.kv_c_out) return;
  PrologueParams& p = update.params;
  p.kv_c_out = static_cast<char*>(x.kv_c_out->data_ptr());
  p.kv_c_out_stride = x.kv_c_out->stride(0) * static_cast<int64_t>(x.kv_c_out->element_size());
  update.align(p.kv_c_out, 16, {p.kv_c_out_stride});
}

}  // namespace

void run(const DecodePrologue& x) {
  Update update(x.name, x.device, *x.kv_c, x.T);
  update.bind_rotation(x.rotation, x.R, x.rope_masked);
  update.bind_slots(*x.slot_mapping, x.cache);
  update.bind_rows(*x.kv_c, x.cache);
  update.bind_key(x.k_pe);
  update.bind_query(x.q_pe);
  bind_query_out(update, x);
  bind_norm(update, x);
  update.finish(x.N);
  launch_update<true>(update);
}

}  // namespace latentkv
