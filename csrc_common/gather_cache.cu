// The rows of sequences, out of the paged cache into one tensor.
#include "vendor.h"
//
#include "move_rows.h"
#include "ops.h"

namespace latentkv {
namespace {

// The values of the indices, where they are looked at before the launch.
void check_gather(const Arguments& args, const Move& move, int64_t columns, int device) {
  const int64_t count = move.sequences, size = move.from.rows.block_size.d;
  const HostIndices begins(move.begins, count + 1, device);
  std::string text;
  bool rises = begins[0] == 0;
  for (int64_t s = 0; s <= count; ++s) {
    text += (s ? ", " : "") + std::to_string(begins[s]);
    rises = rises && (s == 0 || begins[s - 1] <= begins[s]);
  }
  if (!rises) args.fail("cu_seq_lens", "rising numbers from 0 on", "[" + text + "]");
  if (begins[count] > int64_t{move.rows}) {
    args.fail("out", "at least " + std::to_string(begins[count]) + " rows, as cu_seq_lens ends there",
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
    args.fail("block_table",
              "blocks for token " + std::to_string(token) + " of sequence " + std::to_string(s) + ", " +
                  std::to_string(size) + " tokens each",
              std::to_string(columns) + " blocks");
  });
  each([&](int64_t s, int64_t start, int64_t tokens) {
    for (int64_t column = start / size; column <= (start + tokens - 1) / size; ++column) {
      const int64_t number = numbers[s * row + column];
      if (number < 0 || number >= int64_t{table.blocks}) {
        args.fail("block_table", "block numbers in 0 .. " + std::to_string(int64_t{table.blocks} - 1),
                  std::to_string(number) + " at [" + std::to_string(s) + ", " + std::to_string(column) + "]");
      }
    }
  });
}

}  // namespace

void gather_cache(const Tensor& cache, const OptionalTensor& rope_cache, const OptionalTensor& scale,
                  const std::string& format, const Tensor& block_table, const Tensor& cu_seq_lens, const Tensor& out,
                  int64_t kv_lora_rank, const OptionalTensor& seq_starts) {
  const int device = cache.is_cpu() ? -1 : cache.get_device_index();
  const Arguments args("gather_cache", kDeviceType, device);
  args.tensor("out", out, kActivations, {{"total", -1}, {"width", -1}});
  const int64_t total = out.size(0), width = out.size(1);
  if (kv_lora_rank < 1 || kv_lora_rank > width) {
    args.fail("kv_lora_rank", "a number in 1 .. " + std::to_string(width) + ", the width of out", kv_lora_rank);
  }
  args.no_overlap("out", out);
  const Stored stored{&cache, pointer(rope_cache), pointer(scale)};
  const Side side = side_of(args, stored, format, kv_lora_rank, width - kv_lora_rank);
  args.tensor("block_table", block_table, kIndexTypes, {{"S", -1}, {"max_blocks", -1}});
  const int64_t sequences = block_table.size(0), columns = block_table.size(1);
  args.tensor("cu_seq_lens", cu_seq_lens, kIndexTypes, {{"S + 1", sequences + 1}});
  if (seq_starts) args.tensor("seq_starts", *seq_starts, kIndexTypes, {{"S", sequences}});
  if (total > INT32_MAX) args.fail("out", "fewer than 2^31 rows", total);

  Move move;
  move.gathers = true;
  move.rows = static_cast<uint32_t>(total), move.sequences = static_cast<uint32_t>(sequences);
  move.latent_dim = static_cast<int>(kv_lora_rank), move.rope_dim = static_cast<int>(width - kv_lora_rank);
  move.begins = move.ends = indices(cu_seq_lens);
  move.ends.data += move.ends.bytes;
  if (seq_starts) move.starts = indices(*seq_starts);
  move.from = side;
  use_blocks(move.from, block_table);
  const int64_t bytes = static_cast<int64_t>(out.element_size()), stride = out.stride(0) * bytes;
  auto* const data = static_cast<char*>(out.data_ptr());
  move.to.type = out.scalar_type();
  move.to.rows.latent = {data, stride, 0}, move.to.rows.rope = {data + kv_lora_rank * bytes, stride, 0};
  if (checks_values(device)) check_gather(args, move, columns, device);
  if (total > 0 && sequences > 0) launch_move(move, device);
}

}  // namespace latentkv
