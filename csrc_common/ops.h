// The ops, as their schemas in python/latentkv/ops/schemas.py have them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace latentkv {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline const Tensor* pointer(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

void rope_(const Tensor& positions, const Tensor& q, const OptionalTensor& k, const Tensor& cos_sin_cache, bool is_neox,
           bool inverse);

void write_cache_(const Tensor& kv_c, const Tensor& k_pe, const Tensor& slot_mapping, const Tensor& cache,
                  const OptionalTensor& rope_cache, const OptionalTensor& scale, const std::string& format);

void write_cache_grouped_(const std::vector<Tensor>& kv_c, const std::vector<Tensor>& k_pe, const Tensor& slot_mapping,
                          const std::vector<Tensor>& caches, const std::vector<Tensor>& rope_caches,
                          const std::vector<OptionalTensor>& scales, const std::string& format);

void rope_write_cache_(const OptionalTensor& positions, const Tensor& q_pe, const Tensor& k_pe, const Tensor& kv_c,
                       const OptionalTensor& cos_sin_cache, const Tensor& slot_mapping, const Tensor& cache,
                       const OptionalTensor& rope_cache, const OptionalTensor& scale, const std::string& format,
                       bool is_neox, bool rope_masked);

void decode_prologue(const OptionalTensor& q_nope, const Tensor& q_pe, const Tensor& kv_c, const Tensor& k_pe,
                     const OptionalTensor& positions, const OptionalTensor& cos_sin_cache, const Tensor& slot_mapping,
                     const Tensor& cache, const OptionalTensor& rope_cache, const OptionalTensor& scale,
                     const std::string& format, const Tensor& q_out, const OptionalTensor& q_rope_out,
                     const OptionalTensor& kv_c_out, const OptionalTensor& q_scale,
                     const OptionalTensor& kv_norm_weight, bool is_neox, double kv_norm_eps, bool rope_masked);

void write_indexer_cache_(const Tensor& k, const OptionalTensor& positions, const OptionalTensor& cos_sin_cache,
                          const Tensor& slot_mapping, const Tensor& cache, bool is_neox, bool power_of_two_scale);

void gather_cache(const Tensor& cache, const OptionalTensor& rope_cache, const OptionalTensor& scale,
                  const std::string& format, const Tensor& block_table, const Tensor& cu_seq_lens, const Tensor& out,
                  int64_t kv_lora_rank, const OptionalTensor& seq_starts);

void convert_cache_(const Tensor& src, const OptionalTensor& src_rope, const OptionalTensor& src_scale,
                    const std::string& src_format, const Tensor& dst, const OptionalTensor& dst_rope,
                    const OptionalTensor& dst_scale, const std::string& dst_format, int64_t kv_lora_rank,
                    int64_t rope_dim, const OptionalTensor& src_blocks, const OptionalTensor& dst_blocks);

}  // namespace latentkv
