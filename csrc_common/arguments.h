// The checks that an op's description asks for. Every failure says the op, the argument, what was expected and what
// came, and is raised before anything is written. python/latentkv/ops/checks.py has the same rules and messages.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "formats.h"
#include "geometry.h"

namespace latentkv {

using OptionalTensor = std::optional<Tensor>;
using Types = std::initializer_list<ScalarType>;

constexpr Types kActivations = {ScalarType::BFloat16, ScalarType::Half, ScalarType::Float};
constexpr Types kIndexTypes = {ScalarType::Long, ScalarType::Int};

inline const Tensor* pointer(const OptionalTensor& t) {
  return t ? &*t : nullptr;
}

// An argument's name, or that of an entry of a list.
struct Name {
  const char* text = nullptr;
  int index = -1;

  Name() = default;
  Name(const char* text, int index = -1) : text(text), index(index) {}
  std::string str() const { return index < 0 ? text : text + ("[" + std::to_string(index)) + "]"; }
};

[[noreturn]] void fail(const char* op, const Name& argument, const std::string& expected, const std::string& got);
[[noreturn]] void fail(const char* op, const Name& argument, const std::string& expected, int64_t got);

// What a letter of the shapes stands for, and the argument that said so.
struct Letter {
  int64_t value = -1;
  Name from;

  operator int64_t() const { return value; }
  void bind(int64_t size, const Name& name) {
    if (value < 0) value = size, from = name;
  }
};

// One dimension of a shape: a letter, a number (`plus` alone), or the sum of a letter and one of both. A `bound` is the
// most that a letter may stand for.
struct Dim {
  const char* text = nullptr;
  Letter* letter = nullptr;
  Letter* other = nullptr;
  int64_t plus = 0;
  Letter* bound = nullptr;
  const char* bound_text = nullptr;

  bool known() const { return (!letter || letter->value >= 0) && (!other || other->value >= 0); }
  int64_t value() const { return (letter ? letter->value : 0) + (other ? other->value : 0) + plus; }
};
using Shape = std::initializer_list<Dim>;

// A cache as an op takes it: its tensors, its scale, its format, L and R.
struct Cache {
  const Tensor *data = nullptr, *rope_data = nullptr, *scale = nullptr;  // the latter two: null for None
  const FormatInfo* format = nullptr;
  int64_t latent_dim = 0, rope_dim = 0;
  int64_t blocks = 0, block_size = 0;
  Name scale_name;

  int64_t capacity() const { return blocks * block_size; }
};

// The names of a cache's arguments, or of those of entry `index` of several.
struct CacheNames {
  const char *data, *rope, *scale, *format;
  int index;
};

// Where tokens are turned to; a null table for nowhere.
struct Rotation {
  const Tensor *positions = nullptr, *table = nullptr;
  bool is_neox = false, inverse = false;

  static Rotation of(const Tensor* positions, const Tensor* table, bool is_neox, bool inverse) {
    if (!table || table->size(1) == 0) return {};
    return {positions, table, is_neox, inverse};
  }
};

class Checker {
 public:
  // `lead` says on which device the other tensors must lie.
  Checker(const char* op, const Name& name, const Tensor& lead);

  int device() const { return device_; }  // -1 for the CPU
  [[noreturn]] void fail(const Name& argument, const std::string& expected, const std::string& got) const {
    latentkv::fail(op_, argument, expected, got);
  }

  // Autograd would lose the gradients that an argument asks for, or get them wrong.
  void no_gradients(std::initializer_list<std::pair<const char*, const Tensor*>> tensors) const;
  void no_gradients(const char* name, const std::vector<Tensor>& tensors) const;
  void no_gradients(const char* name, const std::vector<OptionalTensor>& tensors) const;

  void size(const char* name, std::optional<int64_t> value, int64_t least, Letter& letter) const;
  // Device, dtype, shape (the alternative with as many dimensions), a contiguous last dimension.
  void tensor(const Name& name, const Tensor& t, Types types, std::initializer_list<Shape> shapes,
              bool mutated = false);
  void one(const Name& name, const Tensor* t);  // one fp32 element
  void as_many(const char* name, size_t size, const Letter& count) const;
  void both_or_none(const Tensor* positions, const Tensor* table) const;
  void same_blocks(const Name& name, const Tensor& t, const Name& other_name, const Tensor& other) const;

  // `exact`: rows fill the tensor. `lead`: of a cache that is written, what goes there.
  Cache cache(const CacheNames& names, const Tensor& data, const Tensor* rope_data, const Tensor* scale,
              const std::string& format, const Letter& latent_dim, const Letter& rope_dim, bool exact, bool mutated,
              const Tensor* lead, const char* lead_name);
  Cache indexer(const char* name, const Tensor& data, const Tensor* table);

  // No two of the tensors so far share bytes, if one of them is written; but for the pairs that may be one tensor, or
  // (`anyhow`) may share what they like.
  void apart(std::initializer_list<std::pair<const char*, const char*>> allowed, bool anyhow = false);

 private:
  struct Region {
    Name name;
    Span span;
    bool mutated;
    const Tensor* tensor;
  };

  void device(const Name& name, const Tensor& t) const;
  void dtype(const Name& name, const Tensor& t, Types types, const std::string& purpose = "") const;
  void unit_stride(const Name& name, const Tensor& t) const;
  void no_overlap(const Name& name, const Tensor& t, const Span& span) const;
  void pages(const Name& name, const FormatInfo& format, const Tensor& t, int64_t row, const std::string& text,
             bool exact) const;
  void byte_rows(const Name& name, const FormatInfo& format, const Tensor& t) const;

  const char* op_;
  int device_ = -1;
  std::vector<Region> regions_;
};

// Tells autograd that a tensor has changed.
void written(const Tensor& t);
void written(const OptionalTensor& t);
void written(const std::vector<Tensor>& tensors);

std::string shape_of(const Tensor& t);

}  // namespace latentkv
