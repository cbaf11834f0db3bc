// The shape of a launch: parts made of lane groups. A group owns a row or a piece of one; its lanes walk chunks with
// `for (c = lane; c < n; c += lanes)`.
#pragma once

#include <cstdint>

namespace latentkv {

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
