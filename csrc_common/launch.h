// The shape of a launch: parts made of lane groups. A group owns a row or a piece of one; its lanes walk chunks with
// `for (c = lane; c < n; c += lanes)`.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>

namespace latentkv {

// Whether LATENTKV_CHECKS asks for values to be looked at.
inline bool checks_enabled() {
  static const bool enabled = [] {
    const char* const value = std::getenv("LATENTKV_CHECKS");
    std::string word;
    for (const char* c = value ? value : ""; *c; ++c) word += static_cast<char>(*c | 0x20);  // digits stay
    return word == "1" || word == "true" || word == "yes" || word == "on";
  }();
  return enabled;
}

struct Group {
  uint32_t index;  // among the groups of its part
  int lane, lanes;
};

struct Part {
  uint32_t groups = 0;
  uint32_t log2_lanes = 0;  // of a group
};

// A kernel is a struct with `kParts`, the number of its parts, and `template <int part> void run(Group) const`.
template <int parts>
struct Grid {
  Part part[parts];
};

}  // namespace latentkv
