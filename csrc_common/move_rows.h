// Rows on their way from one place to another: out of a paged cache into a tensor, or into another cache.
#pragma once

#include "prepare.h"

namespace latentkv {

// The blocks of sequences: token t of one lies in the block that its column t / block size names.
struct BlockTable {
  Indices numbers;      // [sequences, columns]; without data: column i names block i
  int64_t stride = 0;   // bytes from one sequence to the next
  uint32_t tokens = 0;  // that the columns of a sequence have room for
  uint32_t blocks = 0;  // blocks 0 .. blocks-1 exist
};

// Where rows come from, or where they go.
struct Side {
  Rows rows;
  ScalarType type = ScalarType::BFloat16;  // of what is stored verbatim
  BlockTable table;

  struct Entry {
    uint32_t block = 0, entry = 0;
  };
  struct Found {
    uint32_t column, entry;
    Indices::Loaded number;
  };
  // Asks for the block of a token below table.tokens.
  LKV_DEVICE Found find(uint32_t sequence, uint32_t token) const {
    const uint32_t column = rows.block_size.divide(token);
    Found found{column, token - column * rows.block_size.d, {}};
    if (table.numbers.data) {
      found.number = Indices{table.numbers.data + sequence * table.stride, table.numbers.bytes}.load(column);
    }
    return found;
  }
  // Whether the cache has that block.
  LKV_DEVICE bool resolve(const Found& found, Entry& entry) const {
    const int64_t number = table.numbers.data ? table.numbers.value(found.number) : found.column;
    entry = {static_cast<uint32_t>(number), found.entry};
    return static_cast<uint64_t>(number) < table.blocks;
  }
};

// How many of `count` rising values are at most x. The lanes of a group ask for as many values at once, and go on
// between two of them; every group takes as many turns.
LKV_DEVICE uint32_t rank(const Indices& values, uint32_t count, int64_t x, const Divisor& parts, const Group& group) {
  uint32_t first = 0;
  const uint32_t end = count;
  while (count > 0) {
    const uint32_t between = parts.divide(count), at = first + (group.lane + 1) * (between + 1) - 1;
    const bool counts = at < end && values.value(values.load(at)) <= x;
    first += static_cast<uint32_t>(group_sum(counts ? 1.f : 0.f, group)) * (between + 1);
    count = between;
  }
  return first;
}

// A lane group moves one row. Of a gather, row i of a tensor: of the sequence that begins last up to i. Else it is
// token i % run of sequence i / run on both sides.
struct Move {
  Side from, to;
  int latent_dim = 0, rope_dim = 0;
  uint32_t rows = 0;
  Divisor run;

  bool gathers = false;
  uint32_t sequences = 0;
  Indices begins, ends;  // [sequences]: of its rows
  Indices starts;        // [sequences]: the token of the first; without data: 0
  Divisor parts;         // lanes of a group + 1, see rank

  // Where all bytes are stored alike on both sides: how many there are in a row from rows.latent on, and so forth.
  int latent_bytes = 0, rope_bytes = 0, scale_bytes = 0;

  struct Plan {
    bool moves = false;  // something, which is zeros where nothing is there to be read
    bool reads = false;
    Side::Entry from, to;
  };
  LKV_DEVICE Plan plan(const Group& group) const {
    const uint32_t row = group.index;
    Plan plan;
    if (gathers) {
      const uint32_t sequence = rank(ends, sequences, row, parts, group);
      if (sequence == sequences) return plan;
      const auto begin = begins.load(sequence), start = starts.data ? starts.load(sequence) : Indices::Loaded{};
      const uint64_t token = row - static_cast<uint64_t>(begins.value(begin)) +
                             static_cast<uint64_t>(starts.data ? starts.value(start) : 0);
      plan.moves = true, plan.to = {row, 0};
      plan.reads =
          token < from.table.tokens && from.resolve(from.find(sequence, static_cast<uint32_t>(token)), plan.from);
    } else {
      const uint32_t sequence = run.divide(row), token = row - sequence * run.d;
      const auto source = from.find(sequence, token), target = to.find(sequence, token);  // at once
      const bool exists = from.resolve(source, plan.from);
      plan.moves = plan.reads = to.resolve(target, plan.to) && exists;
    }
    return plan;
  }
};

// One side of a move; its blocks are all those of the cache, in order.
Side side_of(const Cache& cache);
// With the blocks of a table [S, columns], or [columns] of one sequence.
void use_blocks(Side& side, const Tensor& table);

// Puts the move on the current stream; its rows are there.
void launch_move(Move move, int device);

}  // namespace latentkv
