"""The key of DeepSeek-V3.2's indexer: rotate its first elements, quantise all 128 with one scale, write the row.

A block of the cache holds its rows' codes, then their scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..checks import INDEX_DIM, Call
from .codec import div_rn, from_float, kind_of, power_of_two_above, quotient, to_float
from .launch import Launch, Target
from .update import (
    cdiv,
    greatest_magnitude,
    load_angles,
    load_indices,
    load_pairs,
    of_rotation,
    of_target,
    pages,
    plan,
    row_at,
    scales_at,
    store_pairs,
    turn,
    vectors,
    wait_for_producer,
)

KEY_ROWS = 8  # tokens of a program
DIM = tl.constexpr(INDEX_DIM)


@triton.jit
def pairs_of(rows, R: tl.constexpr):
    """Pointers [n, 64] to both members of NeoX pairs, of which the first R / 2 are rotated."""
    j = tl.arange(0, DIM // 2)[None, :]
    if DIM % R == 0:  # as if all runs of R elements were rotated, for the sake of wide access
        a = j // (R // 2) * R + j % (R // 2)
        b = a + R // 2
    else:
        a = tl.where(j < R // 2, j, 2 * j)
        b = tl.where(j < R // 2, R // 2 + j, 2 * j + 1)
    return rows + a, rows + b


@triton.jit(
    do_not_specialize=["tokens", "capacity", "max_position"], do_not_specialize_on_alignment=["slots", "positions"]
)
def indexer_kernel(
    slots, positions, tokens, capacity, max_position, table, key, cache,
    R: tl.constexpr, KIND: tl.constexpr, TABLE: tl.constexpr, KEY_ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    IS_NEOX: tl.constexpr, ROTATES: tl.constexpr, POWER_OF_TWO: tl.constexpr, HIP: tl.constexpr,
    CONVERTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """KEY_ROWS keys."""
    wait_for_producer(PDL)
    token = tl.program_id(0) * KEY_ROWS + tl.arange(0, KEY_ROWS)
    present = token < tokens
    slot, position = load_indices(slots, token, present), load_indices(positions, token, present)
    rows = (key.data + token.to(tl.int64) * key.stride)[:, None]
    if IS_NEOX:
        a_at, b_at = pairs_of(rows, R)
        a = tl.load(a_at, mask=present[:, None], other=0)
        b = tl.load(b_at, mask=present[:, None], other=0)
    else:
        a, b = load_pairs(rows, present[:, None], DIM, DIM // 2, False)
    _, rotate, write = plan(slot, position, present, capacity, max_position, ROTATES, False)
    row = row_at(cache, slot, write, BLOCK_SIZE)[:, None]
    scale_at = scales_at(cache, slot, write, BLOCK_SIZE, 4).to(tl.pointer_type(tl.float32))
    if ROTATES:
        rotate = rotate[:, None] & (tl.arange(0, DIM // 2)[None, :] < R // 2)
        cos, sin = load_angles(table, position[:, None], rotate, R, DIM // 2, TABLE, False)
        x, y = turn(a, b, cos, sin, KIND, CONVERTS)
        a, b = tl.where(rotate, x, a), tl.where(rotate, y, b)
    x, y = to_float(a, KIND), to_float(b, KIND)
    amax = tl.maximum(
        greatest_magnitude(x.to(tl.int32, bitcast=True)), greatest_magnitude(y.to(tl.int32, bitcast=True))
    )
    scale = div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, 448.0, tl.float32), HIP)
    if POWER_OF_TWO:
        scale = power_of_two_above(scale)
    tl.store(scale_at, scale, mask=write)
    divisor = scale[:, None] if CONVERTS else scale[:, None].broadcast_to(x.shape)
    x = from_float(quotient(x, divisor, HIP, CONVERTS), "fp8_e4m3fn", CONVERTS)
    y = from_float(quotient(y, divisor, HIP, CONVERTS), "fp8_e4m3fn", CONVERTS)
    if IS_NEOX:
        a_at, b_at = pairs_of(row, R)
        tl.store(a_at, x, mask=write[:, None])
        tl.store(b_at, y, mask=write[:, None])
    else:
        store_pairs(row, x, y, write[:, None], DIM, DIM // 2, False)


def indexer_launches(target: Target, x: Call) -> list[Launch]:
    """The launch of write_indexer_cache_."""
    args = {
        "slots": x.slot_mapping,
        "tokens": x.tokens,
        "capacity": x.cache.capacity,
        "key": vectors(x.k),
        "cache": pages(x.cache.data, x.cache),
        "R": x.sizes.get("R", 0),
        "KIND": kind_of(x.k.dtype),
        "KEY_ROWS": KEY_ROWS,
        "BLOCK_SIZE": max(x.cache.block_size, 1),
        "POWER_OF_TWO": x.power_of_two_scale,
        **of_rotation(x.rotation),
        **of_target(target),
    }
    return [Launch(indexer_kernel, (cdiv(x.tokens, KEY_ROWS),), args, target.num_warps, pdl=target.pdl)]
