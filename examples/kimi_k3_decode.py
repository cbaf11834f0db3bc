"""Kimi-K3, one decode step of an MLA layer on one of eight devices: its 64 rope elements are not rotated."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P = 6, 96 // 8, 512, 64, 128

w_uk, weight = torch.randn(H, P, L) / P**0.5, torch.rand(L)
q, kv_a = torch.randn(N, H, P + R), torch.randn(N, L + R)
slots = torch.tensor([7, 21, 0, 40, 33, 63])

layout = lk.select_backend(heads=H).layout
cache, twin = (layout.allocate(num_blocks=4, device=device) for _ in range(2))
q_nope = torch.bmm(q[..., :P].transpose(0, 1), w_uk).transpose(0, 1)
inputs = (q_nope, q[..., P:], kv_a[:, :L], kv_a[:, L:], None, None, slots)  # no positions, no table
q_out = lk.decode_prologue(*inputs, cache, is_neox=False, kv_norm_weight=weight)

assert_same_bytes(q_out, reference.decode_prologue(*inputs, twin, is_neox=False, kv_norm_weight=weight))
assert_same_bytes(cache.data, twin.data)
print(f"kimi-k3: query {list(q_out.shape)} and rows: all bytes equal the reference's")
