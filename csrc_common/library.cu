// Puts this library's kernels into a namespace whose schemas Python has defined; once for each namespace.
#include "vendor.h"
//
#include "bound_ops.h"

extern "C" __attribute__((visibility("default"))) void latentkv_register(const char* name_space) {
  using torch::stable::detail::StableLibrary;
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, LKV_DISPATCH_KEY, __FILE__, __LINE__);
  latentkv::register_ops(*library);
}

// The GPU architectures that this library has code for, as CMake names them: "80 90-real" or "gfx942 gfx950".
extern "C" __attribute__((visibility("default"))) const char* latentkv_architectures() {
  return LATENTKV_ARCHITECTURES;
}
