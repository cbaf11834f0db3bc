"""Chunked prefill: the cached prefixes of three sequences, read back piece by piece for attention over them."""

import latentkv as lk
import torch
from latentkv.testing import POISON, assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
L, R, piece = 512, 64, 64

# Prefixes of 100, 0 and 70 tokens, in blocks of 64. The table is filled up with what is no block.
cache = lk.layout_for("TRITON_MLA", format="fp8_e4m3fn").allocate(num_blocks=6, device=device, scale=0.05)
prefixes, block_table = torch.tensor([100, 0, 70]), torch.tensor([[4, 1, -1], [-1, -1, -1], [0, 5, -1]])
slots = torch.cat([block_table[s, torch.arange(n) // 64] * 64 + torch.arange(n) % 64 for s, n in ((0, 100), (2, 70))])
lk.write_cache_(torch.randn(170, L), torch.randn(170, R), slots, cache)

workspace = torch.empty(3 * piece, L + R)  # of every prefix at most a piece
read = []
for start in range(0, 100, piece):
    workspace.view(torch.uint8).fill_(POISON)
    lengths = (prefixes - start).clamp(0, piece)  # 64, 0, 64; then 36, 0, 6
    cu_seq_lens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    starts = torch.full_like(prefixes, start)
    lk.gather_cache(cache, block_table, cu_seq_lens, out=workspace, seq_starts=starts)
    kv_c, k_pe = workspace.split([L, R], -1)  # in bf16: for the up-projection, and for attention as it is

    twin = torch.empty_like(workspace)
    twin.view(torch.uint8).fill_(POISON)
    reference.gather_cache(cache, block_table, cu_seq_lens, out=twin, seq_starts=starts)
    assert_same_bytes(workspace, twin)
    total = int(cu_seq_lens[-1])
    assert (workspace[total:].view(torch.uint8) == POISON).all()  # rows past the last sequence
    read.append(total)
print(f"chunked prefill: {read} rows of {L + R}: all bytes equal the reference's")
