#include "vendor.h"
//
#include "arguments.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <cstring>
#include <stdexcept>

namespace latentkv {
namespace {

// Torch's own name of a dtype, as Python prints it.
std::string name_of(ScalarType type) {
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

std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

bool is_in(const ScalarType* begin, const ScalarType* end, ScalarType type) {
  for (; begin != end; ++begin) {
    if (*begin == type) return true;
  }
  return false;
}

// Which of the tensors requires a gradient, -1 for none. The stable ABI cannot ask a tensor itself.
int64_t which_requires_grad(const std::vector<Tensor>& tensors) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensors)};
  if (torch_call_dispatcher("latentkv::which_requires_grad", "", stack.data(), TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error("latentkv: torch could not say which tensors require a gradient");
  }
  return torch::stable::detail::to<int64_t>(stack[0]);
}

void refuse_gradient(const char* op, const Name& name) {
  fail(op, name, "a tensor without gradient, as the op has no derivative: call it under torch.no_grad()",
       "one that requires grad");
}

}  // namespace

std::string shape_of(const Tensor& t) {
  return list(t.sizes());
}

void fail(const char* op, const Name& argument, const std::string& expected, const std::string& got) {
  throw std::runtime_error("latentkv." + std::string(op) + ": " + argument.str() + ": expected " + expected + ", got " +
                           got);
}
void fail(const char* op, const Name& argument, const std::string& expected, int64_t got) {
  fail(op, argument, expected, std::to_string(got));
}

Checker::Checker(const char* op, const Name& name, const Tensor& lead) : op_(op) {
  if (!lead.defined()) fail(name, "a tensor", "None");
  device_ = lead.is_cpu() ? -1 : lead.get_device_index();
  regions_.reserve(16);
}

void Checker::no_gradients(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) const {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  std::vector<Tensor> given;
  std::vector<const char*> names;
  for (const auto& [name, t] : tensors) {
    if (t && t->defined()) given.push_back(*t), names.push_back(name);
  }
  if (const int64_t i = which_requires_grad(given); i >= 0) refuse_gradient(op_, names[i]);
}
void Checker::no_gradients(const char* name, const std::vector<Tensor>& tensors) const {
  if (tensors.empty() || !aoti_torch_grad_mode_is_enabled()) return;
  if (const int64_t i = which_requires_grad(tensors); i >= 0) refuse_gradient(op_, {name, static_cast<int>(i)});
}
void Checker::no_gradients(const char* name, const std::vector<OptionalTensor>& tensors) const {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i] && which_requires_grad({*tensors[i]}) >= 0) refuse_gradient(op_, {name, static_cast<int>(i)});
  }
}

// A copy of a tensor to itself, which torch leaves undone: but it moves the version counter, which the stable ABI
// cannot.
void written(const Tensor& t) {
  if (aoti_torch_copy_(t.get(), t.get(), 0) != 0) throw std::runtime_error("latentkv: no version counter to move");
}
void written(const OptionalTensor& t) {
  if (t) written(*t);
}
void written(const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) written(t);
}

void Checker::size(const char* name, std::optional<int64_t> value, int64_t least, Letter& letter) const {
  if (!value) return;
  if (*value < least) latentkv::fail(op_, name, "at least " + std::to_string(least), *value);
  if (*value > INT32_MAX) latentkv::fail(op_, name, "a number below 2^31", *value);
  letter.bind(*value, name);
}

void Checker::tensor(const Name& name, const Tensor& t, Types types, std::initializer_list<Shape> shapes,
                     bool mutated) {
  device(name, t);
  dtype(name, t, types);
  const auto sizes = t.sizes();
  const Shape* shape = shapes.begin();
  for (const Shape& alternative : shapes) {
    if (alternative.size() == sizes.size()) shape = &alternative;
  }
  bool fits = shape->size() == sizes.size();
  size_t i = 0;
  for (const Dim& dim : *shape) {
    fits = fits && (dim.bound || !dim.known() || dim.value() == sizes[i]);
    ++i;
  }
  if (!fits) {
    std::string text;
    for (const Dim& dim : *shape) {
      const bool number = dim.text[0] >= '0' && dim.text[0] <= '9';
      text += (text.empty() ? "" : ", ") + std::string(dim.text);
      if (!dim.bound && dim.known() && !number) text += "=" + std::to_string(dim.value());
    }
    fail(name, "shape [" + text + "]", list(sizes));
  }
  i = 0;
  for (const Dim& dim : *shape) {
    const int64_t size = sizes[i++];
    if (!std::strcmp(dim.text, "R") && size % 2 && std::strcmp(name.text, "cos_sin_cache")) {
      latentkv::fail(op_, name, "an even rope dimension R", size);
    }
    if (size > INT32_MAX) fail(name, "fewer than 2^31 elements along a dimension", list(sizes));
    if (dim.bound) {
      if (size > dim.bound->value) {
        latentkv::fail(op_, name,
                       std::string("at most ") + dim.bound_text + "=" + std::to_string(dim.bound->value) + " entries",
                       size);
      }
      dim.letter->bind(size, name);
    } else if (dim.other && !dim.known()) {
      if (size < dim.letter->value) {
        latentkv::fail(op_, dim.letter->from,
                       "a number in 1 .. " + std::to_string(size) + ", the width of " + name.str(), dim.letter->value);
      }
      dim.other->bind(size - dim.letter->value, name);
    } else if (dim.letter && !dim.other) {
      dim.letter->bind(size, name);
    }
  }
  unit_stride(name, t);
  const Span span(t);
  if (mutated) no_overlap(name, t, span);
  regions_.push_back({name, span, mutated, &t});
}

void Checker::one(const Name& name, const Tensor* t) {
  if (!t) return;
  device(name, *t);
  dtype(name, *t, {ScalarType::Float});
  if (t->numel() != 1) fail(name, "one element", "shape " + shape_of(*t));
  regions_.push_back({name, Span(*t), false, t});
}

void Checker::as_many(const char* name, size_t size, const Letter& count) const {
  if (static_cast<int64_t>(size) == count) return;
  latentkv::fail(op_, name, "G=" + std::to_string(count) + " entries, as " + count.from.str() + " has",
                 static_cast<int64_t>(size));
}

void Checker::both_or_none(const Tensor* positions, const Tensor* table) const {
  if ((positions == nullptr) == (table == nullptr)) return;
  fail(table ? "positions" : "cos_sin_cache", "a tensor, as for the other of positions and cos_sin_cache", "None");
}

void Checker::same_blocks(const Name& name, const Tensor& t, const Name& other_name, const Tensor& other) const {
  if (t.size(0) == other.size(0) && t.size(t.dim() - 2) == other.size(other.dim() - 2)) return;
  fail(name, "the blocks of " + other_name.str() + ": " + shape_of(other), shape_of(t));
}

Cache Checker::cache(const CacheNames& names, const Tensor& data, const Tensor* rope_data, const Tensor* scale,
                     const std::string& format, const Letter& latent_dim, const Letter& rope_dim, bool exact,
                     bool mutated, const Tensor* lead, const char* lead_name) {
  const Name name{names.data, names.index}, rope_name{names.rope, names.index}, scale_name{names.scale, names.index};
  const FormatInfo* known = nullptr;
  for (const FormatInfo& f : kFormats) {
    if (format == f.name) known = &f;
  }
  if (!known) fail(names.format, "a known format name", "'" + format + "'");
  const FormatInfo& f = *known;
  const std::string purpose = std::string("for format ") + f.name;
  if (lead && (f.tile || f.code == Code::verbatim)) {
    dtype({lead_name, names.index < 0 ? -1 : 0}, *lead, {f.tile ? ScalarType::BFloat16 : f.type}, " " + purpose);
  }
  const auto packs = [&](const char* letter, const Letter& size, int64_t own) {
    if (f.tile && size != own) {
      latentkv::fail(op_, size.from, std::string(letter) + "=" + std::to_string(own) + " " + purpose, size);
    }
  };
  packs("L", latent_dim, f.latent_dim);
  packs("R", rope_dim, f.rope_dim);
  const int64_t row = latent_dim + rope_dim;
  const auto elements = [](const char* what, int64_t count) {
    return std::string(what) + "=" + std::to_string(count) + " elements";
  };
  int64_t width = row;
  if (f.tile) {
    pages(name, f, data, f.row_bytes, std::to_string(f.row_bytes) + " bytes", false);
    byte_rows(name, f, data);
    if (rope_data) fail(rope_name, "None " + purpose, "a tensor");
    width = -1;
  } else if (rope_data) {
    pages(name, f, data, latent_dim, elements("L", latent_dim), exact);
    pages(rope_name, f, *rope_data, rope_dim, elements("R", rope_dim), exact);
    same_blocks(rope_name, *rope_data, name, data);
    width = latent_dim;
  } else {
    pages(name, f, data, row, elements("L + R", row), exact);
  }
  regions_.push_back({name, Span(data, width), mutated, &data});
  if (rope_data) regions_.push_back({rope_name, Span(*rope_data, rope_dim), mutated, rope_data});
  one(scale_name, scale);
  const bool scaled = !f.tile && f.code != Code::verbatim;
  return {&data,    rope_data,    scaled ? scale : nullptr,  known,     latent_dim,
          rope_dim, data.size(0), data.size(data.dim() - 2), scale_name};
}

Cache Checker::indexer(const char* name, const Tensor& data, const Tensor* table) {
  const FormatInfo& f = kIndexerFormat;
  if (table && (table->size(1) % 2 || table->size(1) < 2 || table->size(1) > f.latent_dim)) {
    latentkv::fail(op_, "cos_sin_cache", "an even R in 2 .. " + std::to_string(f.latent_dim), table->size(1));
  }
  pages(name, f, data, f.row_bytes, std::to_string(f.row_bytes) + " bytes", false);
  byte_rows(name, f, data);
  regions_.push_back({name, Span(data), true, &data});
  return {&data, nullptr, nullptr, &f, f.latent_dim, 0, data.size(0), data.size(data.dim() - 2), {}};
}

void Checker::apart(std::initializer_list<std::pair<const char*, const char*>> allowed, bool anyhow) {
  const auto may = [&](const Region& a, const Region& b) {
    for (const auto& [one, other] : allowed) {
      const bool named = (!std::strcmp(a.name.text, one) && !std::strcmp(b.name.text, other)) ||
                         (!std::strcmp(a.name.text, other) && !std::strcmp(b.name.text, one));
      const auto x = a.tensor->strides(), y = b.tensor->strides();
      if (named && (anyhow || (a.span.begin == b.span.begin && std::equal(x.begin(), x.end(), y.begin(), y.end())))) {
        return true;
      }
    }
    return false;
  };
  for (size_t j = 1; j < regions_.size(); ++j) {
    for (size_t i = 0; i < j; ++i) {
      const Region &a = regions_[i], &b = regions_[j];
      if ((a.mutated || b.mutated) && share_bytes(a.span, b.span) && !may(a, b)) {
        fail(b.name, "a tensor that shares no bytes with " + a.name.str(), "overlapping memory");
      }
    }
  }
}

void Checker::device(const Name& name, const Tensor& t) const {
  if (!t.defined()) fail(name, "a tensor", "None");  // which torch before 2.13 lets pass
  if (device_ < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device_) return;
  const std::string own = device_ < 0 ? "cpu" : "cuda:" + std::to_string(device_);
  const std::string got = t.is_cpu()    ? "cpu"
                          : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index())
                                        : "another device";
  fail(name, "a tensor on " + own, "one on " + got);
}

void Checker::dtype(const Name& name, const Tensor& t, Types types, const std::string& purpose) const {
  const ScalarType type = t.scalar_type();
  if (is_in(types.begin(), types.end(), type)) return;
  std::string text;
  for (const ScalarType* x = types.begin(); x != types.end(); ++x) {
    if (!is_in(types.begin(), x, *x)) text += (text.empty() ? "" : " or ") + name_of(*x);  // each once
  }
  fail(name, "dtype " + text + purpose, name_of(type));
}

void Checker::unit_stride(const Name& name, const Tensor& t) const {
  const auto sizes = t.sizes(), strides = t.strides();
  const size_t last = sizes.size() - 1;
  if (sizes.size() > 0 && sizes[last] > 1 && strides[last] != 1) {
    fail(name, "a contiguous last dimension (stride 1)", "stride " + std::to_string(strides[last]));
  }
}

void Checker::no_overlap(const Name& name, const Tensor& t, const Span& span) const {
  if (!overlaps_itself(span)) return;
  fail(name, "elements that do not overlap in memory", "strides " + list(t.strides()) + " for shape " + shape_of(t));
}

// A tensor of rows, [B, bs, C] or [B, 1, bs, C].
void Checker::pages(const Name& name, const FormatInfo& format, const Tensor& t, int64_t row, const std::string& text,
                    bool exact) const {
  device(name, t);
  const std::string purpose = std::string(" for format ") + format.name;
  if (format.bytes_too) {
    dtype(name, t, {format.type, ScalarType::Byte}, purpose);
  } else {
    dtype(name, t, {format.type}, purpose);
  }
  if (!(t.dim() == 3 || (t.dim() == 4 && t.size(1) == 1))) {
    fail(name, "shape [B, bs, C] or [B, 1, bs, C]", shape_of(t));
  }
  const int64_t width = t.size(t.dim() - 1), blocks = t.size(0), entries = t.size(t.dim() - 2);
  if (width < row || (exact && width != row)) {
    latentkv::fail(op_, name, std::string("rows of ") + (exact ? "" : "at least ") + text, width);
  }
  unit_stride(name, t);
  no_overlap(name, t, Span(t));
  if (entries > INT32_MAX || blocks > INT32_MAX || blocks * entries > INT32_MAX) {
    const bool all = entries <= INT32_MAX && blocks <= INT32_MAX;
    fail(name, "fewer than 2^31 rows", all ? std::to_string(blocks * entries) : "shape " + shape_of(t));
  }
}

// Rows of mixed types, for access by 4 bytes; those of a block follow one another where scales lie behind them.
void Checker::byte_rows(const Name& name, const FormatInfo& format, const Tensor& t) const {
  const int64_t e = t.dim() - 2;
  if (format.footed && t.size(e) > 1 && t.stride(e) != format.row_bytes) {
    latentkv::fail(op_, name,
                   "entries " + std::to_string(format.row_bytes) + " bytes apart, as scales lie after a block's rows",
                   t.stride(e));
  }
  const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
  if (address % 4 || (t.size(0) > 1 && t.stride(0) % 4) || (t.size(e) > 1 && t.stride(e) % 4)) {
    fail(name, "rows that start at a multiple of 4 bytes",
         "address " + std::to_string(address % 4) + " modulo 4 and strides " + list(t.strides()));
  }
}

}  // namespace latentkv
