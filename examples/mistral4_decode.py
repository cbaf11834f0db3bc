"""Mistral-4 Small, one decode step of a layer: 256 + 64 elements, in a batch padded to the size of its CUDA graph."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, T, H, L, R, P = 8, 5, 32, 256, 64, 64  # 5 tokens in a graph for 8

yarn = {"rope_type": "yarn", "factor": 128, "original_max_position_embeddings": 8192, "mscale": 1.0}
config = {"qk_rope_head_dim": R, "rope_theta": 10000, "rope_parameters": yarn | {"mscale_all_dim": 1.0}}
table = lk.build_cos_sin_cache(config, max_position_embeddings=4096, device=device)
w_uk, weight = torch.randn(H, P, L) / P**0.5, torch.rand(L)

q, kv_a = torch.randn(N, H, P + R), torch.randn(N, L + R)
positions, slots = torch.arange(N), torch.tensor([7, 21, 0, 40, 33])

layout = lk.select_backend(heads=H, kv_lora_rank=L, rope_dim=R).layout
cache, twin = (layout.allocate(num_blocks=4, device=device) for _ in range(2))
q_nope = torch.bmm(q[..., :P].transpose(0, 1), w_uk).transpose(0, 1)
inputs = (q_nope, q[..., P:], kv_a[:, :L], kv_a[:, L:], positions, table, slots)
kv_c = torch.empty(N, L)
q_out = lk.decode_prologue(*inputs, cache, is_neox=False, kv_norm_weight=weight, kv_c_out=kv_c)
assert not q_out[T:].any()  # padding

kv_c_twin = torch.empty(N, L)
expected = reference.decode_prologue(*inputs, twin, is_neox=False, kv_norm_weight=weight, kv_c_out=kv_c_twin)
assert_same_bytes(q_out, expected)
assert_same_bytes(kv_c[:T], kv_c_twin[:T])
assert_same_bytes(cache.data, twin.data)
print(f"mistral-4-small: query {list(q_out.shape)}, latents, rows of {L} + {R}: all bytes equal the reference's")
