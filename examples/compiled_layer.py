"""Rope and cache update, written apart as models have them, and fused under torch.compile."""

import latentkv as lk
import torch
from latentkv.testing import assert_same_bytes, reference

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(device)
torch.set_default_dtype(torch.bfloat16)
N, H, L, R, P, hidden = 6, 16, 512, 64, 128, 256
w_q, w_kv = torch.randn(hidden, H * (P + R)) / hidden**0.5, torch.randn(hidden, L + R) / hidden**0.5
x, positions = torch.randn(N, hidden), torch.tensor([7, 70, 0, 255, 64, 12])
slots = torch.tensor([7, 70, 128, 255, 64, -1])
table = lk.build_cos_sin_cache(qk_rope_head_dim=R, rope_theta=1e4, max_position_embeddings=4096, device=device)
torch._inductor.config.emulate_precision_casts = True  # products in fp32 PyTorch round as in eager

layout = lk.CacheLayout(L, R, block_size=64, format="fp8_e4m3fn")
cache, twin = (layout.allocate(num_blocks=4, device=device, scale=0.1) for _ in range(2))
layer = lk.compile.layer_index("model.layers.0.attn")


def rope(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """GPT-J pairs, in fp32."""
    a, b = t[..., ::2].float(), t[..., 1::2].float()
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).to(t.dtype)


def before_attention(x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a model does between the projections and attention."""
    q, (kv_c, k_pe) = (x @ w_q).view(-1, H, P + R), (x @ w_kv).split([L, R], -1)
    cos, sin = table[positions].unsqueeze(1).chunk(2, -1)
    q[..., P:] = rope(q[..., P:], cos, sin)
    k_pe = rope(k_pe.unsqueeze(1), cos, sin)
    return q, torch.ops.latentkv.layer_write_cache(kv_c, k_pe, layer)  # attention takes both


with lk.compile.enable(strict=True) as fusion, lk.compile.step({"model.layers.0.attn": cache}, slots):
    q, written = torch.compile(before_attention)(x, positions)
print(fusion.report)

expected, (kv_c, k_pe) = (x @ w_q).view(-1, H, P + R), (x @ w_kv).split([L, R], -1)
q_pe = expected[..., P:]
reference.rope_write_cache_(positions, q_pe, k_pe, kv_c, table, slots, twin, is_neox=False, rope_masked=True)
assert_same_bytes(q, expected)
assert_same_bytes(cache.data, twin.data)
print(f"query {list(q.shape)} and {layout.format} rows: all bytes equal the reference's")
