"""The specification: every op in plain PyTorch, on the plain tensors of the torch ops.

The other providers must give these very bytes. Rounding, in full: RoPE multiplies and adds in fp32, every step rounded
by itself, and rounds once to the activation dtype; RMSNorm does too, and adds up in one fixed order; fp8 divides by the
scale in fp32, clamps to the finite range and rounds to nearest even; 16- and 32-bit rows are copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..cache.layouts import FORMATS, Format
from .checks import (
    INDEX_DIM,
    QUERY_FORMATS,
    Arguments,
    check_convert,
    check_decode,
    check_gather,
    check_grouped,
    check_indexer,
    check_norm,
    check_query,
    check_rope,
    check_update,
    convert_slots,
    decode_slots,
    gather_slots,
    outside,
)

# -------------------------------------------------------------------------------------------------- the arithmetic


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """``x`` [..., R] turned by angles whose ``cos`` and ``sin`` [..., R/2] are fp32; pairs (i, i+R/2) or (2i, 2i+1)."""
    half = x.shape[-1] // 2
    a, b = x.float().reshape(*x.shape[:-1], *((2, half) if is_neox else (half, 2))).unbind(-2 if is_neox else -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, -2 if is_neox else -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` [N, L] / sqrt(mean of its squares + eps) * ``weight`` [L], in fp32 and in the one order that all keep."""
    v, size = x.float(), x.shape[1]
    squares = torch.nn.functional.pad(v * v, (0, -size % 256)).unflatten(1, (-1, 32, 8))
    total = torch.zeros_like(squares[:, 0, :, 0])  # [N, 32]: element i belongs to partial (i // 8) % 32
    for eight in squares.unbind(1):
        for part in eight.unbind(-1):
            total = total + part
    for half in (16, 8, 4, 2, 1):
        total = total[:, :half] + total[:, half:]
    mean = total / torch.full_like(total, size) + torch.full_like(total, eps)
    root = mean.double().sqrt().float()  # torch's fp32 square root is not rounded correctly on every CPU
    return (v * (torch.ones_like(root) / root) * weight.float()).to(x.dtype)


def quantise(x: Tensor, f: Format) -> Tensor:
    """The uint8 codes of fp32 numbers in an fp8 format."""
    assert f.max is not None and f.nan is not None
    return torch.where(x.isnan(), f.nan, x.clamp(-f.max, f.max).to(f.dtype).view(torch.uint8))


def dequantise(codes: Tensor, scale: Tensor | None, f: Format) -> Tensor:
    """The fp32 numbers that the uint8 codes of an fp8 format stand for."""
    return codes.view(f.dtype).float() * (torch.ones((), device=codes.device) if scale is None else scale.reshape(()))


def encode(x: Tensor, format: str, scale: Tensor | None) -> Tensor:
    """The stored form of activations ``x``: themselves, or the uint8 codes of an fp8 format."""
    f = FORMATS[format]
    if not f.quantised:
        return x
    return quantise(x.float() / (torch.ones((), device=x.device) if scale is None else scale.reshape(())), f)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude along the last dimension, of what is a number."""
    return torch.where(x.isnan(), 0, x.abs()).amax(-1)


def power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is at least ``x``, which is fp32 and normal; infinity stays."""
    return ((x.view(torch.int32) + 0x7FFFFF) & -0x800000).view(torch.float32)


def encode_tiles(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """``x`` [N, L] as fp8_e4m3fn codes [N, L], with a power of two [N, L / tile] as the scale of every ``tile``."""
    tiles = x.float().unflatten(1, (-1, tile))
    amax = largest(tiles)
    scale = power_of_two((amax / torch.full_like(amax, 448.0)).clamp(min=1e-4))
    return quantise(tiles / scale[..., None], FORMATS["fp8_e4m3fn"]).flatten(1), scale


# --------------------------------------------------------------------------------------------------------- the ops


def rope_(
    positions: Tensor, q: Tensor, k: Tensor | None, cos_sin_cache: Tensor, is_neox: bool, inverse: bool = False
) -> None:
    """See :meth:`latentkv.providers.Provider.rope_`."""
    args = Arguments("rope_", q.device)
    check_rope(args, positions, q, k, cos_sin_cache)
    rotates = torch.full_like(positions, q.shape[2] > 0, dtype=torch.bool)
    rows = (~outside(args, rotates, None, 0, positions, cos_sin_cache)).nonzero().flatten()
    _rotate_rows(rows, positions, (q, k), cos_sin_cache, is_neox, inverse)


def write_cache_(
    kv_c: Tensor,
    k_pe: Tensor,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_`."""
    args = Arguments("write_cache_", kv_c.device)
    f = check_update(args, None, None, k_pe, kv_c, None, slot_mapping, cache, rope_cache, scale, format, False)
    rows, _ = _plan(args, None, None, slot_mapping, cache, False)
    _write_rows(rows, slot_mapping, kv_c[rows], k_pe[rows], cache, rope_cache, scale, f)


def rope_write_cache_(
    positions: Tensor | None,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    is_neox: bool,
    rope_masked: bool = False,
) -> None:
    """See :meth:`latentkv.providers.Provider.rope_write_cache_`."""
    args = Arguments("rope_write_cache_", kv_c.device)
    rotates, slots = cos_sin_cache is not None, slot_mapping
    f = check_update(
        args, positions, q_pe, k_pe, kv_c, cos_sin_cache, slots, cache, rope_cache, scale, format, rotates
    )  # fmt: skip
    rows, turned = _plan(args, positions, cos_sin_cache, slots, cache, rope_masked)
    _rotate_rows(turned, positions, (q_pe, k_pe), cos_sin_cache, is_neox)
    _write_rows(rows, slots, kv_c[rows], k_pe[rows], cache, rope_cache, scale, f)


def decode_prologue(
    q_nope: Tensor | None,
    q_pe: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    q_out: Tensor,
    q_rope_out: Tensor | None,
    kv_c_out: Tensor | None,
    q_scale: Tensor | None,
    kv_norm_weight: Tensor | None,
    is_neox: bool,
    kv_norm_eps: float = 1e-6,
    rope_masked: bool = True,
) -> None:
    """See :meth:`latentkv.providers.Provider.decode_prologue`."""
    args, slots = Arguments("decode_prologue", kv_c.device), slot_mapping
    f = check_update(args, positions, q_pe, k_pe, kv_c, cos_sin_cache, slots, cache, rope_cache, scale, format, False)
    check_query(args, q_nope, q_pe, kv_c, q_out, q_rope_out, q_scale)
    check_norm(args, kv_c, kv_norm_weight, kv_c_out)

    rows, turned = _plan(args, positions, cos_sin_cache, slots, cache, rope_masked)
    q_pe, k_pe, latent = q_pe.clone(), k_pe.clone(), kv_c[rows]
    _rotate_rows(turned, positions, (q_pe, k_pe), cos_sin_cache, is_neox)
    parts = (q_out, q_rope_out) if q_rope_out is not None else q_out.tensor_split((kv_c.shape[1],), -1)
    dead = torch.ones(len(q_pe), dtype=torch.bool, device=q_pe.device).index_fill_(0, rows, False)
    for out, x in zip(parts, (q_nope, q_pe), strict=True):
        assert out is not None
        kind = QUERY_FORMATS.get(out.dtype)
        out = out.view(torch.uint8) if kind else out
        if x is not None and kind:
            one = torch.ones((), device=x.device)
            factor = one if q_scale is None else one / q_scale.reshape(())
            out[rows] = quantise(x[rows].float() * factor, kind)
        elif x is not None:
            out[rows] = x[rows]
        out[dead] = 0
    if kv_norm_weight is not None:
        latent = rms_norm(latent, kv_norm_weight, kv_norm_eps)
    if kv_c_out is not None:
        kv_c_out[rows] = latent
    _write_rows(rows, slots, latent, k_pe[rows], cache, rope_cache, scale, f)


def write_cache_grouped_(
    kv_c: Sequence[Tensor],
    k_pe: Sequence[Tensor],
    slot_mapping: Tensor,
    caches: Sequence[Tensor],
    rope_caches: Sequence[Tensor],
    scales: Sequence[Tensor | None],
    format: str,
) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_grouped_`."""
    args = Arguments("write_cache_grouped_", kv_c[0].device if kv_c else slot_mapping.device)
    f = check_grouped(args, kv_c, k_pe, slot_mapping, caches, rope_caches, scales, format)
    rope_parts: Sequence[Tensor | None] = rope_caches or [None] * len(kv_c)
    rows, _ = _plan(args, None, None, slot_mapping, caches[0], False)
    for latent, rope, cache, rope_cache, scale in zip(kv_c, k_pe, caches, rope_parts, scales, strict=True):
        _write_rows(rows, slot_mapping, latent[rows], rope[rows], cache, rope_cache, scale, f)


def write_indexer_cache_(
    k: Tensor,
    positions: Tensor | None,
    cos_sin_cache: Tensor | None,
    slot_mapping: Tensor,
    cache: Tensor,
    is_neox: bool,
    power_of_two_scale: bool = False,
) -> None:
    """See :meth:`latentkv.providers.Provider.write_indexer_cache_`."""
    args = Arguments("write_indexer_cache_", k.device)
    rope_dim = check_indexer(args, k, positions, cos_sin_cache, slot_mapping, cache)
    rows, turned = _plan(args, positions, cos_sin_cache, slot_mapping, cache, False)
    k = k.clone()
    _rotate_rows(turned, positions, (k[:, :rope_dim],), cos_sin_cache, is_neox)
    x = k[rows].float()
    amax = largest(x).clamp(min=1e-4)
    scale = amax / torch.full_like(amax, 448.0)
    scale = (power_of_two(scale) if power_of_two_scale else scale)[:, None]
    codes = quantise(x / scale, FORMATS["fp8_e4m3fn"])
    own = slot_mapping[rows].long()
    row = (codes[own >= 0], scale.view(torch.uint8)[own >= 0])
    _put(own[own >= 0], row, _run(cache, INDEX_DIM, 4))


def gather_cache(
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    out: Tensor,
    kv_lora_rank: int,
    seq_starts: Tensor | None = None,
) -> None:
    """See :meth:`latentkv.providers.Provider.gather_cache`."""
    args = Arguments("gather_cache", cache.device)
    f = check_gather(
        args, cache, rope_cache, scale, format, block_table, cu_seq_lens, out, kv_lora_rank, seq_starts
    )  # fmt: skip
    rows, slots = gather_slots(args, cache, block_table, cu_seq_lens, out, seq_starts)
    out[rows[slots < 0]] = 0
    dims = (kv_lora_rank, out.shape[1] - kv_lora_rank)
    parts = _read(slots[slots >= 0], cache, rope_cache, scale, f, dims)
    out[rows[slots >= 0]] = torch.cat([x.to(out.dtype) for x in parts], 1)


def convert_cache_(
    src: Tensor,
    src_rope: Tensor | None,
    src_scale: Tensor | None,
    src_format: str,
    dst: Tensor,
    dst_rope: Tensor | None,
    dst_scale: Tensor | None,
    dst_format: str,
    kv_lora_rank: int,
    rope_dim: int,
    src_blocks: Tensor | None = None,
    dst_blocks: Tensor | None = None,
) -> None:
    """See :meth:`latentkv.providers.Provider.convert_cache_`."""
    args = Arguments("convert_cache_", src.device)
    f, g = check_convert(
        args, src, src_rope, src_scale, src_format, dst, dst_rope, dst_scale, dst_format, kv_lora_rank, rope_dim,
        src_blocks, dst_blocks,
    )  # fmt: skip
    slots, dst_slots = convert_slots(args, src, dst, src_blocks, dst_blocks)
    alive = (slots >= 0) & (dst_slots >= 0)
    slots, dst_slots, dims = slots[alive], dst_slots[alive], (kv_lora_rank, rope_dim)
    one = torch.ones((1,), device=src.device)
    same_scale = torch.equal(*(one if s is None else s.reshape(1) for s in (src_scale, dst_scale)))
    if f == g and (same_scale or not f.quantised):
        _put(dst_slots, _take(slots, parts_of(src, src_rope, f, *dims)), parts_of(dst, dst_rope, f, *dims))
        return
    latent, rope = _read(slots, src, src_rope, src_scale, f, dims)
    if g.activation is not None:
        latent, rope = (latent if g.packed else latent.to(g.activation)), rope.to(g.activation)
    _store(dst_slots, latent, rope, dst, dst_rope, dst_scale, g)


def mla_decode(
    q: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_lora_rank: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    """See :meth:`latentkv.providers.Provider.mla_decode`. In fp64: this is what others are measured against."""
    args = Arguments("mla_decode", q.device)
    f = check_decode(args, q, cache, rope_cache, scale, format, block_table, seq_lens, kv_lora_rank)
    dims = (kv_lora_rank, q.shape[2] - kv_lora_rank)
    out, lse = torch.empty_like(q[..., :kv_lora_rank]), q.new_empty(q.shape[:2], dtype=torch.float32)
    for i, slots in enumerate(decode_slots(args, cache, block_table, seq_lens)):
        latent, rope = (x.double() for x in _read(slots[slots >= 0], cache, rope_cache, scale, f, dims))
        scores = q[i].double() @ torch.cat([latent, rope], 1).T * sm_scale
        lse[i] = scores.logsumexp(1)
        out[i] = scores.softmax(1) @ latent
    return out, lse


# --------------------------------------------------------------------------------------------------------- the rows


def _plan(
    args: Arguments,
    positions: Tensor | None,
    table: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    rope_masked: bool,
) -> tuple[Tensor, Tensor]:
    """The rows to work on, and those of them to rotate."""
    rotates = (slots >= 0) | rope_masked
    if table is None or table.shape[1] == 0:
        rotates = torch.zeros_like(rotates)
    capacity = cache.shape[0] * cache.shape[-2]
    positions = positions[: len(slots)] if positions is not None else None
    rows = (~outside(args, rotates, slots, capacity, positions, table)).nonzero().flatten()
    return rows, rows[rotates[rows]]


def _rotate_rows(
    rows: Tensor,
    positions: Tensor | None,
    tensors: Sequence[Tensor | None],
    table: Tensor | None,
    is_neox: bool,
    inverse: bool = False,
) -> None:
    if positions is None or table is None or table.shape[1] == 0:
        return
    cos, sin = table[positions[rows]].float().chunk(2, -1)
    sin = -sin if inverse else sin
    for t in tensors:
        if t is not None:
            heads = t.dim() == 3
            t[rows] = rotate(t[rows], cos[:, None] if heads else cos, sin[:, None] if heads else sin, is_neox)


def _write_rows(
    rows: Tensor,
    slots: Tensor,
    latent: Tensor,
    rope: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    f: Format,
) -> None:
    """Writes the [latent | rope] that belong to ``rows``, those that have a slot."""
    own = slots[rows].long()
    _store(own[own >= 0], latent[own >= 0], rope[own >= 0], cache, rope_cache, scale, f)


def _store(
    slots: Tensor,
    latent: Tensor,
    rope: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    f: Format,
) -> None:
    """Writes [latent | rope] rows to slots that exist."""
    if f.packed:
        codes, tile_scales = encode_tiles(latent, f.packed.tile)
        scales = tile_scales.view(torch.uint8)
        if f.packed.block_multiple is not None:
            scales = torch.nn.functional.pad((tile_scales.view(torch.int32) >> 23).to(torch.uint8), (0, 1))
        row: tuple[Tensor, ...] = (codes, rope.contiguous().view(torch.uint8), scales)
    else:
        row = (encode(latent, f.name, scale), encode(rope, f.name, scale))
    _put(slots, row, parts_of(cache, rope_cache, f, latent.shape[1], rope.shape[1]))


def parts_of(cache: Tensor, rope_cache: Tensor | None, f: Format, latent_dim: int, rope_dim: int) -> tuple[Tensor, ...]:
    """Where latent, rope and a packed format's scales lie: views [B, bs, .] of elements; bytes for fp8 and packed."""
    if f.packed and f.packed.block_multiple is not None:
        rows, scales = _run(cache, latent_dim + 2 * rope_dim, f.packed.row_bytes - latent_dim - 2 * rope_dim)
        return rows[..., :latent_dim], rows[..., latent_dim:], scales
    pages, *more = (_pages(t, f) for t in (cache, rope_cache) if t is not None)
    if f.packed:
        latent, scales, rope = pages[..., : f.packed.row_bytes].tensor_split((latent_dim, -2 * rope_dim), -1)
        return latent, rope, scales
    rope = more[0][..., :rope_dim] if more else pages[..., latent_dim : latent_dim + rope_dim]
    return pages[..., :latent_dim], rope


def _pages(cache: Tensor, f: Format) -> Tensor:
    """A cache tensor [B, bs, C] or [B, 1, bs, C] as [B, bs, C], of bytes where the format is not 16- or 32-bit."""
    pages = cache.view(torch.uint8) if f.quantised else cache
    return pages.squeeze(1) if pages.dim() == 4 else pages


def _run(cache: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Blocks [B, bs, >= sum of widths] of bytes, in which first one part of all rows lies and then the next."""
    blocks, entries = cache.shape[0], cache.shape[-2]
    block = cache.as_strided((blocks, entries * sum(widths)), (cache.stride(0), 1))
    parts = block.split([entries * width for width in widths], 1)
    return tuple(part.unflatten(1, (entries, width)) for part, width in zip(parts, widths, strict=True))


def _put(slots: Tensor, row: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """Into views [B, bs, .] of a cache the parts of rows."""
    for part, codes in zip(parts, row, strict=True):
        size = max(part.shape[1], 1)
        part[slots // size, slots % size] = codes


def _take(slots: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parts of rows, out of views [B, bs, .] of a cache."""
    return tuple(part[slots // max(part.shape[1], 1), slots % max(part.shape[1], 1)] for part in parts)


# ----------------------------------------------------------------------------------------------------------- reading


def _read(
    slots: Tensor, cache: Tensor, rope_cache: Tensor | None, scale: Tensor | None, f: Format, dims: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Latent [n, L] and rope [n, R] of the rows in slots that exist: as they are, or in fp32 where they are fp8."""
    latent, rope, *scales = _take(slots, parts_of(cache, rope_cache, f, *dims))
    if not f.packed:
        return (dequantise(latent, scale, f), dequantise(rope, scale, f)) if f.quantised else (latent, rope)
    if f.packed.block_multiple is None:
        factors = scales[0].contiguous().view(torch.float32)
    else:
        factors = (scales[0][:, : dims[0] // f.packed.tile].int() << 23).view(torch.float32)
    tiles = latent.view(torch.float8_e4m3fn).float().unflatten(1, (-1, f.packed.tile))
    return (tiles * factors[..., None]).flatten(1), rope.contiguous().view(torch.bfloat16)
