"""A prefill node with MI300s hands its cache to a decode node with Hopper GPUs: another fp8 kind, other blocks."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P = 150, 16, 512, 64, 128

# Node A, prefill: N tokens of one sequence, in blocks of 16 rows of MI300's fp8 kind.
mi300 = lk.Platform("rocm", "gfx942")
sent = lk.layout_for("ROCM_AITER_MLA", format=mi300.fp8_format, block_size=16)
prefilled = sent.allocate(num_blocks=24, device=device, scale=0.05)
table = lk.build_cos_sin_cache(qk_rope_head_dim=R, rope_theta=10000, max_position_embeddings=4096, device=device)
q, kv_c, k_pe, positions = torch.randn(N, H, P + R), torch.randn(N, L), torch.randn(N, R), torch.arange(N)
kv_c[7, :3] = torch.tensor([20, -20, -0.0])  # the first two are past fp8's largest, 240 * 0.05
blocks = torch.tensor([17, 3, 20, 8, 0, 23, 11, 5, 14, 2])
slots = blocks[positions // 16] * 16 + positions % 16
lk.rope_write_cache_(positions, q[..., P:], k_pe, kv_c, table, slots, prefilled, is_neox=False)

# The network: the sequence's blocks, in order. A copy stands for it.
wire = prefilled.data.view(torch.uint8)[blocks]
print(f"on the wire: {list(wire.shape)}, {sent.row_bytes} bytes a token; bf16 rows take {lk.CacheLayout().row_bytes}")

# Node B, decode: to Hopper's kind with half the scale, in blocks of 64 wherever they are free.
received = lk.MLACache.wrap(wire, sent, prefilled.scale)
pages = lk.layout_for("FLASHMLA", format="fp8_e4m3fn").allocate(num_blocks=8, device=device, scale=prefilled.scale / 2)
block_table = torch.tensor([[6, 1, 4]])
lk.convert_cache_(received, pages, dst_blocks=block_table[0])

q_absorbed, seq_lens, sm_scale = torch.randn(1, H, L + R), torch.tensor([N]), (P + R) ** -0.5
out, lse = lk.mla_decode(q_absorbed, pages, block_table, seq_lens, sm_scale=sm_scale)

# The same rows for other readers on Hopper: 16 bits, and the packed rows of sparse attention.
plain = lk.layout_for("FLASHMLA").allocate(num_blocks=8, device=device)
packed = lk.layout_for("FLASHMLA_SPARSE", format="fp8_ds_mla").allocate(num_blocks=8, device=device)
for cache in (plain, packed):
    lk.convert_cache_(received, cache, dst_blocks=block_table[0])

# Codes are what they were, but for +-240, which have no twin.
written = pages.data.view(torch.uint8)[block_table[0]].view(-1, L + R)[:N]
codes = wire.view(-1, L + R)[:N].clone()
largest = (codes == 0x7F) | (codes == 0xFF)
assert largest.any() and not (codes == 0x80).any()  # no NaN
codes[largest] -= 1
assert_same_bytes(written, codes)
print(f"codes: {codes.numel() - int(largest.sum())} as they were, {int(largest.sum())} of 240 became 448")

# Both sides read back, one value for one code; in bf16 they are what the plain cache has.
lengths, order = torch.tensor([0, N]), blocks[None]
theirs = lk.gather_cache(prefilled, order, lengths, total=N, dtype=torch.float32)
ours = lk.gather_cache(pages, block_table, lengths, total=N, dtype=torch.float32)
assert_same_bytes(ours[~largest], theirs[~largest])
rounded = lk.gather_cache(prefilled, order, lengths, total=N)
assert_same_bytes(lk.gather_cache(plain, block_table, lengths, total=N), rounded)

twins = [cache.layout.allocate(num_blocks=8, device=device, scale=cache.scale) for cache in (pages, plain, packed)]
for cache, twin in zip((pages, plain, packed), twins, strict=True):
    reference.convert_cache_(received, twin, dst_blocks=block_table[0])
    assert_same_bytes(cache.data, twin.data)
print("converted to fp8_e4m3fn, bf16 and fp8_ds_mla in blocks of 64: all bytes equal the reference's")

exact, exact_lse = reference.mla_decode(q_absorbed, pages, block_table, seq_lens, sm_scale=sm_scale)
torch.testing.assert_close(out, exact, atol=0.01, rtol=0.01)
torch.testing.assert_close(lse, exact_lse, atol=0.01, rtol=0.001)
print(f"decoded: {list(out.shape)}, near the reference's")
