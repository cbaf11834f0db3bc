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

void write_cache_grouped_(const std::vector<Tensor>& kv_c, const std::vector<Tensor>& k_pe, const Tensor& slot_mapping,
                          const std::vector<Tensor>& caches, const std::vector<Tensor>& rope_caches,
                          const std::vector<OptionalTensor>& scales, const std::string& format) {
  const size_t count = kv_c.size();
  const int device = count == 0 || kv_c[0].is_cpu() ? -1 : kv_c[0].get_device_index();
  const Arguments args("write_cache_grouped_", kDeviceType, device);
  if (count == 0) args.fail("kv_c", "at least one tensor", "none");
  const auto as_many = [&](const char* name, size_t size) {
    if (size != count) {
      args.fail(name, "G=" + std::to_string(count) + " entries, as kv_c has", static_cast<int64_t>(size));
    }
  };
  as_many("k_pe", k_pe.size());
  as_many("caches", caches.size());
  as_many("scales", scales.size());
  if (!rope_caches.empty()) as_many("rope_caches", rope_caches.size());

  // Every layer is prepared like a write of its own, so that it is checked like one.
  Launch first;
  std::vector<Layer> layers;
  for (size_t i = 0; i < count; ++i) {
    const auto named = [&](const char* list) { return std::string(list) + "[" + std::to_string(i) + "]"; };
    const std::string kv_c_name = named("kv_c"), k_name = named("k_pe"), cache_name = named("caches");
    const std::string rope_cache_name = named("rope_caches"), scale_name = named("scales");
    if (i > 0) {
      const auto types = {kv_c[0].scalar_type()};
      args.tensor(kv_c_name.c_str(), kv_c[i], types, {{"N", kv_c[0].size(0)}, {"L", kv_c[0].size(1)}});
      args.tensor(k_name.c_str(), k_pe[i], types, {{"N", k_pe[0].size(0)}, {"R", k_pe[0].size(1)}});
    }
    Call call{.op = "write_cache_grouped_", .k = &k_pe[i], .kv_c = &kv_c[i], .slots = &slot_mapping};
    call.cache = &caches[i], call.rope_cache = rope_caches.empty() ? nullptr : &rope_caches[i];
    call.scale = pointer(scales[i]), call.format = &format;
    call.kv_c_name = kv_c_name.c_str(), call.k_name = k_name.c_str(), call.cache_name = cache_name.c_str();
    call.rope_cache_name = rope_cache_name.c_str(), call.scale_name = scale_name.c_str();
    const Launch x = prepare(call);
    const CacheView view(caches[i]), view_of_first(caches[0]);
    if (view.blocks != view_of_first.blocks || view.block_size != view_of_first.block_size) {
      args.fail(cache_name, "the blocks of caches[0]: " + shape_of(caches[0]), shape_of(caches[i]));
    }
    if (i == 0) first = x;
    first.aligned = first.aligned && x.aligned;
    const Params& p = x.params;
    layers.push_back({p.kv_c, p.key.data, p.kv_c_stride, p.key.token_stride, p.rows});
  }

  const uint32_t tokens = first.params.tokens;
  if (tokens == 0) return;
  first.params.halves = false;
  dispatch(first.activation, first.aligned, [&]<class A, int n>() {
    for (size_t begin = 0; begin < count; begin += kMaxLayers) {
      const size_t end = count - begin > kMaxLayers ? begin + kMaxLayers : count;
      GroupedWrite<A, n> kernel{first.params, Divisor(tokens), {}};
      std::copy(layers.begin() + begin, layers.begin() + end, kernel.layers);
      const uint64_t rows = uint64_t{tokens} * (end - begin);
      if (rows > INT32_MAX) args.fail("kv_c", "fewer than 2^31 rows in all", static_cast<int64_t>(rows));
      Grid<2> grid{first.grid.part[0], first.grid.part[1]};
      grid.part[0].groups = static_cast<uint32_t>(rows);
      if (grid.part[1].groups) grid.part[1].groups = static_cast<uint32_t>(rows);
      launch(kernel, grid, device);
    }
  });
}

}  // namespace latentkv
