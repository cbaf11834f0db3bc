"""Context parallelism: each of two ranks caches and attends to half of a sequence, and their results are merged."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P, ranks = 300, 16, 512, 64, 128, 2
sm_scale = (P + R) ** -0.5

layout = lk.layout_for("TRITON_MLA")
table = lk.build_cos_sin_cache(qk_rope_head_dim=R, rope_theta=10000, max_position_embeddings=4096, device=device)
q_pe, k_pe, kv_c, positions = torch.randn(N, H, R), torch.randn(N, R), torch.randn(N, L), torch.arange(N)
q = torch.randn(1, H, L + R)  # of the next token, absorbed and rotated
block_table, whole_table = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2, 3, 4]])

caches, parts = [], []
for rank in range(ranks):  # every second block of 64 is a rank's own
    mine = positions // 64 % ranks == rank
    local = positions // 64 // ranks * 64 + positions % 64
    cache, slots = layout.allocate(num_blocks=3, device=device), torch.where(mine, local, -1)
    query, key = q_pe.clone(), k_pe.clone()
    lk.rope_write_cache_(positions, query, key, kv_c, table, slots, cache, is_neox=False, rope_masked=True)
    parts.append(lk.mla_decode(q, cache, block_table, mine.sum()[None], sm_scale=sm_scale))
    caches.append(cache)

outs, lses = (torch.stack(part) for part in zip(*parts, strict=True))  # [ranks, B, H, L] and [ranks, B, H]
lse = lses.logsumexp(0)
weights = (lses - lse).exp()  # of the ranks; they add up to 1
out = (weights[..., None] * outs.float()).sum(0).to(q.dtype)

whole = layout.allocate(num_blocks=5, device=device)
reference.rope_write_cache_(positions, q_pe, k_pe, kv_c, table, positions, whole, is_neox=False)
assert_same_bytes(query, q_pe)
for rank, cache in enumerate(caches):
    own = whole.data[rank::ranks]
    assert_same_bytes(cache.data[: len(own)], own)
exact, exact_lse = reference.mla_decode(q, whole, whole_table, torch.tensor([N]), sm_scale=sm_scale)
torch.testing.assert_close(out, exact, atol=0.01, rtol=0.01)
torch.testing.assert_close(lse, exact_lse, atol=0.01, rtol=0.001)
print(f"context parallelism: rows of {ranks} ranks: all bytes equal the reference's; merged: near it")
