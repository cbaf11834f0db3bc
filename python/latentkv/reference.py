"""The specification: every op in plain PyTorch, on the plain tensors of the torch ops.

The other providers must give these very bytes. Rounding, in full: RoPE multiplies and adds in fp32, every step rounded
by itself, and rounds once to the activation dtype; fp8 divides by the scale in fp32, clamps to the finite range and
rounds to nearest even; 16- and 32-bit rows are copies.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .checks import ACTIVATIONS, INDEX_TYPES, Arguments
from .layouts import FORMATS


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """``x`` [..., R] turned by angles whose ``cos`` and ``sin`` [..., R/2] are fp32; pairs (i, i+R/2) or (2i, 2i+1)."""
    half = x.shape[-1] // 2
    a, b = x.float().reshape(*x.shape[:-1], *((2, half) if is_neox else (half, 2))).unbind(-2 if is_neox else -1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(pair, -2 if is_neox else -1).flatten(-2).to(x.dtype)


def encode(x: Tensor, format: str, scale: Tensor | None) -> Tensor:
    """The stored form of activations ``x``: themselves, or the uint8 codes of an fp8 format."""
    f = FORMATS[format]
    if f.max is None or f.nan is None:
        return x
    divisor = torch.ones((), device=x.device) if scale is None else scale.reshape(())
    quotient = x.float() / divisor
    codes = quotient.clamp(-f.max, f.max).to(f.dtype).view(torch.uint8)
    return torch.where(quotient.isnan(), f.nan, codes)


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
    _check_pairs(args, "q", q, "k", k, q.dtype, rotates=True)
    rows = _rows(args, None, 0, positions, cos_sin_cache, torch.full_like(positions, rope_dim > 0, dtype=torch.bool))
    if rope_dim:
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
    _update("write_cache_", None, None, k_pe, kv_c, None, slot_mapping, cache, rope_cache, scale, format, False, False)


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
    _update(
        "rope_write_cache_",
        positions, q_pe, k_pe, kv_c, cos_sin_cache, slot_mapping, cache, rope_cache, scale, format,
        is_neox, rope_masked,
    )  # fmt: skip


def _update(
    op: str,
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
    is_neox: bool,
    rope_masked: bool,
) -> None:
    args = Arguments(op, kv_c.device)
    args.tensor("kv_c", kv_c, ACTIVATIONS, N=-1, L=-1)
    n = kv_c.shape[0]
    if q_pe is not None:
        args.tensor("q_pe", q_pe, ACTIVATIONS, N=n, H=-1, R=-1)
    rope_dim = q_pe.shape[2] if q_pe is not None else k_pe.shape[-1] if k_pe.dim() else -1
    _check_positions(args, n, positions, table, rope_dim)
    args.tensor("k_pe", k_pe, ACTIVATIONS, N=n, R=rope_dim)
    _check_pairs(args, "q_pe", q_pe, "k_pe", k_pe, kv_c.dtype, rotates=table is not None)
    args.tensor("slot_mapping", slots, INDEX_TYPES, T=-1)
    if slots.shape[0] > n:
        args.fail("slot_mapping", f"at most N={n} entries", slots.shape[0])
    args.cache(cache, rope_cache, scale, format, kv_c, k_pe)

    t = slots.shape[0]
    capacity = cache.shape[0] * cache.shape[-2]
    rotates = (slots >= 0) | rope_masked
    if positions is None or table is None or rope_dim == 0:
        rotates = torch.zeros_like(rotates)
    rows = _rows(args, slots, capacity, positions[:t] if positions is not None else None, table, rotates)
    if positions is not None and table is not None and rope_dim:
        _rotate_rows(rows[rotates[rows]], positions, (q_pe, k_pe), table, is_neox, inverse=False)

    rows = rows[slots[rows] >= 0]
    block, entry = slots[rows].long() // max(cache.shape[-2], 1), slots[rows].long() % max(cache.shape[-2], 1)
    latent = encode(kv_c[rows], format, scale)
    rope = encode(k_pe[rows], format, scale)
    parts = [(cache, torch.cat([latent, rope], 1))] if rope_cache is None else [(cache, latent), (rope_cache, rope)]
    for tensor, codes in parts:
        pages = tensor.view(codes.dtype) if codes.dtype == torch.uint8 else tensor
        pages = pages.squeeze(1) if pages.dim() == 4 else pages
        pages[..., : codes.shape[1]][block, entry] = codes


def _check_positions(args: Arguments, n: int, positions: Tensor | None, table: Tensor | None, rope_dim: int) -> None:
    if (positions is None) != (table is None):
        missing = "positions" if positions is None else "cos_sin_cache"
        args.fail(missing, "a tensor, as for the other of positions and cos_sin_cache", "None")
    if positions is not None and table is not None:
        args.tensor("positions", positions, INDEX_TYPES, N=n)
        args.tensor("cos_sin_cache", table, ACTIVATIONS, max_position=-1, R=rope_dim)


def _check_pairs(
    args: Arguments, q_name: str, q: Tensor | None, k_name: str, k: Tensor | None, dtype: torch.dtype, rotates: bool
) -> None:
    for name, t in ((q_name, q), (k_name, k)):
        if t is None:
            continue
        args.dtype(name, t, (dtype,))
        if t.shape[-1] % 2:
            args.fail(name, "an even rope dimension R", t.shape[-1])
        if rotates:
            args.no_overlap(name, t)


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
    positions: Tensor,
    tensors: tuple[Tensor | None, Tensor | None],
    table: Tensor,
    is_neox: bool,
    inverse: bool,
) -> None:
    cos, sin = table[positions[rows]].float().chunk(2, -1)
    sin = -sin if inverse else sin
    for t in tensors:
        if t is not None:
            heads = t.dim() == 3
            t[rows] = rotate(t[rows], cos[:, None] if heads else cos, sin[:, None] if heads else sin, is_neox)
