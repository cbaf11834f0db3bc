"""gather_cache and convert_cache_ in one kernel, which moves rows from slots to slots: for it a gather's output is a
cache whose blocks hold one row each, found by the row's number.

A program moves some rows, latent vector, rope key and a packed format's scales. All of it is loaded before any of it is
stored. What both sides store alike is copied as it is; all else becomes fp32 and is stored anew.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...cache.layouts import FORMATS
from ..checks import Call, Stored, block_counts
from .codec import BITS, apart, div_rn, from_float, kind_of, power_of_two_above, quotient, to_float
from .launch import Launch, Target
from .update import (
    Pages,
    cdiv,
    greatest_magnitude,
    of_target,
    power_of_two,
    scale_of,
    wait_for_producer,
)

WAYS = tl.constexpr(32)  # of the search for a row's sequence: one step finds it among 32, two among 1024
TILE = 8192  # elements of a program, about: four warps by nine 16-byte accesses a thread, for 16-bit rows of 576
FEW_ROWS = 4096  # up to here programs are a quarter of that, and one warp
LEAST_ROWS = 1024  # up to here they are one row, if a row has no less than TILE / 16 elements


class Blocks(NamedTuple):
    """Which blocks the tokens of runs lie in: [S, columns] numbers below ``limit``; all blocks in order without any."""

    numbers: Tensor | None
    run_stride: int
    columns: int
    limit: int


# ---------------------------------------------------------------------------------------------------------- the kernel


@triton.jit
def sequence_of(row, cu_seq_lens, sequences, STEPS: tl.constexpr):
    """The sequence of each row [n]: how many end at or before it; ``sequences`` past the last end."""
    found = tl.zeros(row.shape, tl.int32)
    for step in tl.static_range(STEPS):
        stride = WAYS ** (STEPS - 1 - step)
        probe = found[:, None] + (1 + tl.arange(0, WAYS))[None, :] * stride
        inside = probe <= sequences
        end = tl.load(cu_seq_lens + probe, mask=inside, other=0)
        found += tl.sum((inside & (end <= row[:, None])).to(tl.int32), 1) * stride
    return found


@triton.jit
def find(blocks, run, token, present, SIZE: tl.constexpr):
    """The block and entry of tokens, and which of these there are."""
    column = token // SIZE
    exists = present & (token >= 0) & (column < blocks.columns)
    if blocks.numbers is None:
        number = column
    else:
        at = run.to(tl.int64) * blocks.run_stride + column
        number = tl.load(blocks.numbers + at, mask=exists, other=-1)
    exists = exists & (number >= 0) & (number < blocks.limit)
    return tl.where(exists, number, 0).to(tl.int64), (token % SIZE).to(tl.int64), exists


@triton.jit
def rows_at(pages, block, entry):
    """Pointers [n, 1] to rows."""
    return (pages.data + block * pages.block_stride + entry * pages.entry_stride)[:, None]


@triton.jit
def decoded(x, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """codec.to_float, by the chip's own instructions where it has them."""
    if CONVERTS and KIND == "fp8_e4m3fn":
        value = x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif CONVERTS and KIND == "fp8_e5m2":
        value = x.to(tl.float8e5, bitcast=True).to(tl.float32)
    else:
        value = to_float(x, KIND)
    return value


@triton.jit
def recoded(
    x, src_scale, dst_scale, SRC: tl.constexpr, DST: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr
):  # fmt: skip
    """Elements in another code. A code without a scale of its own has None."""
    value = decoded(x, SRC, CONVERTS)
    if src_scale is not None:
        value = value * tl.load(src_scale)
    if dst_scale is not None:
        value = quotient(value, tl.load(dst_scale), HIP, CONVERTS)
    return from_float(apart(value, HIP), DST, CONVERTS)


@triton.jit
def moved(
    x, src_scale, dst_scale, SRC: tl.constexpr, DST: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr
):  # fmt: skip
    """Elements as the other side stores them: as they are where code and scale are the same."""
    y = x
    if SRC != DST:
        y = recoded(x, src_scale, dst_scale, SRC, DST, HIP, CONVERTS)
    elif src_scale is not None or dst_scale is not None:  # noqa: SIM102 -- only the next is asked on the device
        if scale_of(src_scale) != scale_of(dst_scale):
            y = recoded(x, src_scale, dst_scale, SRC, DST, HIP, CONVERTS)
    return y


@triton.jit
def untiled(x, scales, SIZE: tl.constexpr, CONVERTS: tl.constexpr):
    """The fp32 values [n, .] of e4m3fn in tiles of SIZE, with the bits of their scales [n, tiles]."""
    if scales.dtype == tl.uint8:
        scales = scales.to(tl.int32) << 23
    factor = scales.to(tl.float32, bitcast=True)
    values = decoded(x, "fp8_e4m3fn", CONVERTS).reshape(x.shape[0], factor.shape[1], SIZE)
    return (values * factor[:, :, None]).reshape(x.shape)


@triton.jit
def tiled(values, SIZE: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr):
    """fp32 numbers [n, .] as e4m3fn in tiles of SIZE, and the scale [n, tiles] of each: a power of two."""
    tiles = values.reshape(values.shape[0], values.shape[1] // SIZE, SIZE)
    amax = greatest_magnitude(tiles.to(tl.int32, bitcast=True))
    scale = power_of_two_above(tl.maximum(div_rn(amax, tl.full(amax.shape, 448.0, tl.float32), HIP), 1e-4))
    codes = from_float(tiles * div_rn(1.0, scale, HIP)[:, :, None], "fp8_e4m3fn", CONVERTS)  # exact
    return codes.reshape(values.shape), scale


@triton.jit(
    do_not_specialize=[
        *("rows", "tokens", "sequences", "src_run_stride", "src_columns", "src_limit"),
        *("dst_run_stride", "dst_columns", "dst_limit"),
    ],
    do_not_specialize_on_alignment=["src_numbers", "dst_numbers", "cu_seq_lens", "seq_starts"],
)
def move_rows(
    src, src_rope, src_tiles, src_scale, src_numbers, src_run_stride, src_columns, src_limit,
    dst, dst_rope, dst_tiles, dst_scale, dst_numbers, dst_run_stride, dst_columns, dst_limit,
    cu_seq_lens, seq_starts, rows, tokens, sequences,
    ROWS: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, ROPE_WIDTH: tl.constexpr,
    SRC: tl.constexpr, SRC_ROPE: tl.constexpr, SRC_TILE: tl.constexpr, SRC_SIZE: tl.constexpr,
    DST: tl.constexpr, DST_ROPE: tl.constexpr, DST_TILE: tl.constexpr, DST_SIZE: tl.constexpr,
    STEPS: tl.constexpr, HIP: tl.constexpr, CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows from src to dst; ``cu_seq_lens``: a gather, in which rows without a block are zeroed."""
    wait_for_producer(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = row < rows
    row = tl.where(present, row, 0).to(tl.int32)
    if cu_seq_lens is None:
        run, token = row // tokens, row % tokens
    else:
        run = sequence_of(row, cu_seq_lens, sequences, STEPS)
        present = present & (run < sequences)
        token = row.to(tl.int64) - tl.load(cu_seq_lens + run, mask=present, other=0)
        if seq_starts is not None:
            token += tl.load(seq_starts + run, mask=present, other=0)
    src_blocks = Blocks(src_numbers, src_run_stride, src_columns, src_limit)
    block, entry, exists = find(src_blocks, run, token, present, SRC_SIZE)
    if cu_seq_lens is None:
        dst_blocks = Blocks(dst_numbers, dst_run_stride, dst_columns, dst_limit)
        dst_block, dst_entry, write = find(dst_blocks, run, token, present, DST_SIZE)
        exists = exists & write
        write = exists
    else:
        dst_block, dst_entry, write = row.to(tl.int64), tl.zeros(row.shape, tl.int64), present
    exists, write = exists[:, None], write[:, None]

    i, j = tl.arange(0, WIDTH)[None, :], tl.arange(0, ROPE_WIDTH)[None, :]
    latent = tl.load(rows_at(src, block, entry) + i, mask=exists & (i < L), other=0)
    if R > 0:
        rope = tl.load(rows_at(src_rope, block, entry) + j, mask=exists & (j < R), other=0)
    if SRC_TILE > 0:
        t = tl.arange(0, WIDTH // SRC_TILE)[None, :]
        scales = tl.load(rows_at(src_tiles, block, entry) + t, mask=exists, other=0)

    if SRC_TILE > 0 and DST_TILE == 0:
        values = apart(untiled(latent, scales, SRC_TILE, CONVERTS), HIP)
        if dst_scale is not None:
            values = quotient(values, tl.load(dst_scale), HIP, CONVERTS)
        latent = from_float(values, DST, CONVERTS)
    elif DST_TILE > 0 and SRC_TILE == 0:
        values = decoded(latent, SRC, CONVERTS)
        if src_scale is not None:
            values = values * tl.load(src_scale)
        latent, scale = tiled(values, DST_TILE, HIP, CONVERTS)
        scales = scale.to(tl.int32, bitcast=True)
        if DST_TILE == 64:  # exponents, and a byte that pads them
            t = tl.arange(0, WIDTH // DST_TILE)[None, :]
            scales = tl.where(t < L // DST_TILE, scales >> 23, 0).to(tl.uint8)
    elif SRC_TILE == 0:
        latent = moved(latent, src_scale, dst_scale, SRC, DST, HIP, CONVERTS)
    if cu_seq_lens is not None:
        latent = tl.where(exists, latent, 0)
    tl.store(rows_at(dst, dst_block, dst_entry) + i, latent, mask=write & (i < L))
    if R > 0:
        rope = moved(rope, src_scale, dst_scale, SRC_ROPE, DST_ROPE, HIP, CONVERTS)
        if cu_seq_lens is not None:
            rope = tl.where(exists, rope, 0)
        tl.store(rows_at(dst_rope, dst_block, dst_entry) + j, rope, mask=write & (j < R))
    if DST_TILE > 0:
        t = tl.arange(0, WIDTH // DST_TILE)[None, :]
        tl.store(rows_at(dst_tiles, dst_block, dst_entry) + t, scales, mask=write)


# ---------------------------------------------------------------------------------------------------------- launches


def part_pages(part: Tensor, dtype: torch.dtype) -> Pages:
    """A view [B, bs, .] of rows as the kernels take it, of elements of ``dtype``."""
    size = dtype.itemsize // part.element_size()
    row = part[0, 0] if part.shape[0] and part.shape[1] else part.new_empty(0)
    return Pages(row.view(dtype), part.stride(0) // size, part.stride(1) // size)


def of_blocks(side: str, cache: Stored, numbers: Tensor | None) -> dict[str, Any]:
    """What the kernels take of the blocks that runs of tokens lie in: tables of any width make one kernel."""
    return {
        f"{side}numbers": numbers,
        f"{side}run_stride": numbers.stride(0) if numbers is not None and numbers.dim() == 2 else 0,
        f"{side}columns": block_counts(cache, numbers)[1],
        f"{side}limit": cache.num_blocks if cache.block_size else 0,
    }


def _side(name: str, cache: Stored, numbers: Tensor | None) -> dict[str, Any]:
    """What the kernel takes of src or dst."""
    packed = cache.format.packed
    code, rope_code = ("fp8_e4m3fn", "bf16") if packed else (cache.format.name, cache.format.name)
    latent, rope, *scales = cache.parts
    tiles = torch.uint8 if packed and packed.block_multiple else torch.int32
    return {
        name: part_pages(latent, BITS[FORMATS[code].dtype.itemsize]),
        f"{name}_rope": part_pages(rope, BITS[FORMATS[rope_code].dtype.itemsize]) if cache.rope_dim else None,
        f"{name}_tiles": part_pages(scales[0], tiles) if packed else None,
        f"{name}_scale": cache.scale,
        name.upper(): code,
        f"{name.upper()}_ROPE": rope_code,
        f"{name.upper()}_TILE": packed.tile if packed else 0,
        f"{name.upper()}_SIZE": max(cache.block_size, 1),
        **of_blocks(f"{name}_", cache, numbers),
    }


def _launch(target: Target, rows: int, cache: Stored, args: dict[str, Any]) -> list[Launch]:
    width, few = power_of_two(cache.latent_dim), rows <= FEW_ROWS
    each = max(min(TILE // width, 64) // (16 if rows <= LEAST_ROWS else 4 if few else 1), 1)
    args |= {"rows": rows, "ROWS": each, "L": cache.latent_dim, "WIDTH": width, "R": cache.rope_dim}
    args |= {"ROPE_WIDTH": power_of_two(cache.rope_dim), **of_target(target)}
    warps = 4 if args["cu_seq_lens"] is None else target.num_warps  # conversions take more registers
    return [Launch(move_rows, (cdiv(rows, each),), args, 1 if few else warps, pdl=target.pdl)]


def gather_launches(target: Target, x: Call, rows: int, sequences: int) -> list[Launch]:
    """The launch of gather_cache for so many rows of ``out``, and sequences."""
    if not rows or not sequences:
        return []
    steps = 1
    while WAYS.value**steps <= sequences:
        steps += 1
    kind = FORMATS[kind_of(x.out.dtype)]
    out = Stored(x.out[:, None], None, None, kind, x.cache.latent_dim, x.cache.rope_dim)  # blocks of one row
    args = {
        **_side("src", x.cache, x.block_table),
        **_side("dst", out, None),
        "cu_seq_lens": x.cu_seq_lens,
        "seq_starts": x.seq_starts,
        "tokens": 0,
        "sequences": sequences,
        "STEPS": steps,
    }
    return _launch(target, rows, x.cache, args)


def convert_launches(target: Target, x: Call, rows: int) -> list[Launch]:
    """The launch of convert_cache_ for so many rows."""
    if not rows:
        return []
    args = {
        **_side("src", x.src, x.src_blocks),
        **_side("dst", x.dst, x.dst_blocks),
        "cu_seq_lens": None,
        "seq_starts": None,
        "tokens": tokens_of(x)[1],
        "sequences": 0,
        "STEPS": 0,
    }
    return _launch(target, rows, x.src, args)


def tokens_of(x: Call) -> tuple[int, int]:
    """The runs of convert_cache_, and the tokens of each."""
    (runs, count), (_, dst_count) = block_counts(x.src, x.src_blocks), block_counts(x.dst, x.dst_blocks)
    return runs, min(count * x.src.block_size, dst_count * x.dst.block_size)
