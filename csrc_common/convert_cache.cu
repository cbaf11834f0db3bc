// Rows from one cache into another of any other layout.
#include "vendor.h"
//
#include "move_rows.h"
#include "ops.h"

namespace latentkv {
namespace {

// The blocks that one side goes through: `columns` of each run.
struct Blocks2d {
  int64_t runs = 1, columns;
};

Blocks2d check_blocks(const Arguments& args, const char* name, const Tensor& cache, const Tensor* blocks) {
  if (!blocks) return {1, CacheView(cache).blocks};
  if (blocks->dim() == 2) {
    args.tensor(name, *blocks, kIndexTypes, {{"S", -1}, {"blocks", -1}});
    return {blocks->size(0), blocks->size(1)};
  }
  args.tensor(name, *blocks, kIndexTypes, {{"blocks", -1}});
  return {1, blocks->size(0)};
}

// The block numbers, where they are looked at before the launch. A negative one leaves its tokens out.
void check_numbers(const Arguments& args, const char* name, const BlockTable& table, const Blocks2d& size, int device) {
  if (!table.numbers.data || size.runs * size.columns == 0) return;
  const int64_t row = table.stride / table.numbers.bytes;
  const HostIndices numbers(table.numbers, (size.runs - 1) * row + size.columns, device);
  for (int64_t run = 0; run < size.runs; ++run) {
    for (int64_t column = 0; column < size.columns; ++column) {
      const int64_t number = numbers[run * row + column];
      if (number >= int64_t{table.blocks}) {
        args.fail(name, "block numbers in 0 .. " + std::to_string(int64_t{table.blocks} - 1),
                  std::to_string(number) + " at [" + std::to_string(run) + ", " + std::to_string(column) + "]");
      }
    }
  }
}

}  // namespace

void convert_cache_(const Tensor& src, const OptionalTensor& src_rope, const OptionalTensor& src_scale,
                    const std::string& src_format, const Tensor& dst, const OptionalTensor& dst_rope,
                    const OptionalTensor& dst_scale, const std::string& dst_format, int64_t kv_lora_rank,
                    int64_t rope_dim, const OptionalTensor& src_blocks, const OptionalTensor& dst_blocks) {
  const int device = src.is_cpu() ? -1 : src.get_device_index();
  const Arguments args("convert_cache_", kDeviceType, device);
  if (kv_lora_rank < 1) args.fail("kv_lora_rank", "at least 1", kv_lora_rank);
  if (rope_dim < 0) args.fail("rope_dim", "at least 0", rope_dim);
  Move move;
  move.latent_dim = static_cast<int>(kv_lora_rank), move.rope_dim = static_cast<int>(rope_dim);
  const Stored from{&src, pointer(src_rope), pointer(src_scale), "src", "src_rope", "src_scale", "src_format"};
  const Stored to{&dst, pointer(dst_rope), pointer(dst_scale), "dst", "dst_rope", "dst_scale", "dst_format"};
  move.from = side_of(args, from, src_format, kv_lora_rank, rope_dim);
  move.to = side_of(args, to, dst_format, kv_lora_rank, rope_dim);
  const Blocks2d n = check_blocks(args, "src_blocks", src, pointer(src_blocks));
  const Blocks2d m = check_blocks(args, "dst_blocks", dst, pointer(dst_blocks));
  if (n.runs != m.runs) {
    args.fail("dst_blocks", "S=" + std::to_string(n.runs) + " runs of blocks, as src_blocks has", m.runs);
  }
  // Blocks for the same number of tokens: some number needs just so many blocks of either size.
  const int64_t size = CacheView(src).block_size, dst_size = CacheView(dst).block_size;
  const int64_t room = n.columns * size, dst_room = m.columns * dst_size, tokens = std::min<int64_t>(room, dst_room);
  if ((n.columns || m.columns) && std::max<int64_t>((n.columns - 1) * size, (m.columns - 1) * dst_size) >= tokens) {
    const int64_t divisor = std::max<int64_t>(dst_size, 1);
    args.fail("dst_blocks",
              std::to_string((room + divisor - 1) / divisor) + " blocks of " + std::to_string(dst_size) +
                  ", for src_blocks has " + std::to_string(n.columns) + " of " + std::to_string(size),
              m.columns);
  }
  if (n.runs * room > INT32_MAX) args.fail("src_blocks", "fewer than 2^31 rows in all", n.runs * room);

  if (src_blocks) use_blocks(move.from, *src_blocks);
  if (dst_blocks) use_blocks(move.to, *dst_blocks);
  move.rows = static_cast<uint32_t>(n.runs * tokens);
  if (move.rows == 0) return;
  move.run = Divisor(static_cast<uint32_t>(tokens));
  if (checks_values(device)) {
    check_numbers(args, "src_blocks", move.from.table, n, device);
    check_numbers(args, "dst_blocks", move.to.table, m, device);
  }
  launch_move(move, device);
}

}  // namespace latentkv
