// The rows of several layers or draft models, which share their slots, in one launch.
#include "vendor.h"
//
#include <type_traits>

#include "cache_update.h"
#include "ops.h"

namespace latentkv {

// What of a cache update is a layer's own.
struct Layer {
  const char* kv_c;
  char* k_pe;
  int64_t kv_c_stride, k_pe_stride;
  Rows rows;
};
constexpr int kMaxLayers = 20;  // of a launch: the arguments of a kernel have 4 KB

template <class A, int n>
struct GroupedWrite {
  static constexpr int kParts = 2;
  Params shared;
  Divisor tokens;
  Layer layers[kMaxLayers];

  template <int part>
  LKV_DEVICE void run(Group group) const {
    const uint32_t index = tokens.divide(group.index);
    const Layer& layer = layers[index];
    group.index -= index * tokens.d;
    CacheUpdate<A, n, 4, false, false> update{shared};
    Params& p = update.p;
    p.kv_c = layer.kv_c, p.kv_c_stride = layer.kv_c_stride;
    p.key.data = layer.k_pe, p.key.token_stride = layer.k_pe_stride;
    p.rows = layer.rows;
    p.rotates = p.halves = false;  // as they are: the compiler leaves out what they ask for
    update.template run<part>(group);
  }
};

void run(const WriteCacheGrouped& x) {
  const std::vector<Tensor>&kv_c = *x.kv_c, &k_pe = *x.k_pe;
  Update update(x.name, x.device, kv_c[0], x.T);
  update.bind_rotation({}, x.R, false);
  std::vector<Layer> layers;
  for (int i = 0; i < x.G; ++i) {
    update.bind_slots(*x.slot_mapping, x.caches[i]);
    update.bind_rows(kv_c[i], x.caches[i]);
    update.bind_key(&k_pe[i]);
    const Params& p = update.params;
    layers.push_back({p.kv_c, p.key.data, p.kv_c_stride, p.key.token_stride, p.rows});
  }
  update.finish(x.T);
  if (x.T == 0) return;
  update.params.halves = false;
  dispatch(update.activation, update.aligned, [&]<class A, int n>() {
    for (int begin = 0; begin < x.G; begin += kMaxLayers) {
      const int end = std::min<int>(begin + kMaxLayers, static_cast<int>(x.G));
      const uint32_t tokens = update.params.tokens;
      GroupedWrite<A, n> kernel{update.params, Divisor(tokens), {}};
      std::copy(layers.begin() + begin, layers.begin() + end, kernel.layers);
      const uint64_t rows = uint64_t{tokens} * (end - begin);
      if (rows > INT32_MAX) fail(x.name, "kv_c", "fewer than 2^31 rows in all", static_cast<int64_t>(rows));
      Grid<2> grid{update.grid.part[0], update.grid.part[1]};
      grid.part[0].groups = static_cast<uint32_t>(rows);
      if (grid.part[1].groups) grid.part[1].groups = static_cast<uint32_t>(rows);
      launch(kernel, grid, x.device);
    }
  });
}

}  // namespace latentkv
