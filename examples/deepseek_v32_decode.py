"""DeepSeek-V3.2, one decode step of a layer: packed rows with tile scales of their own, and the indexer's keys."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P = 6, 128 // 8, 512, 64, 128

yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
config = {"qk_rope_head_dim": R, "rope_theta": 10000, "rope_scaling": yarn}
table = lk.build_cos_sin_cache(config, max_position_embeddings=4096, device=device)
w_uk, weight = torch.randn(H, P, L) / P**0.5, torch.rand(L)

q, qkv_a = torch.randn(N, H, P + R), torch.randn(N, 1536 + L + R)
index_k = torch.randn(N, 128)  # the indexer's keys, after their LayerNorm
positions, slots = torch.tensor([7, 70, 0, 255, 64, 12]), torch.tensor([7, 70, 128, 255, 64, 140])

layout = lk.layout_for("FLASHMLA_SPARSE", format="fp8_ds_mla")
cache, twin = (layout.allocate(num_blocks=4, device=device) for _ in range(2))
q_nope = torch.bmm(q[..., :P].transpose(0, 1), w_uk).transpose(0, 1)
inputs = (q_nope, q[..., P:], qkv_a[:, 1536 : 1536 + L], qkv_a[:, 1536 + L :], positions, table, slots)
q_out = lk.decode_prologue(*inputs, cache, is_neox=False, kv_norm_weight=weight)

index_cache = torch.zeros(4, 64, 132, dtype=torch.uint8)
lk.write_indexer_cache_(index_k, positions, table, slots, index_cache, is_neox=True, power_of_two_scale=True)

expected = reference.decode_prologue(*inputs, twin, is_neox=False, kv_norm_weight=weight)
assert_same_bytes(q_out, expected)
assert_same_bytes(cache.data, twin.data)
index_twin = torch.zeros_like(index_cache)
reference.write_indexer_cache_(index_k, positions, table, slots, index_twin, is_neox=True, power_of_two_scale=True)
assert_same_bytes(index_cache, index_twin)
print(f"deepseek-v3.2: rows of {layout.row_bytes} bytes, indexer keys of 132: all bytes equal the reference's")

# The row of slot 70, read back: entry 6 of block 1.
row = cache.data[1, 6]
scales = row[512:528].view(torch.float32)
latent = row[:512].view(torch.float8_e4m3fn).float().view(4, 128) * scales[:, None]
key = row[528:656].view(torch.bfloat16)

# Its indexer key: in a block of 64 all codes come first, then all scales.
block = index_cache[1].flatten()
index_codes = block[6 * 128 : 7 * 128].view(torch.float8_e4m3fn)
index_scale = block[64 * 128 :].view(torch.float32)[6]
print(f"slot 70: tile scales {scales.tolist()}, indexer scale {index_scale}")
