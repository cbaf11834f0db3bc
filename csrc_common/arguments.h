// Argument checks on the host. Every failure says the op, the argument, what was expected and what came, and is raised
// before anything is written. python/latentkv/ops/checks.py states the same rules for the providers written in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

namespace latentkv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own name of a dtype, as Python prints it.
inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e4m3fnuz: return "float8_e4m3fnuz";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e5m2fnuz: return "float8_e5m2fnuz";
    default: return torch::headeronly::toString(type);
  }
}

inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}
inline std::string shape_of(const Tensor& t) {
  return list(t.sizes());
}

class Arguments {
 public:
  Arguments(const char* op, const char* device_type, int device)
      : op_(op), device_type_(device_type), device_(device) {}

  [[noreturn]] void fail(const std::string& argument, const std::string& expected, const std::string& got) const {
    throw std::runtime_error("latentkv." + std::string(op_) + ": " + argument + ": expected " + expected + ", got " +
                             got);
  }
  [[noreturn]] void fail(const std::string& argument, const std::string& expected, int64_t got) const {
    fail(argument, expected, std::to_string(got));
  }

  // A tensor on the op's device whose last dimension is contiguous; A size of -1 matches any.
  void tensor(const char* argument, const Tensor& t, std::initializer_list<ScalarType> types,
              std::initializer_list<std::pair<const char*, int64_t>> shape) const {
    device(argument, t);
    dtype(argument, t, types);
    const auto sizes = t.sizes();
    bool matches = sizes.size() == shape.size();
    size_t i = 0;
    for (const auto& [name, size] : shape) matches = matches && (size < 0 || sizes[i] == size) && ++i;
    if (!matches) {
      std::string text;
      for (const auto& [name, size] : shape) {
        text += (text.empty() ? "" : ", ") + std::string(name) + (size < 0 ? "" : "=" + std::to_string(size));
      }
      fail(argument, "shape [" + text + "]", list(sizes));
    }
    unit_stride(argument, t);
  }

  void unit_stride(const char* argument, const Tensor& t) const {
    const auto sizes = t.sizes(), strides = t.strides();
    const size_t last = sizes.size() - 1;
    if (sizes.size() > 0 && sizes[last] > 1 && strides[last] != 1) {
      fail(argument, "a contiguous last dimension (stride 1)", "stride " + std::to_string(strides[last]));
    }
  }

  void device(const char* argument, const Tensor& t) const {
    if (device_ < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device_) return;
    const std::string got = t.is_cpu()    ? "cpu"
                            : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index())
                                          : "another device";
    fail(argument, "a tensor on " + device_name(), "one on " + got);
  }

  void dtype(const char* argument, const Tensor& t, std::initializer_list<ScalarType> types) const {
    const ScalarType type = t.scalar_type();
    if (std::find(types.begin(), types.end(), type) != types.end()) return;
    std::string text;
    for (ScalarType allowed : types) text += (text.empty() ? "" : " or ") + name_of(allowed);
    fail(argument, "dtype " + text, name_of(type));
  }

  // No two elements share memory: taken by rising stride, each dimension steps over what lies within it.
  void no_overlap(const char* argument, const Tensor& t) const {
    std::array<std::pair<int64_t, int64_t>, 4> dims;  // (stride, size), sorted; no tensor here has more dimensions
    size_t count = 0;
    const auto sizes = t.sizes(), strides = t.strides();
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] == 0) return;
      if (sizes[i] == 1) continue;
      size_t at = count++;
      for (; at > 0 && dims[at - 1].first > strides[i]; --at) dims[at] = dims[at - 1];
      dims[at] = {strides[i], sizes[i]};
    }
    int64_t extent = 1;
    for (size_t i = 0; i < count; ++i) {
      const auto [stride, size] = dims[i];
      if (stride < extent) {
        fail(argument, "elements that do not overlap in memory",
             "strides " + list(strides) + " for shape " + shape_of(t));
      }
      extent += stride * (size - 1);
    }
  }

 private:
  std::string device_name() const { return device_ < 0 ? "cpu" : device_type_ + (":" + std::to_string(device_)); }

  const char* op_;
  const char* device_type_;
  int device_;
};

// Whether two regular sets of byte ranges, `a` starting `offset` bytes after `b`, lie side by side in every period.
inline bool side_by_side(int64_t offset, int64_t period, int64_t a_bytes, int64_t b_bytes) {
  const int64_t phase = ((offset % period) + period) % period;
  return phase >= b_bytes && phase + a_bytes <= period;
}

}  // namespace latentkv
