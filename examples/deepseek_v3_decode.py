"""DeepSeek-V3, one decode step of a layer on one of eight devices: fp8 query and rows, then other query forms."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P = 6, 128 // 8, 512, 64, 128

# Of the model: weights, random here, and the cos/sin table of its config.json.
yarn = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
config = {"qk_rope_head_dim": R, "rope_theta": 10000, "rope_scaling": yarn}
table = lk.build_cos_sin_cache(config, max_position_embeddings=4096, device=device)
w_uk, weight = torch.randn(H, P, L) / P**0.5, torch.rand(L)

# Of the step: what the projections gave, and where each token goes. Row 4 lives on another device.
q, qkv_a = torch.randn(N, H, P + R), torch.randn(N, 1536 + L + R)
positions, slots = torch.tensor([7, 70, 0, 255, 64, 12]), torch.tensor([7, 70, 128, 255, -1, 140])
q_scale = torch.tensor([0.05], dtype=torch.float32)

layout = lk.layout_for("FLASHMLA", format="fp8_e4m3fn")
cache, twin = (layout.allocate(num_blocks=4, device=device, scale=0.05) for _ in range(2))
q_nope = torch.bmm(q[..., :P].transpose(0, 1), w_uk).transpose(0, 1)  # [N, H, L], strides of [H, N, L]
q_pe, kv_c, k_pe = q[..., P:], qkv_a[:, 1536 : 1536 + L], qkv_a[:, 1536 + L :]
inputs = (q_nope, q_pe, kv_c, k_pe, positions, table, slots)
q_out = lk.decode_prologue(*inputs, cache, is_neox=False, q_dtype=layout.dtype, q_scale=q_scale, kv_norm_weight=weight)

expected = reference.decode_prologue(
    *inputs, twin, is_neox=False, q_dtype=layout.dtype, q_scale=q_scale, kv_norm_weight=weight
)
assert_same_bytes(q_out, expected)
assert_same_bytes(cache.data, twin.data)
print(f"deepseek-v3: fp8 query {list(q_out.shape)} and rows: all bytes equal the reference's")

# Readers that take the parts of the query apart.
split = lk.layout_for("FLASHINFER_PAGED_MLA").allocate(num_blocks=4, device=device)
q_rope = torch.empty(N, H, R)
q_latent = lk.decode_prologue(*inputs, split, is_neox=False, kv_norm_weight=weight, q_rope_out=q_rope)

# The product is written where attention reads it: only the rope part remains.
q_out = torch.empty(N, H, L + R)
torch.bmm(q[..., :P].transpose(0, 1), w_uk, out=q_out[..., :L].transpose(0, 1))
lk.decode_prologue(None, *inputs[1:], split, is_neox=False, kv_norm_weight=weight, q_out=q_out)

expected = reference.decode_prologue(*inputs, twin, is_neox=False, kv_norm_weight=weight)
assert_same_bytes(torch.cat([q_latent, q_rope], -1), expected)
assert_same_bytes(q_out, expected)
print("deepseek-v3: split query, query in place: all bytes equal the reference's")
