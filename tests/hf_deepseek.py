"""transformers' DeepSeek-V3 on latentkv's paged cache: a small random model, and greedy decoding with it.

Attention is patched: rope in plain fp32 PyTorch on pairs (2i, 2i + 1), the rows written by ``layer_write_cache``, and
absorbed attention over the paged cache for prompts and new tokens alike. As in an engine, the tokens of all sequences
are packed into one row of N, so that one graph serves the prompts and every step after them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import latentkv as lk
import torch
from latentkv.compile import layer_index
from latentkv.testing.mla import Batch, decode_attention, forward_context, rotate
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

BLOCK_SIZE = 4
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}

Call = Callable[[Tensor, Tensor], Tensor]  # token ids [1, N] and positions [1, N] to logits [1, N, vocabulary]


class PagedAttention(torch.nn.Module):
    """``DeepseekV3Attention`` with its weights, on the paged cache of layer ``name``."""

    def __init__(self, hf: torch.nn.Module, name: str, table: Tensor, fused: bool) -> None:
        super().__init__()
        self.hf, self.layer, self.table, self.fused = hf, layer_index(name), table, fused

    def forward(self, hidden_states: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, None]:
        hf, positions, nope = self.hf, position_ids[0], self.hf.qk_nope_head_dim
        q = hf.q_b_proj(hf.q_a_layernorm(hf.q_a_proj(hidden_states[0]))).unflatten(-1, (hf.num_heads, -1))
        kv_c, k_pe = hf.kv_a_proj_with_mqa(hidden_states[0]).split([hf.kv_lora_rank, hf.qk_rope_head_dim], -1)
        kv_c = hf.kv_a_layernorm(kv_c)
        if self.fused:  # by hand, what the pass makes of the other branch
            written = torch.ops.latentkv.layer_rope_write_cache(
                positions, q[..., nope:], k_pe, kv_c, self.table, False, self.layer
            )
        else:
            cos, sin = self.table[positions][:, None].chunk(2, -1)
            k_pe = rotate(k_pe[:, None], cos, sin, is_neox=False)
            q[..., nope:] = rotate(q[..., nope:], cos, sin, is_neox=False)
            written = torch.ops.latentkv.layer_write_cache(kv_c, k_pe, self.layer)
        w_uk, w_uv = hf.kv_b_proj.weight.unflatten(0, (hf.num_heads, -1)).split([nope, hf.v_head_dim], 1)
        q_latent = torch.bmm(q[..., :nope].transpose(0, 1), w_uk).transpose(0, 1)
        out = decode_attention(q_latent, q[..., nope:], written, self.layer, hf.scaling)
        out = torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
        return hf.o_proj(out.flatten(1))[None], None


def hf_model(device: str, dtype: torch.dtype = torch.bfloat16) -> DeepseekV3ForCausalLM:
    """The model as transformers has it: a dense layer and one with experts, random weights."""
    config = DeepseekV3Config(
        vocab_size=211, hidden_size=96, intermediate_size=128, moe_intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=48, kv_lora_rank=64, qk_rope_head_dim=16,
        qk_nope_head_dim=32, v_head_dim=32, max_position_embeddings=256, rope_parameters=dict(YARN),
        initializer_range=0.2, num_mtp_layers=0,
    )  # fmt: skip
    config._experts_implementation = "batched_mm"  # the only one without a loop that depends on the data
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval().requires_grad_(False).to(device, dtype)


def patch(model: DeepseekV3ForCausalLM, fused: bool = False) -> Call:
    """Patches the model's attention; returns its forward, for :func:`torch.compile` or to be called as it is."""
    table = lk.build_cos_sin_cache(model.config, device=model.device)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn = PagedAttention(layer.self_attn, f"layers.{i}", table, fused)
    unused = torch.zeros(1, 1, 1, 1, device=model.device)  # a mask of four dimensions is passed on as it is

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        return model(input_ids=ids, position_ids=positions, attention_mask=unused, use_cache=False).logits

    return forward


def new_caches(model: DeepseekV3ForCausalLM, num_blocks: int, format: str = "bf16") -> dict[str, lk.MLACache]:
    layout = lk.CacheLayout(model.config.kv_lora_rank, model.config.qk_rope_head_dim, BLOCK_SIZE, format)
    return {f"layers.{i}": layout.allocate(num_blocks, model.device, 0.05) for i in range(len(model.model.layers))}


def decode_greedily(
    call: Call, caches: Mapping[str, lk.MLACache], prompts: Sequence[Sequence[int]], new_tokens: int, device: str
) -> tuple[Tensor, Tensor]:
    """The tokens [S, new_tokens] that follow the S prompts, and the logits [new_tokens, S, vocabulary] of each step."""
    count, lengths = len(prompts), [len(prompt) for prompt in prompts]
    blocks = -(-(max(lengths) + new_tokens) // BLOCK_SIZE)
    order = torch.randperm(count * blocks, generator=torch.Generator().manual_seed(1))
    block_table = order.view(count, blocks).to(device)

    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    batch = Batch.of(lengths, lengths, block_table, BLOCK_SIZE)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1  # the row of each prompt's last token
    tokens, logits = list[Tensor](), list[Tensor]()
    for step in range(new_tokens):
        with forward_context(caches, batch), torch.no_grad():
            inputs = (ids[None], batch.positions[None])
            for t in inputs:
                torch._dynamo.mark_dynamic(t, 1)
            logits.append(call(*inputs)[0, last].clone())
        ids = logits[-1].argmax(-1)
        tokens.append(ids)
        lengths = [length + 1 for length in lengths]
        following = Batch.of(lengths, [1] * count, block_table, BLOCK_SIZE)
        if step == 0:
            batch, last = following, torch.arange(count, device=device)
        else:
            batch.copy_(following)  # a CUDA graph was captured on these tensors
    return torch.stack(tokens, 1), torch.stack(logits)
