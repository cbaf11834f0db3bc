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

  Blocks2d(const Cache& cache, const Tensor* blocks) : columns(cache.blocks) {
    if (!blocks) return;
    runs = blocks->dim() == 2 ? blocks->size(0) : 1;
    columns = blocks->size(blocks->dim() - 1);
  }
};

// Blocks for the same number of tokens: some number needs just so many blocks of either size.
void check_blocks(const ConvertCache& x, const Blocks2d& n, const Blocks2d& m) {
  if (n.runs != m.runs) {
    fail(x.name, "dst_blocks", "S=" + std::to_string(n.runs) + " runs of blocks, as src_blocks has", m.runs);
  }
  const int64_t size = x.src.block_size, dst_size = x.dst.block_size;
  const int64_t room = n.columns * size, dst_room = m.columns * dst_size, tokens = std::min<int64_t>(room, dst_room);
  if ((n.columns || m.columns) && std::max<int64_t>((n.columns - 1) * size, (m.columns - 1) * dst_size) >= tokens) {
    const int64_t divisor = std::max<int64_t>(dst_size, 1);
    fail(x.name, "dst_blocks",
         std::to_string((room + divisor - 1) / divisor) + " blocks of " + std::to_string(dst_size) +
             ", for src_blocks has " + std::to_string(n.columns) + " of " + std::to_string(size),
         m.columns);
  }
  // Each is below 2^31, so that two multiply without overflow and three may not.
  if (room > INT32_MAX || n.runs * room > INT32_MAX) {
    fail(x.name, "src_blocks", "fewer than 2^31 rows in all",
         std::to_string(n.runs) + " runs of " + std::to_string(room));
  }
}

// The block numbers, where they are looked at before the launch. A negative one leaves its tokens out.
void check_numbers(const char* op, const char* name, const BlockTable& table, const Blocks2d& size, int device) {
  if (!table.numbers.data || size.runs * size.columns == 0) return;
  const int64_t row = table.stride / table.numbers.bytes;
  const HostIndices numbers(table.numbers, (size.runs - 1) * row + size.columns, device);
  for (int64_t run = 0; run < size.runs; ++run) {
    for (int64_t column = 0; column < size.columns; ++column) {
      const int64_t number = numbers[run * row + column];
      if (number >= int64_t{table.blocks}) {
        fail(op, name, "block numbers in 0 .. " + std::to_string(int64_t{table.blocks} - 1),
             std::to_string(number) + " at [" + std::to_string(run) + ", " + std::to_string(column) + "]");
      }
    }
  }
}

}  // namespace

void run(const ConvertCache& x) {
  Move move;
  move.latent_dim = static_cast<int>(x.L), move.rope_dim = static_cast<int>(x.R);
  move.from = side_of(x.src), move.to = side_of(x.dst);
  const Blocks2d n(x.src, x.src_blocks), m(x.dst, x.dst_blocks);
  check_blocks(x, n, m);
  if (x.src_blocks) use_blocks(move.from, *x.src_blocks);
  if (x.dst_blocks) use_blocks(move.to, *x.dst_blocks);
  const int64_t tokens = std::min<int64_t>(n.columns * x.src.block_size, m.columns * x.dst.block_size);
  move.rows = static_cast<uint32_t>(n.runs * tokens);
  if (move.rows == 0) return;
  move.run = Divisor(static_cast<uint32_t>(tokens));
  for (const Cache* cache : {&x.src, &x.dst}) check_scale(x.name, cache->scale_name, cache->scale, x.device);
  if (checks_values(x.device)) {
    check_numbers(x.name, "src_blocks", move.from.table, n, x.device);
    check_numbers(x.name, "dst_blocks", move.to.table, m, x.device);
  }
  launch_move(move, x.device);
}

}  // namespace latentkv
