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
from .autograd import implementation
from .checks import QUERY_FORMATS, Call, Rotation, Stored, convert_slots, decode_slots, gather_slots, plan

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


@implementation
def rope_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.rope_`."""
    _turn(x.rotation, plan(x).rotate, x.q, x.k)


@implementation
def write_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_`."""
    _write(x, plan(x).write, [x.kv_c], [x.k_pe])


@implementation
def write_cache_grouped_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_cache_grouped_`."""
    _write(x, plan(x).write, x.kv_c, x.k_pe)


@implementation
def rope_write_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.rope_write_cache_`."""
    todo = plan(x)
    _turn(x.rotation, todo.rotate, x.q_pe, x.k_pe)
    _write(x, todo.write, [x.kv_c], [x.k_pe])


@implementation
def decode_prologue(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.decode_prologue`."""
    todo, q_pe, k_pe, latent = plan(x), x.q_pe.clone(), x.k_pe.clone(), x.kv_c
    _turn(x.rotation, todo.rotate, q_pe, k_pe)
    if x.kv_norm_weight is not None:
        latent = rms_norm(latent, x.kv_norm_weight, x.kv_norm_eps)
    rows = todo.alive.nonzero().flatten()
    parts = (x.q_out, x.q_rope_out) if x.q_rope_out is not None else x.q_out.tensor_split((x.sizes["L"],), -1)
    for out, heads in zip(parts, (x.q_nope, q_pe), strict=True):
        _put_heads(out, heads, rows, x.q_scale)
    if x.kv_c_out is not None:
        x.kv_c_out[rows] = latent[rows]
    _write(x, todo.write, [latent], [k_pe])


@implementation
def write_indexer_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.write_indexer_cache_`."""
    todo, k = plan(x), x.k.clone()
    rows = todo.write.nonzero().flatten()
    if x.rotation is not None:
        _turn(x.rotation, todo.rotate, k[:, : x.sizes["R"]])
    values = k[rows].float()
    amax = largest(values).clamp(min=1e-4)
    scale = amax / torch.full_like(amax, 448.0)
    scale = (power_of_two(scale) if x.power_of_two_scale else scale)[:, None]
    codes = quantise(values / scale, FORMATS["fp8_e4m3fn"])
    codes_at, _, scale_at = x.cache.parts
    _put(x.slot_mapping[rows].long(), (codes, scale.view(torch.uint8)), (codes_at, scale_at))


@implementation
def gather_cache(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.gather_cache`."""
    rows, slots = gather_slots(x)
    x.out[rows[slots < 0]] = 0
    parts = _read(slots[slots >= 0], x.cache)
    x.out[rows[slots >= 0]] = torch.cat([part.to(x.out.dtype) for part in parts], 1)


@implementation
def convert_cache_(x: Call) -> None:
    """See :meth:`latentkv.providers.Provider.convert_cache_`."""
    slots, dst_slots = convert_slots(x)
    alive = (slots >= 0) & (dst_slots >= 0)
    slots, dst_slots = slots[alive], dst_slots[alive]
    one = torch.ones((1,), device=x.device)
    same_scale = torch.equal(*(one if c.scale is None else c.scale.reshape(1) for c in (x.src, x.dst)))
    if x.src.format == x.dst.format and (same_scale or not x.src.format.quantised):
        _put(dst_slots, _take(slots, x.src.parts), x.dst.parts)
        return
    (latent, rope), f = _read(slots, x.src), x.dst.format
    if f.activation is not None:
        latent, rope = (latent if f.packed else latent.to(f.activation)), rope.to(f.activation)
    _store(dst_slots, latent, rope, x.dst)


@implementation
def mla_decode(x: Call) -> tuple[Tensor, Tensor]:
    """See :meth:`latentkv.providers.Provider.mla_decode`. In fp64: this is what others are measured against."""
    q, size = x.q, x.sizes["L"]
    out, lse = q.new_empty((*q.shape[:2], size)), q.new_empty(q.shape[:2], dtype=torch.float32)
    for i, slots in enumerate(decode_slots(x)):
        latent, rope = (part.double() for part in _read(slots[slots >= 0], x.cache))
        scores = q[i].double() @ torch.cat([latent, rope], 1).T * x.sm_scale
        lse[i] = scores.logsumexp(1)
        out[i] = scores.softmax(1) @ latent
    return out, lse


# --------------------------------------------------------------------------------------------------------- the rows


def _turn(rotation: Rotation | None, which: Tensor, *tensors: Tensor | None) -> None:
    """Rotates the rows ``which`` (bool [T]) of heads [N, H, R] or [N, R]."""
    if rotation is None:
        return
    rows = which.nonzero().flatten()
    cos, sin = rotation.table[rotation.positions[rows]].float().chunk(2, -1)
    sin = -sin if rotation.inverse else sin
    for t in tensors:
        if t is not None:
            angles = (cos[:, None], sin[:, None]) if t.dim() == 3 else (cos, sin)
            t[rows] = rotate(t[rows], *angles, rotation.is_neox)


def _put_heads(out: Tensor, heads: Tensor | None, rows: Tensor, scale: Tensor | None) -> None:
    """A part of the query: ``heads`` in ``rows``, which are there already where it is None; zero in the others."""
    kind = QUERY_FORMATS.get(out.dtype)
    out = out.view(torch.uint8) if kind else out
    if heads is not None and kind:
        one = torch.ones((), device=heads.device)
        out[rows] = quantise(heads[rows].float() * (one if scale is None else one / scale.reshape(())), kind)
    elif heads is not None:
        out[rows] = heads[rows]
    dead = torch.ones(len(out), dtype=torch.bool, device=out.device)
    out[dead.index_fill_(0, rows, False)] = 0


def _write(x: Call, which: Tensor, latents: Sequence[Tensor], ropes: Sequence[Tensor]) -> None:
    """Writes the rows ``which`` (bool [T]) of every cache."""
    rows = which.nonzero().flatten()
    for latent, rope, cache in zip(latents, ropes, x.written, strict=True):
        _store(x.slot_mapping[rows].long(), latent[rows], rope[rows], cache)


def _store(slots: Tensor, latent: Tensor, rope: Tensor, cache: Stored) -> None:
    """Writes [latent | rope] rows to slots that exist."""
    f = cache.format
    if f.packed:
        codes, tile_scales = encode_tiles(latent, f.packed.tile)
        scales = tile_scales.view(torch.uint8)
        if f.packed.block_multiple is not None:
            scales = torch.nn.functional.pad((tile_scales.view(torch.int32) >> 23).to(torch.uint8), (0, 1))
        row: tuple[Tensor, ...] = (codes, rope.contiguous().view(torch.uint8), scales)
    else:
        row = (encode(latent, f.name, cache.scale), encode(rope, f.name, cache.scale))
    _put(slots, row, cache.parts)


def _put(slots: Tensor, row: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """Into views [B, bs, .] of a cache the parts of rows."""
    for part, codes in zip(parts, row, strict=True):
        size = max(part.shape[1], 1)
        part[slots // size, slots % size] = codes


def _take(slots: Tensor, parts: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The parts of rows, out of views [B, bs, .] of a cache."""
    return tuple(part[slots // max(part.shape[1], 1), slots % max(part.shape[1], 1)] for part in parts)


def _read(slots: Tensor, cache: Stored) -> tuple[Tensor, Tensor]:
    """Latent [n, L] and rope [n, R] of the rows in slots that exist: as they are, or in fp32 where they are fp8."""
    f = cache.format
    latent, rope, *scales = _take(slots, cache.parts)
    if not f.packed:
        return (dequantise(latent, cache.scale, f), dequantise(rope, cache.scale, f)) if f.quantised else (latent, rope)
    if f.packed.block_multiple is None:
        factors = scales[0].contiguous().view(torch.float32)
    else:
        factors = (scales[0][:, : cache.latent_dim // f.packed.tile].int() << 23).view(torch.float32)
    tiles = latent.view(torch.float8_e4m3fn).float().unflatten(1, (-1, f.packed.tile))
    return (tiles * factors[..., None]).flatten(1), rope.contiguous().view(torch.bfloat16)
