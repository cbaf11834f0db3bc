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
    for (int64_t i = 0; i <= last; ++i) {
      const int64_t size = i == last && width >= 0 ? width : sizes[i];
      if (size == 0) return;
      if (size == 1) continue;
      dims[count++] = {strides[i] * item, size};
    }
    begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(t.data_ptr()));
    end = begin + extent();
  }
  int64_t extent() const {
    int64_t bytes = item;
    for (int i = 0; i < count; ++i) bytes += dims[i].stride * (dims[i].size - 1);
    return bytes;
  }
  // Without the dimensions that repeat with a period.
  Span within(int64_t period) const {
    Span rest = *this;
    const auto repeats = [&](const Dim& dim) { return dim.stride % period == 0; };
    rest.count =
        static_cast<int>(std::remove_if(rest.dims.begin(), rest.dims.begin() + count, repeats) - rest.dims.begin());
    return rest;
  }
};

// Whether two tensors may share a byte, the second of which begins `distance` after the first. Apart are those whose
// address ranges are, and those whose parts in one period of some stride are: slices of one projection, views of one
// buffer that interleave by entry or by block.
inline bool share_bytes(const Span& a, const Span& b, int64_t distance) {
  if (distance >= a.extent() || distance + b.extent() <= 0) return false;
  for (const Span* span : {&a, &b}) {
    for (int i = 0; i < span->count; ++i) {
      const int64_t period = span->dims[i].stride;
      if (period <= 0) continue;
      // What repeats with the period drops out, if what is left of both lies in one.
      const Span own = a.within(period), other = b.within(period);
      const int64_t first = (distance % period + period) % period;
      for (const int64_t phase : {first, first - period}) {
        const int64_t end = std::max(own.extent(), phase + other.extent());
        if (end - std::min<int64_t>(phase, 0) <= period && !share_bytes(own, other, phase)) return false;
      }
    }
  }
  return true;
}

inline bool share_bytes(const Span& a, const Span& b) {
  return a.begin < b.end && b.begin < a.end && share_bytes(a, b, b.begin - a.begin);
}

// By rising stride, each dimension must step over what lies within it.
inline bool overlaps_itself(Span span) {
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
