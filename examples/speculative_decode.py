"""Speculative decoding: the accepted tokens enter the caches of all layers of a draft model at once."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
G, N, L, R, hidden = 5, 12, 512, 64, 1024

table = lk.build_cos_sin_cache(qk_rope_head_dim=R, rope_theta=10000, max_position_embeddings=4096, device=device)
w_kv = torch.randn(G, hidden, L + R) / hidden**0.5
states = torch.randn(N, hidden)  # the target model's, of three drafted tokens in each of four sequences
positions = torch.tensor([7, 8, 9, 40, 41, 42, 16, 17, 18, 56, 57, 58])
slots = torch.tensor([7, 8, 9, 40, 41, -1, 80, -1, -1, 120, 121, 122])  # -1: rejected

layout = lk.layout_for("FLASHMLA", format="fp8_e4m3fn")
caches, twins = ([layout.allocate(2, device, scale=0.02 * (g + 1)) for g in range(G)] for _ in range(2))
kv = states @ w_kv  # [G, N, L + R]
kv_c, k_pe = kv[..., :L], kv[..., L:]
lk.rope_(positions, k_pe.transpose(0, 1), None, table, is_neox=False)  # the layers' keys, as heads [N, G, R]
lk.write_cache_grouped_(kv_c, k_pe, slots, caches)

reference.write_cache_grouped_(kv_c, k_pe, slots, twins)
for cache, twin in zip(caches, twins, strict=True):
    assert_same_bytes(cache.data, twin.data)
print(f"speculative decoding: rows of {G} layers: all bytes equal the reference's")
