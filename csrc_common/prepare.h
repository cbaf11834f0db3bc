// From the arguments of an op to what its kernel is launched with.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "arguments.h"
#include "params.h"

namespace latentkv {

// The arguments of the ops that update a cache. What an op does not take is null.
struct Call {
  const char* op;
  const Tensor *positions = nullptr, *q = nullptr, *k = nullptr, *kv_c = nullptr, *table = nullptr, *slots = nullptr;
  const Tensor *cache = nullptr, *rope_cache = nullptr, *scale = nullptr;
  const char *q_name = "q_pe", *k_name = "k_pe", *kv_c_name = "kv_c";
  const char *cache_name = "cache", *rope_cache_name = "rope_cache", *scale_name = "scale";
  const std::string* format = nullptr;
  bool is_neox = false, rope_masked = true, inverse = false;

  // Of the decode prologue, which is the op that has q_out: it leaves q and k as they are.
  const Tensor *q_nope = nullptr, *q_out = nullptr, *q_rope_out = nullptr, *q_scale = nullptr;
  const Tensor *norm_weight = nullptr, *kv_c_out = nullptr;
  double norm_eps = 0;
};

struct Launch {
  PrologueParams params;
  Grid<4> grid;  // of a CacheUpdate; nothing in it where there is nothing to do
  ScalarType activation = ScalarType::Float;
  bool aligned = false;      // every chunk is one access of 16 bytes
  bool wide_angles = false;  // the table is fp32
  bool copies = false;       // what is stored is stored as it is, by whole chunks
  int device = -1;
};

// Raises what is wrong with the arguments, before anything is written.
Launch prepare(const Call& call);

// Calls `f.template operator()<A, n>()` for the activations and the width of access.
template <class F>
void dispatch(ScalarType activation, bool aligned, const F& f) {
  switch (activation) {
    case ScalarType::BFloat16: return aligned ? f.template operator()<Bf16, 8>() : f.template operator()<Bf16, 1>();
    case ScalarType::Half: return aligned ? f.template operator()<Fp16, 8>() : f.template operator()<Fp16, 1>();
    default: return aligned ? f.template operator()<Fp32, 4>() : f.template operator()<Fp32, 1>();
  }
}

constexpr auto kActivations = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float};
constexpr auto kIndexTypes = {ScalarType::Long, ScalarType::Int};

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

// A cache as an op takes it, and the names of its arguments.
struct Stored {
  const Tensor *cache, *rope_cache, *scale;  // the latter two: null for None
  const char *name = "cache", *rope_name = "rope_cache", *scale_name = "scale", *format_name = "format";
};

// int32 or int64 values on the host.
class HostIndices {
 public:
  HostIndices(const Indices& x, int64_t count, int device) : view_(x.data, count * x.bytes, device), bytes_(x.bytes) {}
  int64_t operator[](int64_t i) const {
    return bytes_ == 8 ? static_cast<const int64_t*>(view_.data())[i] : static_cast<const int32_t*>(view_.data())[i];
  }

 private:
  HostView view_;
  uint32_t bytes_;
};

// Parts that several ops are prepared from.
const FormatInfo& known_format(const Arguments& args, const char* argument, const std::string& name);
void check_stored(const Arguments& args, const Stored& stored, const FormatInfo& format, int64_t latent_dim,
                  int64_t rope_dim);
Rows rows_of(const Stored& stored, const FormatInfo& format, int64_t latent_dim);
CacheView check_packed(const Arguments& args, const FormatInfo& format, const char* name, const Tensor& cache);
Indices indices(const Tensor& t);
void check_values(const Arguments& args, const Params& p, int device);
uint32_t log2_lanes(int64_t chunks);

}  // namespace latentkv
