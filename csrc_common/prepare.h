// From the checked arguments of an op to what its kernel is launched with: each function binds one thing.
#pragma once

#include <algorithm>
#include <string>

#include "arguments.h"
#include "params.h"

namespace latentkv {

// Calls `f.template operator()<A, n>()` for the activations and the width of access.
template <class F>
void dispatch(ScalarType activation, bool aligned, const F& f) {
  switch (activation) {
    case ScalarType::BFloat16: return aligned ? f.template operator()<Bf16, 8>() : f.template operator()<Bf16, 1>();
    case ScalarType::Half: return aligned ? f.template operator()<Fp16, 8>() : f.template operator()<Fp16, 1>();
    default: return aligned ? f.template operator()<Fp32, 4>() : f.template operator()<Fp32, 1>();
  }
}

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

Indices indices(const Tensor& t);
// Where the rows of a cache lie.
Rows rows_of(const Cache& cache);
uint32_t log2_lanes(int64_t chunks);
// Under LATENTKV_CHECKS: a scale is a positive number.
void check_scale(const char* op, const Name& name, const Tensor* scale, int device);

// A launch of the cache-update kernel, or of one that shares its parameters.
struct Update {
  const char* op;
  int device;
  PrologueParams params;
  Grid<4> grid;  // of a CacheUpdate; nothing in it where there is nothing to do
  ScalarType activation;
  int64_t chunk;        // elements of 16 bytes
  bool aligned = true;  // every chunk is one access of 16 bytes
  bool copies = false;  // what is stored is stored as it is, by whole chunks

  // For tokens with activations of the dtype of `lead`.
  Update(const char* op, int device, const Tensor& lead, int64_t tokens);

  void bind_rotation(const Rotation& rotation, int64_t rope_dim, bool rope_masked);
  void bind_slots(const Tensor& slots, const Cache& cache);
  void bind_rows(const Tensor& kv_c, const Cache& cache);
  void bind_key(const Tensor* k) { params.key = heads_of(k); }
  void bind_query(const Tensor* q) { params.query = heads_of(q); }
  // Raises what is wrong with the values of slots and positions, where they are looked at; then lays out the grid.
  void finish(int64_t query_tokens);

  HeadPart heads_of(const Tensor* t);  // none where there are no elements
  void align(const void* data, int64_t bytes, std::initializer_list<int64_t> strides);
  void check_values() const;

 private:
  void place(int part, HeadPart& heads, int64_t rows, int max_heads, int64_t lane_chunks);
};

}  // namespace latentkv
