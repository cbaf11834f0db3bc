// The rows of sequences, out of the paged cache into one tensor.
#include "vendor.h"
//
#include "move_rows.h"
#include "ops.h"

namespace latentkv {
namespace {

// The values of the indices, where they are looked at before the launch.
void check_gather(const char* op, const Move& move, int64_t columns, int device) {
  const int64_t count = move.sequences, size = move.from.rows.block_size.d;
  const HostIndices begins(move.begins, count + 1, device);
  std::string text;
  bool rises = begins[0] == 0;
  for (int64_t s = 0; s <= count; ++s) {
    text += (s ? ", " : "") + std::to_string(begins[s]);
    rises = rises && (s == 0 || begins[s - 1] <= begins[s]);
  }
  if (!rises) fail(op, "cu_seq_lens", "rising numbers from 0 on", "[" + text + "]");
  if (begins[count] > int64_t{move.rows}) {
    fail(op, "out", "at least " + std::to_string(begins[count]) + " rows, as cu_seq_lens ends there",
         int64_t{move.rows});
  }
  const BlockTable& table = move.from.table;
  const int64_t row = table.stride / table.numbers.bytes, room = columns * size;
  const HostIndices numbers(table.numbers, count ? (count - 1) * row + columns : 0, device);
  const HostIndices starts(move.starts, move.starts.data ? count : 0, device);
  const auto each = [&](const auto& check) {
    for (int64_t s = 0; s < count; ++s) {
      const int64_t start = move.starts.data ? starts[s] : 0, tokens = begins[s + 1] - begins[s];
      if (tokens > 0) check(s, start, tokens);
    }
  };
  each([&](int64_t s, int64_t start, int64_t tokens) {
    if (start >= 0 && start <= room - tokens) return;
    const int64_t token = start < 0 ? start : std::max<int64_t>(start, room);
    fail(op, "block_table",
         "blocks for token " + std::to_string(token) + " of sequence " + std::to_string(s) + ", " +
             std::to_string(size) + " tokens each",
         std::to_string(columns) + " blocks");
  });
  each([&](int64_t s, int64_t start, int64_t tokens) {
    for (int64_t column = start / size; column <= (start + tokens - 1) / size; ++column) {
      const int64_t number = numbers[s * row + column];
      if (number < 0 || number >= int64_t{table.blocks}) {
        fail(op, "block_table", "block numbers in 0 .. " + std::to_string(int64_t{table.blocks} - 1),
             std::to_string(number) + " at [" + std::to_string(s) + ", " + std::to_string(column) + "]");
      }
    }
  });
}

}  // namespace

void run(const GatherCache& x) {
  Move move;
  move.gathers = true;
  move.rows = static_cast<uint32_t>(x.total), move.sequences = static_cast<uint32_t>(x.S);
  move.latent_dim = static_cast<int>(x.L), move.rope_dim = static_cast<int>(x.R);
  move.begins = move.ends = indices(*x.cu_seq_lens);
  move.ends.data += move.ends.bytes;
  if (x.seq_starts) move.starts = indices(*x.seq_starts);
  move.from = side_of(x.cache);
  use_blocks(move.from, *x.block_table);
  const int64_t bytes = static_cast<int64_t>(x.out->element_size()), stride = x.out->stride(0) * bytes;
  auto* const data = static_cast<char*>(x.out->data_ptr());
  move.to.type = x.out->scalar_type();
  move.to.rows.latent = {data, stride, 0}, move.to.rows.rope = {data + x.L * bytes, stride, 0};
  check_scale(x.name, x.cache.scale_name, x.cache.scale, x.device);
  if (checks_values(x.device)) check_gather(x.name, move, x.max_blocks, x.device);
  if (x.total > 0 && x.S > 0) launch_move(move, x.device);
}

}  // namespace latentkv
