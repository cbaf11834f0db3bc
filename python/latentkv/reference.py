"""The specification: every op in plain PyTorch, on the plain tensors of the torch ops.

The other providers must give these very bytes. Rounding, in full: RoPE multiplies and adds in fp32, every step rounded
by itself, and rounds once to the activation dtype; RMSNorm does too, and adds up in one fixed order; fp8 divides by the
scale in fp32, clamps to the finite range and rounds to nearest even; 16- and 32-bit rows are copies.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .checks import ACTIVATIONS, INDEX_TYPES, Arguments
from .layouts import FORMATS, Format

INDEX_DIM, INDEX_ROW_BYTES = 128, 132  # elements of an indexer key, and bytes of its cache row with the fp32 scale
QUERY_FORMATS = {f.dtype: f for f in FORMATS.values() if f.quantised}


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
    args.tensor("q", q, ACTIVATIONS, N=-1, H=-1, R=-1)
    n, _, rope_dim = q.shape
    _check_positions(args, n, positions, cos_sin_cache, rope_dim)
    if k is not None and k.dim() == 3:
        args.tensor("k", k, ACTIVATIONS, N=n, K=-1, R=rope_dim)
    elif k is not None:
        args.tensor("k", k, ACTIVATIONS, N=n, R=rope_dim)
    _check_pairs(args, {"q": q, "k": k}, q.dtype, mutated=True)
    rows = _rows(args, None, 0, positions, cos_sin_cache, torch.full_like(positions, rope_dim > 0, dtype=torch.bool))
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
    f = _check_update(args, None, None, k_pe, kv_c, None, slot_mapping, cache, rope_cache, scale, format, False)
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
    f = _check_update(
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
    f = _check_update(args, positions, q_pe, k_pe, kv_c, cos_sin_cache, slots, cache, rope_cache, scale, format, False)
    _check_query(args, q_nope, q_pe, kv_c, q_out, q_rope_out, q_scale)
    _check_norm(args, kv_c, kv_norm_weight, kv_c_out)

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
    layers = len(kv_c)
    if not layers:
        args.fail("kv_c", "at least one tensor", "none")
    for name, given in (("k_pe", k_pe), ("caches", caches), ("rope_caches", rope_caches or caches), ("scales", scales)):
        if len(given) != layers:
            args.fail(name, f"G={layers} entries, as kv_c has", len(given))
    n, latent_dim, rope_dim = -1, -1, k_pe[0].shape[-1] if k_pe[0].dim() else -1
    for i, (latent, rope) in enumerate(zip(kv_c, k_pe, strict=True)):
        types = (kv_c[0].dtype,) if i else ACTIVATIONS
        args.tensor(f"kv_c[{i}]", latent, types, N=n, L=latent_dim)
        n, latent_dim = latent.shape
        args.tensor(f"k_pe[{i}]", rope, types, N=n, R=rope_dim)
        _check_pairs(args, {f"k_pe[{i}]": rope}, latent.dtype, mutated=False)
    _check_slots(args, n, slot_mapping)
    f = args.format(format, kv_c[0], k_pe[0], ("kv_c[0]", "k_pe[0]"))
    rope_parts: Sequence[Tensor | None] = rope_caches or [None] * layers
    for i, (cache, rope_cache, scale) in enumerate(zip(caches, rope_parts, scales, strict=True)):
        names = (f"caches[{i}]", f"rope_caches[{i}]", f"scales[{i}]")
        args.cache(cache, rope_cache, scale, f, latent_dim, rope_dim, names)
        args.same_blocks(names[0], cache, "caches[0]", caches[0])

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
    args.tensor("k", k, ACTIVATIONS, N=-1, D=INDEX_DIM)
    _check_positions(args, len(k), positions, cos_sin_cache, -1)
    rope_dim = 0 if cos_sin_cache is None else cos_sin_cache.shape[1]
    if cos_sin_cache is not None and rope_dim not in range(2, INDEX_DIM + 1, 2):
        args.fail("cos_sin_cache", f"an even R in 2 .. {INDEX_DIM}", rope_dim)
    _check_slots(args, len(k), slot_mapping)
    args.pages("cache", cache, INDEX_ROW_BYTES, f"{INDEX_ROW_BYTES} bytes", (torch.uint8,), "for format indexer")
    args.byte_rows("cache", cache, INDEX_ROW_BYTES)
    args.capacity("cache", cache)

    rows, turned = _plan(args, positions, cos_sin_cache, slot_mapping, cache, False)
    k = k.clone()
    _rotate_rows(turned, positions, (k[:, :rope_dim],), cos_sin_cache, is_neox)
    x = k[rows].float()
    amax = largest(x).clamp(min=1e-4)
    scale = amax / torch.full_like(amax, 448.0)
    scale = (power_of_two(scale) if power_of_two_scale else scale)[:, None]
    codes = quantise(x / scale, FORMATS["fp8_e4m3fn"])
    _put(rows, slot_mapping, zip(_run(cache, INDEX_DIM, 4), (codes, scale.view(torch.uint8)), strict=True))


# ------------------------------------------------------------------------------------------------------- the checks


def _check_update(
    args: Arguments,
    positions: Tensor | None,
    q_pe: Tensor | None,
    k_pe: Tensor,
    kv_c: Tensor,
    table: Tensor | None,
    slots: Tensor,
    cache: Tensor,
    rope_cache: Tensor | None,
    scale: Tensor | None,
    format: str,
    mutated: bool,
) -> Format:
    args.tensor("kv_c", kv_c, ACTIVATIONS, N=-1, L=-1)
    n, latent_dim = kv_c.shape
    if q_pe is not None:
        args.tensor("q_pe", q_pe, ACTIVATIONS, N=n, H=-1, R=-1)
    rope_dim = q_pe.shape[2] if q_pe is not None else k_pe.shape[-1] if k_pe.dim() else -1
    _check_positions(args, n, positions, table, rope_dim)
    args.tensor("k_pe", k_pe, ACTIVATIONS, N=n, R=rope_dim)
    _check_pairs(args, {"q_pe": q_pe, "k_pe": k_pe}, kv_c.dtype, mutated)
    _check_slots(args, n, slots)
    f = args.format(format, kv_c, k_pe)
    args.cache(cache, rope_cache, scale, f, latent_dim, rope_dim)
    return f


def _check_query(
    args: Arguments,
    q_nope: Tensor | None,
    q_pe: Tensor,
    kv_c: Tensor,
    q_out: Tensor,
    q_rope_out: Tensor | None,
    q_scale: Tensor | None,
) -> None:
    (n, heads, rope_dim), latent_dim, dtype = q_pe.shape, kv_c.shape[1], kv_c.dtype
    if q_nope is not None:
        args.tensor("q_nope", q_nope, (dtype,), N=n, H=heads, L=latent_dim)
    width = {"L + R": latent_dim + rope_dim} if q_rope_out is None else {"L": latent_dim}
    args.tensor("q_out", q_out, (dtype, *QUERY_FORMATS), N=n, H=heads, **width)
    args.no_overlap("q_out", q_out)
    if q_rope_out is not None:
        args.tensor("q_rope_out", q_rope_out, (q_out.dtype,), N=n, H=heads, R=rope_dim)
        args.no_overlap("q_rope_out", q_rope_out)
    if q_scale is not None:
        args.scale("q_scale", q_scale)


def _check_norm(args: Arguments, kv_c: Tensor, weight: Tensor | None, kv_c_out: Tensor | None) -> None:
    n, latent_dim = kv_c.shape
    if weight is not None:
        args.tensor("kv_norm_weight", weight, (kv_c.dtype, torch.float32), L=latent_dim)
    if kv_c_out is not None:
        if weight is None:
            args.fail("kv_c_out", "None without kv_norm_weight", "a tensor")
        args.tensor("kv_c_out", kv_c_out, (kv_c.dtype,), N=n, L=latent_dim)
        args.no_overlap("kv_c_out", kv_c_out)


def _check_positions(args: Arguments, n: int, positions: Tensor | None, table: Tensor | None, rope_dim: int) -> None:
    if (positions is None) != (table is None):
        missing = "positions" if positions is None else "cos_sin_cache"
        args.fail(missing, "a tensor, as for the other of positions and cos_sin_cache", "None")
    if positions is not None and table is not None:
        args.tensor("positions", positions, INDEX_TYPES, N=n)
        args.tensor("cos_sin_cache", table, ACTIVATIONS, max_position=-1, R=rope_dim)


def _check_pairs(args: Arguments, tensors: dict[str, Tensor | None], dtype: torch.dtype, mutated: bool) -> None:
    for name, t in tensors.items():
        if t is None:
            continue
        args.dtype(name, t, (dtype,))
        if t.shape[-1] % 2:
            args.fail(name, "an even rope dimension R", t.shape[-1])
        if mutated:
            args.no_overlap(name, t)


def _check_slots(args: Arguments, n: int, slots: Tensor) -> None:
    args.tensor("slot_mapping", slots, INDEX_TYPES, T=-1)
    if slots.shape[0] > n:
        args.fail("slot_mapping", f"at most N={n} entries", slots.shape[0])


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
    rows = _rows(args, slots, capacity, positions[: len(slots)] if positions is not None else None, table, rotates)
    return rows, rows[rotates[rows]]


def _rows(
    args: Arguments,
    slots: Tensor | None,
    capacity: int,
    positions: Tensor | None,
    table: Tensor | None,
    rotates: Tensor,
) -> Tensor:
    """The rows to work on. Those with a slot or a position outside are skipped, or raise: see the contract."""
    bad_slots = torch.zeros_like(rotates) if slots is None else slots >= capacity
    bad_positions = torch.zeros_like(rotates)
    if positions is not None and table is not None:
        bad_positions = rotates & ((positions < 0) | (positions >= table.shape[0]))
    if rotates.device.type == "cpu" or os.environ.get("LATENTKV_CHECKS") == "1":
        if slots is not None and bad_slots.any():
            row = int(bad_slots.nonzero()[0])
            args.fail("slot_mapping", f"slots below the capacity of {capacity}", f"{int(slots[row])} at row {row}")
        if positions is not None and table is not None and bad_positions.any():
            row = int(bad_positions.nonzero()[0])
            args.fail("positions", f"values in 0 .. {table.shape[0] - 1}", f"{int(positions[row])} at row {row}")
    return (~(bad_slots | bad_positions)).nonzero().flatten()


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
    if f.packed:
        codes, tile_scales = encode_tiles(latent, f.packed.tile)
        keys = rope.contiguous().view(torch.uint8)
        if f.packed.block_multiple is None:
            parts = [(cache, torch.cat([codes, tile_scales.view(torch.uint8), keys], 1))]
        else:
            exponents = (tile_scales.view(torch.int32) >> 23).to(torch.uint8)
            row = (torch.cat([codes, keys], 1), torch.nn.functional.pad(exponents, (0, 1)))
            parts = list(zip(_run(cache, *(part.shape[1] for part in row)), row, strict=True))
    elif rope_cache is None:
        parts = [(cache, torch.cat([encode(latent, f.name, scale), encode(rope, f.name, scale)], 1))]
    else:
        parts = [(cache, encode(latent, f.name, scale)), (rope_cache, encode(rope, f.name, scale))]
    _put(rows, slots, parts)


def _run(cache: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Blocks [B, bs, >= sum of widths] of bytes, in which first one part of all rows lies and then the next."""
    blocks, entries = cache.shape[0], cache.shape[-2]
    block = cache.as_strided((blocks, entries * sum(widths)), (cache.stride(0), 1))
    parts = block.split([entries * width for width in widths], 1)
    return tuple(part.unflatten(1, (entries, width)) for part, width in zip(parts, widths, strict=True))


def _put(rows: Tensor, slots: Tensor, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Into cache tensors [B, bs, C] or [B, 1, bs, C] the codes that belong to ``rows``, those that have a slot."""
    own = slots[rows].long()
    for cache, codes in parts:
        pages = cache.view(torch.uint8) if codes.dtype == torch.uint8 else cache
        pages = pages.squeeze(1) if pages.dim() == 4 else pages
        size = max(pages.shape[1], 1)
        slot = own[own >= 0]
        pages[..., : codes.shape[1]][slot // size, slot % size] = codes[own >= 0]
