// Puts this library's kernels into a namespace whose schemas Python has defined; once for each namespace.
#include "vendor.h"
//
#include <torch/csrc/stable/library.h>

#include "ops.h"

extern "C" __attribute__((visibility("default"))) void latentkv_register(const char* name_space) {
  using torch::stable::detail::StableLibrary;
  auto* library = new StableLibrary(StableLibrary::Kind::IMPL, name_space, LKV_DISPATCH_KEY, __FILE__, __LINE__);
  library->impl("rope_", TORCH_BOX(&latentkv::rope_));
  library->impl("write_cache_", TORCH_BOX(&latentkv::write_cache_));
  library->impl("write_cache_grouped_", TORCH_BOX(&latentkv::write_cache_grouped_));
  library->impl("rope_write_cache_", TORCH_BOX(&latentkv::rope_write_cache_));
  library->impl("decode_prologue", TORCH_BOX(&latentkv::decode_prologue));
  library->impl("write_indexer_cache_", TORCH_BOX(&latentkv::write_indexer_cache_));
  library->impl("gather_cache", TORCH_BOX(&latentkv::gather_cache));
  library->impl("convert_cache_", TORCH_BOX(&latentkv::convert_cache_));
}

// The GPU architectures that this library has code for, as CMake names them: "80 90-real" or "gfx942 gfx950".
extern "C" __attribute__((visibility("default"))) const char* latentkv_architectures() {
  return LATENTKV_ARCHITECTURES;
}
