// The ops that turn q and k in place, write the cache, or both.
#include "vendor.h"
//
#include "cache_update.h"
#include "ops.h"

namespace latentkv {

void run(const Rope& x) {
  Update update(x.name, x.device, *x.q, x.N);
  update.bind_rotation(x.rotation, x.R, true);
  update.bind_query(x.q);
  update.bind_key(x.k);
  update.finish(x.N);
  launch_update<false>(update);
}

void run(const WriteCache& x) {
  Update update(x.name, x.device, *x.kv_c, x.T);
  update.bind_rotation({}, x.R, false);
  update.bind_slots(*x.slot_mapping, x.cache);
  update.bind_rows(*x.kv_c, x.cache);
  update.bind_key(x.k_pe);
  update.finish(x.T);
  launch_update<false>(update);
}

void run(const RopeWriteCache& x) {
  Update update(x.name, x.device, *x.kv_c, x.T);
  update.bind_rotation(x.rotation, x.R, x.rope_masked);
  update.bind_slots(*x.slot_mapping, x.cache);
  update.bind_rows(*x.kv_c, x.cache);
  update.bind_key(x.k_pe);
  if (x.rotation.table) update.bind_query(x.q_pe);
  update.finish(x.T);
  launch_update<false>(update);
}

}  // namespace latentkv
