"""Multi-head latent attention as an engine runs it: a layer with a paged cache, absorbed decode and expanded prefill.

It is the model of how to use the library under ``torch.compile``, and what the tests and benchmarks of the fusion pass
run. Attention itself is plain PyTorch inside opaque ops, as engines have their kernels. The same inputs give the same
bits. Words: N rows (tokens), H heads, L ``kv_lora_rank``, R ``rope_dim``, P ``nope_dim``, V ``v_dim``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..cache.layouts import FORMATS, MLACache
from ..compile import layer_index, step
from ..models import Model
from ..providers import public

__all__ = ["Batch", "MLAAttention", "Style", "decode_attention", "forward_context", "prefill_attention", "rms_norm"]

# How the layer rotates and writes:      rope                                      cache update
#   op                                   latentkv::rope_ on the slice of q         latentkv::layer_write_cache
#   pytorch                              PyTorch in fp32, q[..., P:] = ...         latentkv::layer_write_cache
#   pytorch_cat                          PyTorch in fp32, q = cat([q_nope, ...])   latentkv::layer_write_cache
#   direct                               latentkv::rope_ on the slice of q         latentkv::write_cache_
#   vllm                                 _C::rotary_embedding                      _C_cache_ops::concat_and_cache_mla
#   fused (what the pass should make)    latentkv::layer_rope_write_cache, one launch
Style = Literal["op", "pytorch", "pytorch_cat", "direct", "vllm", "fused"]
DIRECT = ("direct", "vllm")  # these take the cache and the slots as arguments; the others find them by the layer


# ------------------------------------------------------------------------------------------------ one step's tokens


@dataclass(frozen=True)
class Batch:
    """The tokens of a step, one a row, as a scheduler hands them to the model.

    Attributes:
        positions: [N] int64.
        slot_mapping: [N] int64: where each row goes.
        block_table: [N, M] int64: the blocks of the row's sequence.
        seq_lens: [N] int64: tokens that the row attends to, itself included.
        first_rows: [N] int64: the row in which the tokens of its sequence start.
    """

    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    first_rows: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], new: Sequence[int], block_table: Tensor, block_size: int) -> Batch:
        """The last ``new[s]`` tokens of every sequence s of ``lengths[s]`` tokens, its blocks ``block_table[s]``."""
        device, rows, positions, first_rows = block_table.device, list[int](), list[int](), list[int]()
        for sequence, (length, count) in enumerate(zip(lengths, new, strict=True)):
            first_rows += [len(rows)] * count
            rows += [sequence] * count
            positions += range(length - count, length)
        table, at = block_table[rows], torch.tensor(positions, device=device)
        slots = table.gather(1, at[:, None] // block_size)[:, 0] * block_size + at % block_size
        return cls(at, slots, table, at + 1, torch.tensor(first_rows, device=device))

    def copy_(self, other: Batch) -> None:
        """Takes over another batch of as many rows: captured CUDA graphs read from these very tensors."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))


_current: ContextVar[tuple[Batch, Mapping[int, MLACache]]] = ContextVar("latentkv.testing.mla")


@contextmanager
def forward_context(caches: Mapping[str, MLACache], batch: Batch) -> Iterator[None]:
    """Around a call of the model: tells cache updates and attention where the rows of each layer, by name, lie."""
    token = _current.set((batch, {layer_index(name): cache for name, cache in caches.items()}))
    try:
        with step(caches, batch.slot_mapping):
            yield
    finally:
        _current.reset(token)


# --------------------------------------------------------------------------------------------------- attention, opaque


def _softmax(scores: Tensor, scale: float, visible: Tensor, dtype: torch.dtype) -> Tensor:
    return (scores.float() * scale).masked_fill(~visible, float("-inf")).softmax(-1).to(dtype)


@torch.library.custom_op("latentkv_testing::decode_attention", mutates_args=())
def decode_attention(q_latent: Tensor, q_pe: Tensor, written: Tensor, layer: int, scale: float) -> Tensor:
    """Absorbed queries [N, H, L] and [N, H, R] against the rows in the paged cache: out [N, H, L].

    ``written`` is what the update of the layer's cache returned: to take it is to run after the update.
    """
    batch, caches = _current.get()
    cache = caches[layer]
    assert cache.latent is not None and cache.rope is not None, "packed rows are not read here"
    keys = torch.cat([_read(part, cache, batch.block_table) for part in (cache.latent, cache.rope)], -1)  # [N, S, L+R]
    keys = keys.to(q_latent.dtype)
    visible = torch.arange(keys.shape[1], device=keys.device) < batch.seq_lens[:, None]
    scores = torch.bmm(torch.cat([q_latent, q_pe], -1), keys.transpose(1, 2))
    return torch.bmm(_softmax(scores, scale, visible[:, None], keys.dtype), keys[..., : q_latent.shape[-1]])


def _read(part: Tensor, cache: MLACache, blocks: Tensor) -> Tensor:
    """The rows [N, S, C] of ``blocks`` [N, M], dequantised."""
    rows = part.view(torch.uint8)[blocks] if part.element_size() == 1 else part[blocks]
    rows = rows.view(cache.layout.dtype).flatten(1, 2)
    if not FORMATS[cache.layout.format].quantised:
        return rows
    return rows.float() if cache.scale is None else rows.float() * cache.scale


@decode_attention.register_fake
def _(q_latent: Tensor, q_pe: Tensor, written: Tensor, layer: int, scale: float) -> Tensor:
    return q_latent.new_empty(q_latent.shape)


@torch.library.custom_op("latentkv_testing::prefill_attention", mutates_args=())
def prefill_attention(q: Tensor, k: Tensor, v: Tensor, written: Tensor, scale: float) -> Tensor:
    """Causal attention among the tokens of each sequence of the batch; q, k [N, H, P + R], v and out [N, H, V]."""
    batch, _ = _current.get()
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    row = torch.arange(q.shape[1], device=q.device)
    visible = (row <= row[:, None]) & (row >= batch.first_rows[:, None])
    return torch.bmm(_softmax(torch.bmm(q, k.transpose(1, 2)), scale, visible, q.dtype), v).transpose(0, 1).contiguous()


@prefill_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, written: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


# ------------------------------------------------------------------------------------------------------------ the layer


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension, in fp32."""
    v = x.float()
    return (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """RoPE in fp32 as engines spell it; x [N, H, R], cos and sin [N, 1, R/2]."""
    v = x.float()
    x1, x2 = v.chunk(2, -1) if is_neox else (v[..., ::2], v[..., 1::2])
    turned = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)
    return (torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2)).to(x.dtype)


class MLAAttention(torch.nn.Module):
    """One attention layer of DeepSeek-V2 or -V3 with random weights.

    Args:
        name: the layer's, which :func:`forward_context` has its cache under.
        model: dimensions.
        cos_sin_cache: [max_position, R], of :func:`latentkv.build_cos_sin_cache`; weights lie on its device.
        hidden_size: of the residual stream: 2048 in DeepSeek-V2-Lite, 7168 in -V3.
        q_lora_rank: 1536 in DeepSeek-V3; None projects queries in one step, as DeepSeek-V2-Lite does.
        heads: on this device; None for all of the model's.
        v_dim: elements of a value head.
        style: how to rotate and write, see the table above.
        is_neox: pairs (i, i + R/2) or (2i, 2i + 1); None for the model's own.
        cache: where styles that do not go by the layer's name write; vLLM's ops want fp8 rows as ``torch.uint8``.
        dtype: of weights and activations.
        seed: of the weights.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        cos_sin_cache: Tensor,
        *,
        hidden_size: int,
        q_lora_rank: int | None = None,
        heads: int | None = None,
        v_dim: int = 128,
        style: Style = "op",
        is_neox: bool | None = None,
        cache: MLACache | None = None,
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if style not in get_args(Style) or (style in DIRECT) != (cache is not None):
            raise ValueError(f"style: expected one of {get_args(Style)}, {DIRECT} with a cache, got {style!r}")
        self.layer = layer_index(name)  # graphs know the layer by it, and equal layers share one
        self.latent_dim, self.rope_dim, self.nope_dim = model.kv_lora_rank, model.rope_dim, model.nope_dim
        self.heads = heads or model.heads
        self.scale = (self.nope_dim + self.rope_dim) ** -0.5
        self.style, self.cos_sin_cache, self.cache = style, cos_sin_cache, cache
        self.is_neox = model.is_neox if is_neox is None else is_neox
        generator = torch.Generator(cos_sin_cache.device).manual_seed(seed)

        def weight(*shape: int) -> torch.nn.Parameter:
            x = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
            x = x / shape[-1] ** 0.5 if len(shape) > 1 else x / 10 + 1  # a norm's are about 1
            return torch.nn.Parameter(x, requires_grad=False)

        self.q_a, self.q_norm = None, None
        if q_lora_rank is not None:
            self.q_a, self.q_norm = weight(q_lora_rank, hidden_size), weight(q_lora_rank)
        self.q_b = weight(self.heads * (self.nope_dim + self.rope_dim), q_lora_rank or hidden_size)
        self.kv_a, self.kv_norm = weight(self.latent_dim + self.rope_dim, hidden_size), weight(self.latent_dim)
        self.kv_b = weight(self.heads, self.nope_dim + v_dim, self.latent_dim)  # a head's W_UK over its W_UV
        self.o = weight(hidden_size, self.heads * v_dim)

    def forward(
        self, hidden: Tensor, positions: Tensor, slot_mapping: Tensor | None = None, prefill: bool = False
    ) -> Tensor:
        """hidden [N, hidden_size] to the same; ``slot_mapping`` where the style takes it as an argument."""
        q, kv_c, k_pe = self.project(hidden)
        q, k_pe, written = self.update(positions, q, k_pe, kv_c, slot_mapping)
        return self.attend(q, kv_c, k_pe, written, prefill)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [N, H, P + R], the normalised kv_c [N, L], and k_pe [N, R], a slice of a projection."""
        if self.q_a is not None and self.q_norm is not None:
            q = linear(rms_norm(linear(hidden, self.q_a), self.q_norm), self.q_b)
        else:
            q = linear(hidden, self.q_b)
        kv_c, k_pe = linear(hidden, self.kv_a).split([self.latent_dim, self.rope_dim], -1)
        return q.unflatten(-1, (self.heads, -1)), rms_norm(kv_c, self.kv_norm), k_pe

    def update(
        self, positions: Tensor, q: Tensor, k_pe: Tensor, kv_c: Tensor, slot_mapping: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotates and writes: the new q and k_pe, and a tensor for attention to consume."""
        table, is_neox, ops = self.cos_sin_cache, self.is_neox, torch.ops
        q_pe = q[..., self.nope_dim :]
        if self.style == "fused":
            return q, k_pe, ops.latentkv.layer_rope_write_cache(
                positions, q_pe, k_pe, kv_c, table, is_neox, self.layer
            )  # fmt: skip
        if self.style.startswith("pytorch"):
            cos, sin = table[positions].float()[:, None].chunk(2, -1)
            k_pe = rotate(k_pe[:, None], cos, sin, is_neox)[:, 0]
            if self.style == "pytorch":
                q[..., self.nope_dim :] = rotate(q_pe, cos, sin, is_neox)
            else:
                q = torch.cat([q[..., : self.nope_dim], rotate(q_pe, cos, sin, is_neox)], -1)
        elif self.style == "vllm":
            ops._C.rotary_embedding(positions, q_pe, k_pe[:, None], self.rope_dim, table, is_neox)
        else:
            public.rope_(positions, q_pe, k_pe, table, is_neox=is_neox)

        if self.cache is None:
            return q, k_pe, ops.latentkv.layer_write_cache(kv_c, k_pe, self.layer)
        assert slot_mapping is not None, f"style {self.style} takes the slots as an argument"
        # Tells the graph that no row is padding. The fused op would leave padding as it is, so the pass has to know.
        torch._check(slot_mapping.shape[0] == positions.shape[0])
        if self.style == "vllm":
            dtype = "fp8" if self.cache.data.dtype == torch.uint8 else "auto"
            rows = (kv_c, k_pe, self.cache.data, slot_mapping)
            ops._C_cache_ops.concat_and_cache_mla(*rows, dtype, self.cache.scale)
        else:
            public.write_cache_(kv_c, k_pe, slot_mapping, self.cache)
        return q, k_pe, self.cache.data  # the graph knows that this was written

    def attend(self, q: Tensor, kv_c: Tensor, k_pe: Tensor, written: Tensor, prefill: bool) -> Tensor:
        """Attention and the output projection [N, hidden_size], once the rows are written."""
        w_uk, w_uv = self.kv_b[:, : self.nope_dim], self.kv_b[:, self.nope_dim :]  # [H, P, L] and [H, V, L]
        q_nope, q_pe = q[..., : self.nope_dim], q[..., self.nope_dim :]
        if prefill:  # every head's own keys and values, of the tokens at hand
            kv = linear(kv_c, self.kv_b.flatten(0, 1)).unflatten(-1, (self.heads, -1))
            k = torch.cat([kv[..., : self.nope_dim], k_pe[:, None].expand(-1, self.heads, -1)], -1)
            out = prefill_attention(q, k, kv[..., self.nope_dim :], written, self.scale)
        else:  # every head's query, brought to the latent space of the cached rows
            q_latent = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
            out = decode_attention(q_latent, q_pe, written, self.layer, self.scale)
            out = torch.bmm(out.transpose(0, 1), w_uv.transpose(1, 2)).transpose(0, 1)
        return linear(out.flatten(1), self.o)
