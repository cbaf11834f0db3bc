// Where tensors lie in memory: do two of them share bytes, does one overlap itself? Strides so irregular that nothing
// can be told count as an overlap. python/latentkv/cache/geometry.py is its twin.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

namespace latentkv {

using torch::stable::Tensor;

// The bytes of a tensor, or of the first `width` elements of its last dimension. No tensor here has over four
// dimensions.
struct Span {
  struct Dim {
    int64_t stride, size;
  };
  int64_t begin = 0, end = 0;  // the same where there are no bytes
  int64_t item = 0;
  std::array<Dim, 4> dims;
  int count = 0;

  explicit Span(const Tensor& t, int64_t width = -1) : item(static_cast<int64_t>(t.element_size())) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t last = t.dim() - 1;
    int64_t extent = item;
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t size = i == last && width >= 0 ? width : sizes[i];
      if (size == 0) return;
      if (size == 1) continue;
      dims[count++] = {strides[i] * item, size};
      extent += strides[i] * item * (size - 1);
    }
    begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data_ptr()));
    end = begin + extent;
  }
  // What it takes of every `period` bytes, counted from `begin`.
  int64_t within(int64_t period) const {
    int64_t bytes = item;
    for (int i = 0; i < count; ++i) bytes += dims[i].stride % period ? dims[i].stride * (dims[i].size - 1) : 0;
    return bytes;
  }
};

// Apart are tensors whose address ranges are, and those that lie side by side in every period of some stride: slices of
// one projection, views of one buffer that interleave by entry or by block.
inline bool share_bytes(const Span& a, const Span& b) {
  if (a.end <= b.begin || b.end <= a.begin) return false;
  for (const Span* span : {&a, &b}) {
    for (int i = 0; i < span->count; ++i) {
      const int64_t period = span->dims[i].stride;
      if (period <= 0) continue;
      const int64_t phase = ((b.begin - a.begin) % period + period) % period;
      if (a.within(period) <= phase && phase + b.within(period) <= period) return false;
    }
  }
  return true;
}

// By rising stride, each dimension must step over what lies within it.
inline bool overlaps_itself(const Tensor& t) {
  Span span(t);
  if (span.begin == span.end) return false;
  std::sort(span.dims.begin(), span.dims.begin() + span.count,
            [](const Span::Dim& a, const Span::Dim& b) { return a.stride < b.stride; });
  int64_t extent = span.item;
  for (int i = 0; i < span.count; ++i) {
    if (span.dims[i].stride < extent) return true;
    extent += span.dims[i].stride * (span.dims[i].size - 1);
  }
  return false;
}

}  // namespace latentkv
